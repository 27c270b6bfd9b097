"""What each matrix of an optimizer's sparse parameters gets of one budget."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lift_lightning.allocation import Profile, Share, allocate, profile
from lift_lightning.errors import ConfigError
from lift_lightning.gradients import Statistics
from lift_lightning.lowrank import DecompositionError
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import matrix_views
from lift_lightning.selection_config import SelectionConfig
from lift_lightning.sharding import local, owned, ranks_of

Shares = dict[str, list[Share]]  # by parameter name, one for each of its matrices

SPLIT = "{what} needs whole matrices, and the strategy splits them over devices: use a single device or DDP"


@torch.no_grad()
def divide_budget(
    optimizer: SparseAdamW,
    config: SelectionConfig,
    *,
    device: torch.device | str | None = None,
    statistics: Statistics | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> Shares:
    """Find what each matrix of the sparse parameters gets of the budget (see `SelectionConfig.allocation`).

    Where several ranks hold the model they all get what rank 0 found.

    Args:
        optimizer: whose sparse parameters are meant.
        config: budget and allocation; `density_of` must be `targets`.
        device: where spectra and scores are computed, one matrix at a time; each parameter's own if not given.
        statistics: for the criteria that need them.
        progress: wraps the list of parameters.

    Raises:
        ConfigError: if the budget is more than there is, or the matrices must be looked at and are split over ranks.
        DecompositionError: naming the parameter that does not decompose.
    """
    parameters = list(optimizer.sparse_parameters())
    looks = config.allocation != "each"
    if looks and optimizer.split_over is not None:
        raise ConfigError(SPLIT.format(what=f"allocation={config.allocation}"))
    names: list[str] = []
    profiles: list[Profile] = []
    for name, parameter, group in progress(parameters) if looks else parameters:
        views = matrix_views(local(parameter) if looks else shape_of(parameter), group["halves"])
        found = None if statistics is None else matrix_views(statistics[name], group["halves"])
        for i, view in enumerate(views):
            matrix = view if device is None or not looks else view.to(device)
            try:
                profiles.append(
                    profile(
                        matrix,
                        own_config(config, name, i),
                        statistics=None if found is None else found[i].to(matrix.device),
                    )
                )
            except DecompositionError as error:
                raise DecompositionError(f"cannot select entries of {name!r}: {error}") from error
            names.append(name)
    shares: Shares = {}
    for name, share in zip(names, allocate(profiles, config), strict=True):
        shares.setdefault(name, []).append(share)
    ranks = ranks_of([parameter for _, parameter, _ in parameters])
    return shares if ranks is None else dict(ranks.objects(shares)[0])


def shape_of(parameter: Tensor) -> Tensor:
    """Its whole shape, without memory."""
    return torch.empty(owned(parameter).shape, device="meta")


def own_config(config: SelectionConfig, name: str, place: int) -> SelectionConfig:
    """Of one matrix: the seed goes by name, or matrices of one shape would all get the same random mask."""
    return replace(config, seed=config.seed + zlib.crc32(name.encode()) + place)
