"""The main job on a real pretrained model and real data; runs where both are given by environment variables."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import assert_same_choice, low_rank
from safetensors.torch import load_file

from lift_lightning import SelectionConfig, select_indices
from lift_lightning.lowrank import DEFAULT_TOLERANCE
from lift_lightning.selection import select

ROOT = Path(__file__).parents[1]
DATA, MODEL = os.environ.get("LIFT_DATA_DIR"), os.environ.get("LIFT_SMOLLM2_DIR")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA and MODEL), reason="LIFT_DATA_DIR and LIFT_SMOLLM2_DIR are not both set"),
]


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("lra_rank", [16, 128])
def test_masks_of_real_weights_against_float64_svd(name, lra_rank):
    weight = load_file(Path(MODEL) / "model.safetensors")[f"model.layers.7.{name}.weight"]
    config = SelectionConfig(density=0.05, lra_rank=lra_rank, solver="exact")
    ours = select_indices(weight, config)
    differing = assert_same_choice(ours, low_rank(weight, lra_rank).abs(), round(0.05 * weight.numel()))
    assert differing <= 1e-4 * ours.numel()
    chosen_by_size = select(weight, replace(config, solver="auto"))
    assert torch.isin(chosen_by_size.indices, ours).double().mean() >= 1 - 2 * DEFAULT_TOLERANCE
    # 192 x 576, of which rank 128 would leave the subspace solver nothing to save.
    assert chosen_by_size.solved[0].solver == ("exact" if "k_proj" in name and lra_rank == 128 else "subspace")


def test_fit_on_real_data_trains_and_refreshes(tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", str(ROOT / "configs/math10k.yaml")]
    command += ["--model.model_name_or_path", MODEL, "--data.path", f"{DATA}/math_gsm8k_train.json"]
    command += ["--data.batch_size", "2", "--data.val_size", "4", "--data.cache_dir", str(tmp_path / "cache")]
    command += ["--lift.rank", "16", "--lift.lra_rank", "16", "--lift.interval", "3", "--model.warmup_ratio", "0"]
    command += ["--trainer.max_steps", "4", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
    command += ["--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", str(tmp_path)]
    command += ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    # r (M + N) of a layer: q and o 2 * 16 * 1152, k and v 2 * 16 * 768, gate, up and down 3 * 16 * 2112; 30 layers.
    assert "LIFT refresh at step 1: 4,884,480 of 106,168,320 entries" in result.stderr
    with (tmp_path / "logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["lift_refresh_seconds"]] == ["0", "2"]
    (overlap,) = (float(row["lift_overlap"]) for row in rows if row["lift_overlap"])
    assert 0.9 < overlap < 1
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(losses) == 4
    assert max(losses) < 3  # a pretrained model; an untrained one starts at ln 49152 = 10.8
