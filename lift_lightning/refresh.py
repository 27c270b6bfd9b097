"""One refresh: select anew for every sparse parameter of an optimizer, one matrix at a time."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lift_lightning.indices import locate
from lift_lightning.lowrank import DecompositionError
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import matrix_views
from lift_lightning.selection import SelectionConfig, select_matrices

Bases = dict[str, list[Tensor | None]]


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did.

    Attributes:
        seconds: wall time.
        selected: entries selected, over all parameters.
        entries: entries that the sparse parameters have.
        overlap: share of the new selection that was selected before; None at the first.
        unreduced: matrices whose shorter side is no larger than the rank of the approximation, so that `lift` picked
            by plain magnitude.
        bases: of the solver, by parameter name, for the next refresh.
    """

    seconds: float
    selected: int
    entries: int
    overlap: float | None
    unreduced: int
    bases: Bases = field(repr=False)

    @property
    def density(self) -> float:
        """Selected share of the sparse parameters' entries."""
        return self.selected / self.entries


@torch.no_grad()
def refresh_masks(
    optimizer: SparseAdamW,
    config: SelectionConfig,
    *,
    device: torch.device | str | None = None,
    bases: Bases | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> RefreshReport:
    """Select for every sparse parameter and hand the indices to the optimizer.

    Args:
        optimizer: its sparse groups are selected for; to be called between steps.
        config: criterion and budget; `density_of` must be `targets` (see `SelectionConfig.of_targets`).
        device: where the decompositions run; each parameter's own if not given.
        bases: from the last report.
        progress: wraps the list of parameters, such as tqdm or `rich.progress.track`.

    Raises:
        DecompositionError: naming the parameter whose weights are not finite or did not decompose. Parameters before
            it have their new selection, the others their old one.
    """
    started = time.perf_counter()
    selected = entries = stayed = before = unreduced = 0
    found: Bases = {}
    for name, parameter, group in progress(list(optimizer.sparse_parameters())):
        views = matrix_views(parameter, group["halves"])
        unreduced += sum(config.approximation_rank >= min(view.shape) for view in views)
        # The seed goes by name, or matrices of one shape would all get the same random mask.
        own = replace(config, seed=config.seed + zlib.crc32(name.encode()))
        try:
            indices, found[name] = select_matrices(parameter, views, own, basis=(bases or {}).get(name), device=device)
        except DecompositionError as error:
            raise DecompositionError(f"cannot select entries of {name!r}: {error}") from error
        if optimizer.is_selected(parameter):
            old = optimizer.indices(parameter)
            stayed += int(locate(old, indices.to(old.dtype))[1].sum())
            before += old.numel()
        optimizer.set_indices(parameter, indices)
        selected += indices.numel()
        entries += parameter.numel()
    overlap = stayed / selected if before else None
    seconds = time.perf_counter() - started
    return RefreshReport(seconds, selected, entries, overlap, unreduced if config.criterion == "lift" else 0, found)
