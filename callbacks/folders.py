"""What callbacks share that write a folder at the end of a fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl

from lift_lightning.sharding import all_ranks

T = TypeVar("T")


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on all; what it raises there is raised on all."""
    ranks = all_ranks()
    return work() if ranks is None else ranks.on_first(work)


def folder_of(trainer: pl.Trainer, output: str | None, name: str) -> Path:
    """The folder that is asked for; else `name` beside the logs of the run. To be called by all ranks."""
    beside = trainer.log_dir or trainer.default_root_dir  # rank 0 tells the others
    return Path(beside) / name if output is None else Path(output)
