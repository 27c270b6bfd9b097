"""Rows for evaluation on several ranks: each counted once, and as many batches everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from lift_lightning.prompts import IGNORE_INDEX

Row = Mapping[str, Any]


def without_labels(row: Row) -> Row:
    """A row of validation that counts for nothing."""
    return {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}


def without_answer(row: Row) -> Row:
    """A prompt of a test whose completion nobody looks at."""
    return {**row, "row": {**row["row"], "index": None}}


def without_label(row: Row) -> Row:
    """A row of a classification that counts for nothing."""
    return {**row, "label": None}


class EvaluationShard(Dataset):
    """Every W-th row of a dataset, beginning with that of this rank.

    Ranks with a row less than others end with a copy of one that does not count: under FSDP2 all ranks have to run the
    model equally often, and a row that is there twice must not count twice.

    Args:
        dataset: at least one row.
        ranks: W.
        rank: this one, from 0.
        blank: makes of a row one that does not count.
    """

    def __init__(self, dataset: Any, ranks: int, rank: int, blank: Callable[[Row], Row]) -> None:
        self.dataset = dataset
        self.ranks = ranks
        self.rank = rank
        self.blank = blank

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.ranks)

    def __getitem__(self, i: int) -> Row:
        row = i * self.ranks + self.rank
        return self.dataset[row] if row < len(self.dataset) else self.blank(self.dataset[row % len(self.dataset)])
