"""Runs of a study on disk: one JSON file each, with what it takes to make it again.

A run that is there is not run again, so a study that was stopped goes on where it was; a run is written whole or not
at all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.environment import commit, machine, versions

RUNS = Path(__file__).parent / "runs"
FIGURES = Path(__file__).parents[2] / "docs" / "results"

Run = dict[str, Any]


class Store:
    """The runs of one study.

    Args:
        study: its name, that of its folder.
        folder: of all studies.
    """

    def __init__(self, study: str, folder: Path = RUNS) -> None:
        self.study, self.folder = study, folder / study

    def path(self, name: str) -> Path:
        """Where the run of this name is, or would be."""
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        """Whether it was run."""
        return self.path(name).is_file()

    def load(self, name: str) -> Run:
        """A run that is there."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def __iter__(self) -> Iterator[Run]:
        """All runs, in the order of their names."""
        for path in sorted(self.folder.glob("*.json")):
            yield json.loads(path.read_text(encoding="utf-8"))

    def save(self, name: str, command: str, seed: int | None, content: Run) -> Path:
        """Write a run with its command, seed, commit, date, versions and machine."""
        head = {
            "study": self.study,
            "name": name,
            "command": command,
            "seed": seed,
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": machine(),
        }
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({**head, **content}, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path


def significant(value: float, digits: int = 6) -> float | None:
    """The value with so many significant digits, as files are smaller with; None for NaN and infinity."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
