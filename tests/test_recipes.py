"""Every recipe in configs/ makes its objects, with the paper's batch, and so does every command that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lift_lightning import datamodules
from lift_lightning.cli import lightning_cli

ROOT = Path(__file__).parents[1]
# data module, epochs, and rows to a step
RECIPES = {
    "alpaca": ("AlpacaDataModule", 1, 16),
    "commonsense170k": ("Commonsense170KDataModule", 3, 16),
    "glue": ("GLUEDataModule", 8, 32),
    "gsm8k": ("GSM8KDataModule", 3, 16),
    "s1k": ("S1KDataModule", 5, 16),
    "strategyqa": ("StrategyQADataModule", 3, 16),
}
# data module, beams, and tasks
SUITES = {
    "eval/arithmetic": ("SFTDataModule", 4, 7),
    "eval/commonsense": ("SFTDataModule", 4, 8),
    "eval/gpqa-diamond": ("ChatDataModule", 1, 1),
}


def made(arguments: list[str]):
    """The objects of a command, on this machine."""
    return lightning_cli([*arguments, "--trainer.accelerator", "cpu"], run=False)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_its_objects(name: str):
    found = made(["--config", str(ROOT / f"configs/{name}.yaml")])
    data, epochs, rows = RECIPES[name]
    assert isinstance(found.datamodule, getattr(datamodules, data))
    assert found.trainer.max_epochs == epochs
    assert found.datamodule.batch_size * found.model.hparams.accumulate_grad_batches == rows
    assert found.trainer.default_root_dir.endswith(f"runs/{name}")


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_makes_its_objects(name: str):
    found = made(["--config", str(ROOT / f"configs/{name}.yaml"), "--model.model_name_or_path", "x"])
    data, beams, tasks = SUITES[name]
    assert isinstance(found.datamodule, getattr(datamodules, data))
    assert len(found.datamodule.test_tasks) == tasks
    assert found.model.hparams.num_beams == beams
    assert found.trainer.default_root_dir.endswith(f"runs/{name}")


@pytest.mark.parametrize("name", [*RECIPES, *SUITES, "math10k"])
def test_the_commands_of_a_recipe_can_be_run(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    opening = (ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    joined = re.sub(r"\\\n#", "", opening)
    commands = re.findall(r"python main\.py (?:fit|run|test) (--config .*)", joined)
    commands += re.findall(r"python main\.py sweep .* -- (--config .*)", joined)
    assert commands
    assert all(f"configs/{name}.yaml" in command for command in commands)
    for command in commands:
        made(shlex.split(re.sub(r"--ckpt_path \S+", "", command)))
