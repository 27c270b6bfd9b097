"""What `LiftLightningModule` asks where its method is an adapter: arguments, strategies, the rank of LIFT's budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lift_lightning.adapters import AdapterName, matched_rank, selected_entries, trained_entries
from lift_lightning.adapters.budget import Targets
from lift_lightning.callbacks.mask_refresh import MaskRefreshCallback
from lift_lightning.errors import ConfigError


def check_arguments(
    method: str, rank: int | None, alpha: float | None, match_budget: bool, save_base_weights: bool
) -> None:
    """Of the module, before there is a model.

    Raises:
        ConfigError: if they contradict each other or are out of range.
    """
    adapters = get_args(AdapterName)
    if method not in adapters:
        given = {"adapter_rank": rank, "adapter_alpha": alpha, "match_budget": match_budget or None}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{name}={value} is of an adapter, and method={method!r} has none: leave it out, or set method to "
                    f"one of {', '.join(adapters)}"
                )
        return
    if rank is not None and rank < 1:
        raise ConfigError(f"adapter_rank must be at least 1, got {rank}")
    if rank is not None and match_budget:
        raise ConfigError(f"adapter_rank={rank} and match_budget both set the rank: give one and leave the other out")
    if not save_base_weights:
        raise ConfigError(
            f"save_base_weights=false keeps what changed of the base, and method={method!r} adds parameters to it: "
            "leave it on, and add AdapterExport for a small folder at the end"
        )


def refuse_split_adapters(method: str, strategy: Strategy) -> None:
    """Adapters are put on a model that each process has whole.

    Raises:
        MisconfigurationException: under FSDP1 and FSDP2.
    """
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        raise MisconfigurationException(
            f"method={method!r} puts an adapter on whole matrices, and {type(strategy).__name__} splits them: set "
            "trainer.strategy to ddp, or to auto on a single device"
        )


def rank_by_budget(model: nn.Module, method: AdapterName, targets: Targets, callbacks: Sequence[pl.Callback]) -> int:
    """The largest rank at which the adapter trains no more than LIFT would, and one line that says so.

    Args:
        model: without the adapter.
        method: of the adapter.
        targets: where it goes.
        callbacks: of the Trainer; its `MaskRefreshCallback` has the budget.

    Raises:
        ConfigError: if there is no such callback, or rank 1 trains more.
    """
    found = [callback for callback in callbacks if isinstance(callback, MaskRefreshCallback)]
    if not found:
        raise ConfigError(
            "match_budget takes the budget of the Trainer's MaskRefreshCallback, and there is none: add the callback, "
            "or set adapter_rank"
        )
    model_entries = sum(parameter.numel() for parameter in model.parameters())
    budget = selected_entries(found[0].config, targets.groups, model_entries)
    rank = matched_rank(method, list(targets.shapes.values()), budget)
    count = trained_entries(method, targets.shapes.values(), rank)
    rank_zero_info(
        f"budget: LIFT would train {budget:,} entries of {len(targets.shapes)} matrices; {method} at rank {rank} "
        f"trains {count:,}, {count / budget:.1%} of it"
    )
    return rank
