"""A run that is killed and resumed ends with the bits of one that was not.

Everything that could differ is on: shuffled data over two epochs, attention dropout, refreshes, clipping, accumulation.
The kill is SIGKILL in the middle of an epoch and of an interval; nothing gets to clean up.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import write_sums

ROOT = Path(__file__).parents[1]
# 84 training rows in batches of 4 are 21 micro-batches, two to a step: 11 steps an epoch, the last of one micro-batch.
STEPS = 22
CHECKPOINT = 8  # mid-epoch; refreshes at 5, 10, 15, 20


def command(folder: Path, model: Path, rows: Path, precision: str) -> list[str]:
    """`fit` in a folder of its own, every setting in a file."""
    config = {
        "model": {"lr": 1e-2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "model_name_or_path": str(model)},
        "lift": {"rank": 4, "lra_rank": 6, "interval": 5},
        "data": {
            "class_path": "lift_lightning.datamodules.Math10KDataModule",
            "init_args": {
                "path": str(rows),
                "batch_size": 4,
                "val_size": 16,
                "cache_dir": str(folder.parent / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "precision": precision,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "logs", "flush_logs_every_n_steps": 1},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": str(folder),
                        "filename": "{step}",
                        "every_n_train_steps": 2,
                        "save_top_k": -1,
                    },
                }
            ],
        },
    }
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return [sys.executable, str(ROOT / "main.py"), "fit", "--config", str(file)]


def losses(folder: Path, version: int) -> dict[int, str]:
    with (folder / f"logs/version_{version}/metrics.csv").open() as file:
        return {int(row["step"]): row["train_loss"] for row in csv.DictReader(file) if row["train_loss"]}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_killed_run_resumes_to_the_same_bits(dropout_model_dir, tmp_path, precision):
    rows = write_sums(tmp_path / "rows.json", rows=100)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    whole = command(tmp_path / "whole", dropout_model_dir, rows, precision)
    subprocess.run(whole, env=environment, check=True, capture_output=True, timeout=300)

    folder = tmp_path / "killed"
    killed = command(folder, dropout_model_dir, rows, precision)
    process = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / f"step={CHECKPOINT}.ckpt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (folder / f"step={STEPS}.ckpt").exists()

    # The checkpoint before the newest: that one may have been in the middle of its writing when the signal came.
    resume = [*killed, "--ckpt_path", str(folder / f"step={CHECKPOINT - 2}.ckpt")]
    subprocess.run(resume, env=environment, check=True, capture_output=True, timeout=300)

    expected, found = losses(tmp_path / "whole", 0), losses(folder, 1)
    assert list(expected) == list(range(STEPS))
    assert found == {step: loss for step, loss in expected.items() if step >= CHECKPOINT - 2}
    last = [torch.load(path / f"step={STEPS}.ckpt", weights_only=True) for path in (tmp_path / "whole", folder)]
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name]), name
    moments = [checkpoint["lift_lightning"]["optimizer"]["parameters"] for checkpoint in last]
    for name, tensors in moments[0].items():
        assert all(torch.equal(value, moments[1][name][key]) for key, value in tensors.items()), name
