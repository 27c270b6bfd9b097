"""Pad a batch of token ids to its longest example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lift_lightning.prompts import IGNORE_INDEX


def pad_batch(
    examples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    side: Literal["left", "right"] = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Stack examples of different lengths.

    Args:
        examples: Each with `input_ids` and, for training, `labels` of the same length.
        pad_token_id: Fills `input_ids`. The attention mask comes from the lengths, not from this id: it may be a
            real token (EOS).
        side: Where the padding goes: `"right"` for training, `"left"` for generation, which goes on at the right end.
        pad_to_multiple_of: Round the length up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` and, if the examples have them, `labels` (-100 on the padding): int64,
        (batch, length).

    Raises:
        ValueError: No examples, an unknown side, a multiple below 1, or labels that do not fit their ids.
    """
    if not examples:
        raise ValueError("cannot pad an empty batch")
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    if multiple < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
    ids = [example["input_ids"] for example in examples]
    width = -(-max(len(row) for row in ids) // multiple) * multiple
    batch = {
        "input_ids": _stack(ids, width, pad_token_id, side),
        "attention_mask": _stack([[1] * len(row) for row in ids], width, 0, side),
    }
    if "labels" in examples[0]:
        labels = [example["labels"] for example in examples]
        for i, (row, label) in enumerate(zip(ids, labels, strict=True)):
            if len(row) != len(label):
                raise ValueError(f"example {i} of the batch has {len(row)} ids and {len(label)} labels")
        batch["labels"] = _stack(labels, width, IGNORE_INDEX, side)
    return batch


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Left-padded `input_ids` and `attention_mask` for generation; prompts are token ids."""
    return pad_batch([{"input_ids": ids} for ids in prompts], pad_token_id, side="left")


def collate_test(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Left-padded prompts under `input_ids` and `attention_mask`, and under `rows` the `row` each one comes from."""
    batch: dict[str, Any] = {"rows": [example["row"] for example in examples]}
    return {**pad_prompts([example["input_ids"] for example in examples], pad_token_id), **batch}


def collate_sentences(
    examples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    regression: bool = False,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Any]:
    """Right-padded sentences with one label each.

    Args:
        examples: Each with `input_ids`, `token_type_ids` (empty where the model has none) and `label`, which is None
            where the example does not count.
        pad_token_id: Fills `input_ids`.
        regression: Whether labels are real numbers.
        pad_to_multiple_of: Round the length up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` and perhaps `token_type_ids`: int64, (batch, length). `labels`: class numbers,
        int64, (batch,), -100 where there is none; of a regression a list, with NaN where there is none, because
        Lightning would round a tensor of them to the model's dtype.
    """
    ids = [{"input_ids": example["input_ids"]} for example in examples]
    batch: dict[str, Any] = dict(pad_batch(ids, pad_token_id, pad_to_multiple_of=pad_to_multiple_of))
    if types := [example["token_type_ids"] for example in examples if example["token_type_ids"]]:
        batch["token_type_ids"] = _stack(types, batch["input_ids"].shape[1], 0, "right")
    labels = [example["label"] for example in examples]
    if regression:
        return {**batch, "labels": [math.nan if label is None else label for label in labels]}
    return {**batch, "labels": torch.tensor([IGNORE_INDEX if label is None else int(label) for label in labels])}


def _stack(rows: Sequence[Sequence[int]], width: int, fill: int, side: str) -> Tensor:
    """(batch, width) of int64."""
    out = torch.full((len(rows), width), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        if len(row):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            out[i, place] = torch.as_tensor(row, dtype=torch.int64)
    return out
