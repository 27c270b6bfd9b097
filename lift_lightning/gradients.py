"""Gradients of whole matrices over some batches, for the criteria that choose by them.

The price is a float32 number for every entry of the sparse parameters, while the selection is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from lift_lightning.errors import ConfigError
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.sharding import Ranks

Statistics = dict[str, Tensor]


def gradient_statistics(
    optimizer: SparseAdamW,
    loss_of: Callable[[Any], Tensor],
    batches: Iterable[Any],
    power: Literal[1, 2] = 1,
    *,
    ranks: Ranks | None = None,
) -> Statistics:
    """Sum the gradients, or their squares, of every sparse parameter over batches; nothing is trained.

    To be called between steps: gradients that wait for one are dropped. Each gradient is added up and dropped as soon
    as the backward pass has it.

    Args:
        optimizer: whose sparse parameters are meant.
        loss_of: batch -> 0-dim loss.
        batches: at least one.
        power: 2 sums the square of each batch's gradient.
        ranks: that each have batches of their own, and the whole model: the sums are over all of them.

    Returns:
        By parameter name, float32 in the shape of the parameter, on its device.

    Raises:
        ConfigError: if the parameters are split over ranks, or there is no batch.
    """
    if optimizer.split_over is not None:
        raise ConfigError(
            "selecting by gradients needs each gradient as a whole, and the strategy splits them over devices: use a "
            "single device or DDP, or criterion=lift"
        )
    sums = {
        name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p, _ in optimizer.sparse_parameters()
    }

    def adder(total: Tensor) -> Callable[[nn.Parameter], None]:
        def add(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            found = parameter.grad.detach().float()
            total.add_(found if power == 1 else found.square())
            parameter.grad = None

        return add

    used = 0
    hooked = optimizer.hooks_attached
    optimizer.zero_grad()
    optimizer.remove_hooks()
    try:
        with ExitStack() as stack, torch.enable_grad():
            for name, parameter, _ in optimizer.sparse_parameters():
                stack.callback(parameter.register_post_accumulate_grad_hook(adder(sums[name])).remove)
            for batch in batches:
                loss_of(batch).backward()
                used += 1
    finally:
        optimizer.zero_grad()
        if hooked:
            optimizer.attach_hooks()
    if not used:
        raise ConfigError("selecting by gradients needs at least one batch, and there is none")
    if ranks is not None:
        for total in sums.values():
            ranks.sum_(total)
    return sums


def drawn_batches(loader: Any, count: int, seed: int) -> list[Any]:
    """As many batches of a loader's data, drawn by a seed of its own: the loader's order and random state stay.

    All of them, where there are fewer.

    Raises:
        ConfigError: if the loader has no dataset with a length to draw from.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"selecting by gradients draws batches from a DataLoader whose dataset has a length, not from "
            f"{type(loader).__name__}: use criterion=lift, or a map-style dataset"
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    mine = DataLoader(dataset, batch_size=size, sampler=sampler, collate_fn=loader.collate_fn, drop_last=False)
    return [batch for _, batch in zip(range(count), mine, strict=False)]
