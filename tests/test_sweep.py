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
from lift_lightning.sweep import SWEEP_FILE, SweepError, overall, sweep, sweep_table


def results(**right: int) -> dict:
    """Of tasks with ten samples each; the paper's rule finds one more right."""
    tasks = {
        task: {"strict": {"accuracy": count / 10}, "paper": {"accuracy": (count + 1) / 10}}
        for task, count in right.items()
    }
    return {"tasks": tasks, "means": {}}


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
    assert "Accuracy by lift.rank" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / SWEEP_FILE).read_text())
    assert [one["value"] for one in found["runs"]] == ["1", "2"]
    assert set(found["runs"][0]["tasks"]) == {"addsub"}
    assert set(found["best"]) == {"paper", "strict"}
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
    assert json.loads((tmp_path / "out" / SWEEP_FILE).read_text())["best"] == {"paper": "0.001", "strict": "0.001"}
    sweep(*arguments)
    assert len(commands) == 3
    assert "--ckpt_path" not in commands[0] + commands[1]
    assert commands[2][commands[2].index("--ckpt_path") + 1].endswith(
        "model.lr=0.002/logs/version_0/checkpoints/last.ckpt"
    )
    assert json.loads((tmp_path / "out" / SWEEP_FILE).read_text())["best"]["strict"] == "0.002"


def test_the_table_marks_the_best():
    found = {"16": results(addsub=3, gsm8k=4), "32": results(addsub=5, gsm8k=1)}
    assert overall(found["16"], "strict") == pytest.approx(0.35)
    console = Console(width=100, record=True)
    console.print(sweep_table("lift.rank", found))
    text = console.export_text()
    assert "35.0% *" in text
    assert "45.0% *" in text
    assert "30.0% *" not in text
    assert "optimistic" in text


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
