"""The `sweep` command: one run for each value of an option, and what they reached in one table."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.recorder import RESULTS_FILE
from lift_lightning.evaluation.results import RULES, write_json

SWEEP_FILE = "sweep.json"
_SCORES_FILE = "scores.json"  # in the folder of a run that came to its end
# Of one run, by name: accuracies of tasks and their means, or one metric of the validation.
Scores = dict[str, float]


class SweepError(RuntimeError):
    """A run of a sweep failed; what was found before it is kept."""


def sweep(
    option: str,
    values: list[int | float | str],
    output: str,
    run: list[str],
    metric: str | None = None,
    mode: Literal["max", "min"] = "max",
) -> Path:
    """Train and test, or validate, once for each value of an option, and compare.

    What follows `--` on the command line is `run`, as in `-- --config configs/math10k.yaml`. A sweep that breaks off
    goes on when the same command is given again: results that are there are taken, and a run that is half done resumes
    from its checkpoint. Each run logs into a CSV file of its own folder.

    Args:
        option: that is varied, such as `lift.rank`.
        values: that it takes.
        output: the folder of the sweep; each run has one in it.
        run: options of the command `run` (of `fit` with a metric), which is given once for each value.
        metric: of the validation, such as `val_matthews`, whose best value in a run counts; null counts the tests.
        mode: whether more of the metric is better (`max`), or less (`min`).

    Returns:
        `sweep.json`, as an absolute path.

    Raises:
        ConfigError: if there is no value, one is there twice, or the option is among those of the runs too.
        SweepError: if a run fails, or logs no such metric.
    """
    folder = Path(output).expanduser().resolve()
    if not values or len({str(value) for value in values}) < len(values):
        raise ConfigError(f"values must be several different ones, got {values}")
    flag = f"--{option}"
    if any(argument == flag or argument.startswith(f"{flag}=") for argument in run):
        raise ConfigError(f"{flag} is what the sweep varies: leave it out after `--`")
    found: dict[str, Scores] = {}
    for value in values:
        place = folder / re.sub(r"[^\w.=-]", "_", f"{option}={value}")
        if not (place / _SCORES_FILE).is_file():
            _run("run" if metric is None else "fit", place, [flag, str(value)], run)
            scores = scores_of_tests(place) if metric is None else {metric: _best_logged(place, metric, mode)}
            write_json(place / _SCORES_FILE, scores)
        found[str(value)] = json.loads((place / _SCORES_FILE).read_text(encoding="utf-8"))
        best = {name: best_value(found, name, mode) for name in next(iter(found.values()))}
        runs = [{"value": value, "scores": scores} for value, scores in found.items()]
        write_json(folder / SWEEP_FILE, {"option": option, "metric": metric, "best": best, "runs": runs})
    Console().print(sweep_table(option, found, mode))
    return folder / SWEEP_FILE


def _run(command: str, place: Path, varied: list[str], options: Sequence[str]) -> None:
    arguments = {"save_dir": str(place), "name": "logs", "flush_logs_every_n_steps": 10}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": arguments}
    own = ["--trainer.default_root_dir", str(place), "--trainer.logger", json.dumps(logger)]
    own += ["--model.predictions_dir", str(place / "predictions")]
    checkpoints = sorted(place.glob("logs/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        own += ["--ckpt_path", str(checkpoints[-1])]
    Console().rule(" ".join(varied))
    code = subprocess.run([sys.executable, "-m", "lift_lightning", command, *options, *own, *varied]).returncode
    if code:
        raise SweepError(
            f"the run with {' '.join(varied)} ended with status {code}, see above; the same command goes on from there"
        )


def scores_of_tests(place: Path) -> Scores:
    """Of a run's tests: each task by the strict rule, and the unweighted means over its tasks by both."""
    tasks: dict[str, Any] = json.loads((place / "predictions" / RESULTS_FILE).read_text(encoding="utf-8"))["tasks"]
    scores = {name: task["strict"]["accuracy"] for name, task in tasks.items()}
    for rule in reversed(RULES):
        scores[f"mean, {rule} rule"] = sum(task[rule]["accuracy"] for task in tasks.values()) / len(tasks)
    return scores


def _best_logged(place: Path, metric: str, mode: str) -> float:
    """Over all parts of a run, which has a log for each time that it was resumed."""
    logged: list[float] = []
    names: set[str] = set()
    for file in place.glob("logs/version_*/metrics.csv"):
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        names.update(*rows)
        logged += [float(row[metric]) for row in rows if row.get(metric)]
    if not logged:
        raise SweepError(f"the run in {place} logged no {metric}, but {', '.join(sorted(names))}: choose one of these")
    return max(logged) if mode == "max" else min(logged)


def best_value(found: Mapping[str, Scores], name: str, mode: str) -> str:
    """The value of the option with the best score of a name."""
    return (max if mode == "max" else min)(found, key=lambda value: found[value][name])


def sweep_table(option: str, found: Mapping[str, Scores], mode: str = "max") -> Table:
    """One row for each score, one column for each value of the option, with the best of each row marked.

    Args:
        option: that was varied.
        found: the scores, by value.
        mode: `max` or `min`, whichever is better.
    """
    caption = "* best by the rows that are shown, as in the paper's tables of best ranks: an optimistic choice"
    table = Table(title=f"Scores by {option}", caption=caption)
    table.add_column("", no_wrap=True)
    for value in found:
        table.add_column(value, justify="right", no_wrap=True)
    for name in next(iter(found.values())):
        best = best_value(found, name, mode)
        cells = [f"{scores[name]:.4f}{' *' if value == best else '  '}" for value, scores in found.items()]
        table.add_row(name, *cells)
    return table
