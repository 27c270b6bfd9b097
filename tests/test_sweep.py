"""A sweep trains and tests once for each value, goes on where it broke off, and says which value was best."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from tiny import save_tiny_llama, write_sums

from lift_lightning import cli
from lift_lightning.errors import ConfigError
from lift_lightning.sweep import SWEEP_FILE, SweepError, best_value, sweep, sweep_table


def results(**right: int) -> dict:
    """Of tasks with ten samples each; the paper's rule finds one more right."""
    return {
        "tasks": {
            task: {"strict": {"accuracy": count / 10}, "paper": {"accuracy": (count + 1) / 10}}
            for task, count in right.items()
        }
    }


def test_a_sweep_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """With the real runs, each in a process of its own."""
    model, rows = save_tiny_llama(tmp_path / "model"), write_sums(tmp_path / "rows.json")
    (tmp_path / "AddSub.json").write_text(json.dumps([{"instruction": "2+2?", "answer": 4}] * 2))
    monkeypatch.setattr("sys.argv", ["lift-lightning"])
    run = ["--model.model_name_or_path", str(model), "--data.path", str(rows), "--data.val_size", "0"]
    run += ["--data.test_path", str(tmp_path / "AddSub.json"), "--model.max_new_tokens", "2", "--lift.lra_rank", "2"]
    run += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"]
    run += ["--data.cache_dir", str(tmp_path / "cache")]
    own = ["--option", "lift.rank", "--values", "[1, 2]", "--output", str(tmp_path / "out")]
    cli.main(["sweep", *own, "--", *run])
    assert "Scores by lift.rank" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / SWEEP_FILE).read_text())
    assert [one["value"] for one in found["runs"]] == ["1", "2"]
    assert list(found["runs"][0]["scores"]) == ["addsub", "mean, strict rule", "mean, paper rule"]
    for rank in (1, 2):
        written = (tmp_path / f"out/lift.rank={rank}/logs/version_0/config.yaml").read_text()
        assert f"\n  rank: {rank}\n" in written
    # All there: nothing is run again.
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("ran again"))
    assert sweep("lift.rank", [1, 2], str(tmp_path / "out"), run) == tmp_path / "out" / SWEEP_FILE


def test_it_goes_on_from_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        place = Path(command[command.index("--trainer.default_root_dir") + 1])
        if len(commands) == 2:
            (place / "logs/version_0/checkpoints").mkdir(parents=True)
            (place / "logs/version_0/checkpoints/last.ckpt").touch()
            return subprocess.CompletedProcess(command, 1)
        (place / "predictions").mkdir(parents=True)
        (place / "predictions/results.json").write_text(json.dumps(results(addsub=len(commands))))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ("model.lr", [1e-3, 2e-3], str(tmp_path / "out"), ["--config", "a.yaml"])
    with pytest.raises(SweepError, match=r"the run with --model.lr 0.002 ended with status 1"):
        sweep(*arguments)
    assert json.loads((tmp_path / "out" / SWEEP_FILE).read_text())["best"]["addsub"] == "0.001"
    sweep(*arguments)
    assert len(commands) == 3
    assert "--ckpt_path" not in commands[0] + commands[1]
    assert commands[2][commands[2].index("--ckpt_path") + 1].endswith(
        "model.lr=0.002/logs/version_0/checkpoints/last.ckpt"
    )
    assert json.loads((tmp_path / "out" / SWEEP_FILE).read_text())["best"]["mean, strict rule"] == "0.002"


def test_a_metric_of_the_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        place = Path(command[command.index("--trainer.default_root_dir") + 1])
        for version, values in enumerate((("0.1", ""), ("0.4", "0.2"))):  # resumed once
            (place / f"logs/version_{version}").mkdir(parents=True)
            rows = "".join(f"{i},{value},2.5\n" for i, value in enumerate(values))
            (place / f"logs/version_{version}/metrics.csv").write_text(f"step,val_matthews,train_loss\n{rows}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    arguments = {"option": "lift.rank", "values": [4], "run": ["--config", "configs/glue.yaml"]}
    file = sweep(**arguments, output=str(tmp_path / "most"), metric="val_matthews")
    assert json.loads(file.read_text())["runs"] == [{"value": "4", "scores": {"val_matthews": 0.4}}]
    file = sweep(**arguments, output=str(tmp_path / "least"), metric="val_matthews", mode="min")
    assert json.loads(file.read_text())["runs"] == [{"value": "4", "scores": {"val_matthews": 0.1}}]
    assert commands[0][3] == "fit"
    with pytest.raises(SweepError, match="logged no val_f1, but step, train_loss, val_matthews: choose one"):
        sweep(**arguments, output=str(tmp_path / "none"), metric="val_f1")


def test_the_table_marks_the_best():
    found = {"16": {"addsub": 0.3, "mean": 0.35}, "32": {"addsub": 0.5, "mean": 0.3}}
    console = Console(width=100, record=True)
    console.print(sweep_table("lift.rank", found))
    text = console.export_text()
    assert all(mark in text for mark in ("0.5000 *", "0.3500 *", "optimistic"))
    assert "0.3000 *" not in text
    assert best_value(found, "addsub", "min") == "16"


@pytest.mark.parametrize(
    ("values", "run", "message"),
    [
        ([], [], "values must be several different ones"),
        ([16, 16], [], r"values must be several different ones, got \[16, 16\]"),
        ([16], ["--lift.rank", "2"], "--lift.rank is what the sweep varies"),
        ([16], ["--lift.rank=2"], "--lift.rank is what the sweep varies"),
    ],
)
def test_it_refuses(values: list, run: list[str], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        sweep("lift.rank", values, str(tmp_path), run)
