"""The `sweep` command: one run for each value of an option, and their test results in one table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.recorder import RESULTS_FILE
from lift_lightning.evaluation.results import RULES, write_json

SWEEP_FILE = "sweep.json"


class SweepError(RuntimeError):
    """A run of a sweep failed; what was found before it is kept."""


def sweep(option: str, values: list[int | float | str], output: str, run: list[str]) -> Path:
    """Train and test once for each value of an option, and compare what the tests say.

    What follows `--` on the command line is `run`, as in `-- --config configs/math10k.yaml`. A sweep that breaks off
    goes on when the same command is given again: results that are there are taken, and a run that is half done resumes
    from its checkpoint. Each run logs into a CSV file of its own folder.

    Args:
        option: that is varied, such as `lift.rank`.
        values: that it takes.
        output: the folder of the sweep; each run has one in it.
        run: options of the command `run`, which is given once for each value.

    Returns:
        `sweep.json`, as an absolute path.

    Raises:
        ConfigError: if there is no value, one is there twice, or the option is among those of the runs too.
        SweepError: if a run fails.
    """
    folder = Path(output).expanduser().resolve()
    if not values or len({str(value) for value in values}) < len(values):
        raise ConfigError(f"values must be several different ones, got {values}")
    flag = f"--{option}"
    if any(argument == flag or argument.startswith(f"{flag}=") for argument in run):
        raise ConfigError(f"{flag} is what the sweep varies: leave it out after `--`")
    found: dict[str, dict[str, Any]] = {}
    for value in values:
        place = folder / re.sub(r"[^\w.=-]", "_", f"{option}={value}")
        if not (place / "predictions" / RESULTS_FILE).is_file():
            _run(place, [flag, str(value)], run)
        found[str(value)] = json.loads((place / "predictions" / RESULTS_FILE).read_text(encoding="utf-8"))
        _write(folder, option, found)
    Console().print(sweep_table(option, found))
    return folder / SWEEP_FILE


def _run(place: Path, varied: list[str], options: Sequence[str]) -> None:
    csv = {"save_dir": str(place), "name": "logs", "flush_logs_every_n_steps": 10}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv}
    own = ["--trainer.default_root_dir", str(place), "--trainer.logger", json.dumps(logger)]
    own += ["--model.predictions_dir", str(place / "predictions")]
    checkpoints = sorted(place.glob("logs/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        own += ["--ckpt_path", str(checkpoints[-1])]
    Console().rule(" ".join(varied))
    code = subprocess.run([sys.executable, "-m", "lift_lightning", "run", *options, *own, *varied]).returncode
    if code:
        raise SweepError(
            f"the run with {' '.join(varied)} ended with status {code}, see above; the same command goes on from there"
        )


def _write(folder: Path, option: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    runs = [{"value": value, **{k: results[k] for k in ("tasks", "means")}} for value, results in found.items()]
    best = {rule: max(found, key=lambda value: overall(found[value], rule)) for rule in RULES}
    write_json(folder / SWEEP_FILE, {"option": option, "best": best, "runs": runs})


def overall(results: Mapping[str, Any], rule: str) -> float:
    """The unweighted mean over a run's tasks of the accuracy by a rule."""
    accuracies = [task[rule]["accuracy"] for task in results["tasks"].values()]
    return sum(accuracies) / len(accuracies)


def sweep_table(option: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Accuracies by the strict rule, one row for each value, the best mean by each rule marked.

    Args:
        option: that was varied.
        found: the results of a test run, as `results.json` has them, by value.
    """
    tasks = list(next(iter(found.values()))["tasks"])
    caption = "chosen by the test sets themselves, as in the paper's tables of best ranks: the best is optimistic"
    table = Table(title=f"Accuracy by {option}, strict rule", caption=caption)
    table.add_column(option, justify="right", no_wrap=True)
    for heading in (*tasks, "mean", "mean, paper rule"):
        table.add_column(heading, justify="right")
    best = {rule: max(overall(results, rule) for results in found.values()) for rule in RULES}
    for value, results in found.items():
        cells = [f"{results['tasks'][task]['strict']['accuracy']:.1%}" for task in tasks]
        for rule in ("strict", "paper"):
            mean = overall(results, rule)
            cells.append(f"[bold]{mean:.1%} *[/bold]" if mean == best[rule] else f"{mean:.1%}")
        table.add_row(value, *cells)
    return table
