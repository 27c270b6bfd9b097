"""AdamW on vectors: plain tensors in and out, torch's fused kernel underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# A tensor, or what keeps one in fewer bits and has its `dtype`, `to` and `copy_`.
Moment = Any


@torch.no_grad()
def adamw_update(
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019) in place, on lists of tensors that may be vectors or matrices.

    Args:
        values: (K,) each, what is trained.
        grads: (K,) each, same dtype as `values`.
        exp_avgs: (K,) each; a narrower dtype than `values`, or 8 bits, is widened for the update and rounded back.
        exp_avg_sqs: (K,) each, likewise.
        steps: 0-dim float32 each, the steps taken so far; counted up here.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; `values` shrink by lr * weight_decay.
        found_inf: 0-dim float32; where it is 1 nothing changes, the step count included, and no host sync is made.
    """
    if not values:
        return
    wide_avgs = [m.to(v.dtype) for m, v in zip(exp_avgs, values, strict=True)]
    wide_avg_sqs = [m.to(v.dtype) for m, v in zip(exp_avg_sqs, values, strict=True)]
    adamw(
        values,
        grads,
        wide_avgs,
        wide_avg_sqs,
        [],
        steps,
        fused=True,
        found_inf=found_inf,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for narrow, wide in zip([*exp_avgs, *exp_avg_sqs], [*wide_avgs, *wide_avg_sqs], strict=True):
        if narrow.dtype != wide.dtype:
            narrow.copy_(wide)
