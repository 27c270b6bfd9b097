"""A delta of a real pretrained model after a short real run; runs where both are given by environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, delta_of, read
from transformers import AutoModelForCausalLM

from lift_lightning.delta import Delta, attach, open_folder, write_model

ROOT = Path(__file__).parents[1]
DATA, MODEL = os.environ.get("LIFT_DATA_DIR"), os.environ.get("LIFT_SMOLLM2_DIR")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA and MODEL), reason="LIFT_DATA_DIR and LIFT_SMOLLM2_DIR are not both set"),
]
BYTES_AN_ENTRY = {"bf16-true": 4, "32-true": 6}  # the value, and at most two for its position


def command(*words: str, cwd: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("precision", ["bf16-true"])  # 32-true passes too, and takes as long again
def test_a_short_run_is_its_delta(precision: str, tmp_path: Path):
    fit = ["fit", "--config", str(ROOT / "configs/math10k.yaml"), "--model.model_name_or_path", MODEL]
    fit += ["--data.path", f"{DATA}/math_gsm8k_train.json", "--data.batch_size", "1", "--data.val_size", "4"]
    fit += [
        "--data.cache_dir",
        "cache",
        "--data.max_samples",
        "64",
        "--data.max_length",
        "128",
        "--model.accumulate_grad_batches",
        "1",
    ]
    fit += ["--lift.density", "0.05", "--lift.rank", "null", "--lift.lra_rank", "16", "--lift.interval", "2"]
    fit += [
        "--model.lr",
        "1e-3",
        "--model.warmup_ratio",
        "0",
        "--trainer.max_steps",
        "3",
        "--model.gradient_checkpointing",
        "false",
    ]
    fit += ["--trainer.precision", precision, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    fit += ["--trainer.callbacks+", "lift_lightning.callbacks.DeltaExport", "--trainer.callbacks.output", "d"]
    command(*fit, cwd=tmp_path)
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    command("export", "--ckpt_path", str(checkpoint), "--output", "trained", cwd=tmp_path)

    delta = Delta.from_pretrained(tmp_path / "d")
    assert_same_bits(delta.tensors, delta_of(Path(MODEL), tmp_path / "trained").tensors)
    changed = sum(record.changed for record in delta.description.tensors.values())
    assert 0.02 * 106_168_320 < changed < 0.06 * 106_168_320
    size = sum(file.stat().st_size for file in (tmp_path / "d").iterdir())
    assert size / changed < BYTES_AN_ENTRY[precision]

    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    base, model, trained = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in (MODEL, MODEL, tmp_path / "trained")
    )
    ids = torch.arange(2, 60).unsqueeze(0)
    before = base(ids).logits
    attached = attach(model, delta)
    for _ in range(2):
        attached.apply()
        assert_same_bits(model.state_dict(), trained.state_dict())
        assert torch.equal(model(ids).logits, trained(ids).logits)
        attached.revert()
        assert_same_bits(model.state_dict(), base.state_dict())
        assert torch.equal(model(ids).logits, before)
    with open_folder(MODEL) as source:
        written = write_model(source, delta, tmp_path / "again")
    assert_same_bits(read(written), read(tmp_path / "trained"))
