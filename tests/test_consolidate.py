"""What the consolidate command refuses, and who sends users to it; tests/test_distributed.py makes files with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_llama, write_sums

from lift_lightning import cli
from lift_lightning.consolidate import consolidate
from lift_lightning.errors import CheckpointError
from lift_lightning.export import export


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a process leaves it that is killed before it has written what comes last."""
    (tmp_path / "step=4.ckpt").mkdir()
    (tmp_path / "step=4.ckpt/.metadata").touch()
    return tmp_path / "step=4.ckpt"


def test_what_is_not_whole_is_refused(folder: Path):
    with pytest.raises(CheckpointError, match="has no meta.pt: it was not written to its end"):
        consolidate(str(folder), str(folder.parent / "file.ckpt"))
    assert [path.name for path in folder.parent.iterdir()] == ["step=4.ckpt"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint folder '.*nowhere'"):
        consolidate(str(tmp_path / "nowhere"), str(tmp_path / "file.ckpt"))


def test_a_file_is_not_replaced_unasked(folder: Path):
    there = folder.parent / "file.ckpt"
    torch.save({}, there)
    with pytest.raises(FileExistsError, match="set overwrite to true"):
        consolidate(str(folder), str(there))
    with pytest.raises(FileExistsError, match="is there already"):
        consolidate(str(folder), str(folder), overwrite=True)


def test_export_names_the_command(folder: Path):
    with pytest.raises(CheckpointError, match=r"consolidate --ckpt_path .*step=4.ckpt --output .*step=4.ckpt.whole"):
        export(str(folder), str(folder.parent / "out"))


def test_a_run_on_one_device_names_the_command(folder: Path, capsys: pytest.CaptureFixture[str]):
    model, rows = save_tiny_llama(folder.parent / "model"), write_sums(folder.parent / "rows.json")
    arguments = ["--config", "configs/math10k.yaml", "--model.model_name_or_path", str(model), "--data.path", str(rows)]
    settings = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.logger", "false"]
    with pytest.raises(SystemExit):
        cli.main(["fit", *arguments, *settings, "--ckpt_path", str(folder)])
    assert f"consolidate --ckpt_path {folder}" in capsys.readouterr().err
