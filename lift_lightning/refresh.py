"""One refresh: select anew for every sparse parameter of an optimizer, one matrix at a time."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lift_lightning.lowrank import DecompositionError, float32_products
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import matrix_views
from lift_lightning.selection import Selected, SelectionConfig, Solved, select_matrices
from lift_lightning.threads import on_device, one_thread_each

Bases = dict[str, list[Tensor | None]]

# Entries of a parameter up to which decompositions on the CPU run beside each other rather than one by one.
_SMALL = 2**22


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
        solvers: how many matrices each solver decomposed.
        error: the largest error that the subspace solver estimates of its matrices (see `low_rank_factors`), about the
            share of a mask that differs from the exact one.
        bases: of the solver, by parameter name, for the next refresh.
    """

    seconds: float
    selected: int
    entries: int
    overlap: float | None
    unreduced: int
    solvers: dict[str, int]
    error: float
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
    basis_device: torch.device | str | None = None,
    bases: Bases | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> RefreshReport:
    """Select for every sparse parameter and hand the indices to the optimizer.

    Args:
        optimizer: its sparse groups are selected for; to be called between steps.
        config: criterion and budget; `density_of` must be `targets` (see `SelectionConfig.of_targets`).
        device: where the decompositions run, one matrix at a time while the next is copied there; each parameter's own
            if not given.
        basis_device: where the bases wait for the next refresh; where they were made if not given. `cpu` keeps them out
            of the GPU's memory, in pinned memory.
        bases: from the last report.
        progress: wraps the list of parameters, such as tqdm or `rich.progress.track`.

    Raises:
        DecompositionError: naming the parameter whose weights are not finite or did not decompose. Parameters before
            it have their new selection, the others their old one.
    """
    started = time.perf_counter()
    selected = entries = stayed = before = unreduced = 0
    solved: list[Solved] = []
    found: Bases = {}
    parameters = list(optimizer.sparse_parameters())
    jobs = [
        _Job(name, parameter, matrix_views(parameter, group["halves"]), (bases or {}).get(name))
        for name, parameter, group in parameters
    ]
    # Closed at once if anything below raises, so that threads and settings do not wait for the traceback to go.
    with closing(_select_each(jobs, config, device)) as chosen_in_order:
        for (name, parameter, _), job, chosen in zip(progress(parameters), jobs, chosen_in_order, strict=True):
            unreduced += sum(config.approximation_rank >= min(view.shape) for view in job.matrices)
            found[name] = [_stored(basis, basis_device) for basis in chosen.bases]
            solved += chosen.solved
            if optimizer.is_selected(parameter):
                before += optimizer.indices(parameter).numel()
            stayed += optimizer.set_indices(parameter, chosen.indices)
            selected += chosen.indices.numel()
            entries += parameter.numel()
    return RefreshReport(
        seconds=time.perf_counter() - started,
        selected=selected,
        entries=entries,
        overlap=stayed / selected if before else None,
        unreduced=unreduced if config.criterion == "lift" else 0,
        solvers=dict(Counter(one.solver for one in solved)),
        error=max((one.error for one in solved), default=0.0),
        bases=found,
    )


@dataclass(frozen=True)
class _Job:
    """One parameter to select for."""

    name: str
    parameter: Tensor
    matrices: list[Tensor]
    bases: list[Tensor | None] | None

    def select(self, config: SelectionConfig, copies: Iterator[Tensor] | None = None) -> Selected:
        # The seed goes by name, or matrices of one shape would all get the same random mask.
        own = replace(config, seed=config.seed + zlib.crc32(self.name.encode()))
        try:
            return select_matrices(self.parameter, self.matrices, own, basis=self.bases, copies=copies)
        except DecompositionError as error:
            raise DecompositionError(f"cannot select entries of {self.name!r}: {error}") from error


def _select_each(jobs: list[_Job], config: SelectionConfig, device: torch.device | str | None) -> Generator[Selected]:
    """In order: small matrices on the CPU several at once, all others one by one."""
    small = all(job.parameter.device.type == "cpu" and job.parameter.numel() <= _SMALL for job in jobs)
    if small and (device is None or torch.device(device).type == "cpu"):
        # Set here once: threads that set and reset it by themselves would get in each other's way.
        with float32_products(torch.device("cpu")):
            yield from one_thread_each(lambda job: job.select(config), jobs)
    else:
        copies = on_device((matrix for job in jobs for matrix in job.matrices), device)
        for job in jobs:
            yield job.select(config, copies)


def _stored(basis: Tensor | None, device: torch.device | str | None) -> Tensor | None:
    if basis is None or device is None:
        return basis
    stored = basis.to(device)
    return stored.pin_memory() if basis.is_cuda and not stored.is_cuda else stored
