"""What a test run found, with its uncertainty and all that it takes to do it again."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.predictions import Summary
from lift_lightning.evaluation.scoring import Rule
from lift_lightning.evaluation.tasks import ARITHMETIC, COMMONSENSE, get_task

RULES: tuple[Rule, ...] = ("paper", "strict")
# Easy and hard are those of the paper's Fig. 4. The hard ones are also those whose questions are not in the training
# sets that MATH-10K is made of.
MEANS: dict[str, tuple[str, ...]] = {
    "arithmetic": tuple(task.name for task in ARITHMETIC),
    "arithmetic, easy": ("multiarith", "addsub", "singleeq", "mawps"),
    "arithmetic, hard and clean": ("gsm8k", "aqua", "svamp"),
    "commonsense": tuple(task.name for task in COMMONSENSE),
}
_Z = 1.959964  # two-sided 95% of the normal distribution


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95% interval of a share, as Wilson (1927) gives it: it stays within 0 and 1, for few samples too.

    Args:
        correct: of `n`.
        n: at least 1.
    """
    share, spread = correct / n, _Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def means(summaries: Mapping[str, Summary]) -> dict[str, dict[Rule, float]]:
    """Unweighted means over the groups of tasks whose every task is there, as the paper reports them."""
    found: dict[str, dict[Rule, float]] = {}
    for name, tasks in MEANS.items():
        if all(task in summaries for task in tasks):
            found[name] = {rule: sum(summaries[task].accuracy(rule) for task in tasks) / len(tasks) for rule in RULES}
    return found


def results(summaries: Mapping[str, Summary], run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON has it.

    Args:
        summaries: by task.
        run: what was run, and how: model, checkpoint, decoding, seed, command, version.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for name, found in summaries.items():
        tasks[name] = {"version": get_task(name, generic="exact").version, "samples": found.n}
        tasks[name] |= {"unanswered": found.unanswered}
        for rule in RULES:
            low, high = wilson_interval(found.correct(rule), found.n)
            tasks[name][rule] = {
                "correct": found.correct(rule),
                "accuracy": found.accuracy(rule),
                "interval_95": [low, high],
            }
    return {"tasks": tasks, "means": means(summaries), "run": dict(run)}


def write_json(path: Path, content: Any) -> None:
    """Under its name the file is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def source_commit() -> str | None:
    """Of this package, where it runs from a clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone after all
        return None


def begin_run(file: Path, run: Mapping[str, Any], unfinished: bool) -> bool:
    """Write down what is run, or find that it goes on with what is there.

    Args:
        file: that says what was run.
        run: what is run now.
        unfinished: whether the folder has the beginnings of a run.

    Returns:
        Whether it goes on.

    Raises:
        ConfigError: if the beginnings are of another run, `command` aside.
    """
    if not (unfinished and file.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(run))
        return False
    before = json.loads(file.read_text(encoding="utf-8"))
    if differing := same_run(before, run, (before.keys() | run.keys()) - {"command"}):
        raise ConfigError(
            f"{file.parent} has unfinished predictions of another run ({'; '.join(differing)}): choose another folder, "
            "or remove this one"
        )
    return True


def same_run(one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """What differs between two runs, as `key: value or other value`."""
    return [f"{key}: {one.get(key)!r} or {other.get(key)!r}" for key in keys if one.get(key) != other.get(key)]
