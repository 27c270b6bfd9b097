"""Rows for evaluation on several ranks: each counted once, and as many batches everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from lift_lightning.prompts import IGNORE_INDEX


class EvaluationShard(Dataset):
    """Every W-th row of a dataset, beginning with that of this rank.

    Ranks with a row less than others end with a copy of one that has no labels: under FSDP2 all ranks have to run the
    model equally often, and a row that is there twice must not count twice.

    Args:
        dataset: rows with `input_ids` and `labels`; at least one.
        ranks: W.
        rank: this one, from 0.
    """

    def __init__(self, dataset: Any, ranks: int, rank: int) -> None:
        self.dataset = dataset
        self.ranks = ranks
        self.rank = rank

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.ranks)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        row = i * self.ranks + self.rank
        if row < len(self.dataset):
            return self.dataset[row]
        example = self.dataset[row % len(self.dataset)]
        return {**example, "labels": [IGNORE_INDEX] * len(example["labels"])}
