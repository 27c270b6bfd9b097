"""Losses as a sum and the number of things summed, so that a mean can be taken over any set of micro-batches.

Letters: B sequences in a batch; T tokens of a sequence; V size of the vocabulary; C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lift_lightning.prompts import IGNORE_INDEX


class SummedLoss(NamedTuple):
    """A loss before the division.

    Attributes:
        total: 0-dim float32 sum.
        weight: 0-dim int64, the label tokens or examples summed over.
    """

    total: Tensor
    weight: Tensor


def causal_lm_loss(logits: Tensor, labels: Tensor) -> SummedLoss:
    """Cross-entropy of each label token given what stands before it.

    Args:
        logits: (B, T, V); converted to float32.
        labels: (B, T) token ids, -100 where there is nothing to learn.
    """
    # The labels are shifted and not the logits: cutting off their last column would copy them.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    predictions = logits.reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return SummedLoss(total, (targets != IGNORE_INDEX).sum())


def classification_loss(logits: Tensor, labels: Tensor) -> SummedLoss:
    """Cross-entropy of B examples over C classes, or squared error where the model has one output.

    Args:
        logits: (B, C).
        labels: (B,) class numbers, -100 where there is none; or real targets where C is 1, NaN where there is none.
    """
    if logits.shape[1] == 1:
        predictions = logits[:, 0].float()
        # An error of 0 where there is no label: NaN times 0 would be NaN.
        targets = torch.where(has_label(labels), labels.float(), predictions.detach())
        total = F.mse_loss(predictions, targets, reduction="sum")
    else:
        total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return SummedLoss(total, has_label(labels).sum())


def has_label(labels: Tensor) -> Tensor:
    """(B,) of booleans for (B,) class numbers or real targets: whether a row counts."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX
