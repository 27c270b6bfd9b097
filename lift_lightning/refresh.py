"""One refresh: select anew for every sparse parameter of an optimizer, one matrix at a time.

Where several ranks train the model each matrix is decomposed by one of them, which hands the indices out: all at once,
each on another matrix, and all with the same selection.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lift_lightning.allocation import Share, with_share
from lift_lightning.errors import ConfigError
from lift_lightning.gradients import Statistics
from lift_lightning.indices import slice_for_shard
from lift_lightning.lowrank import DecompositionError, float32_products
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import Halves, matrix_views
from lift_lightning.plan import Unit, assign, turns, units_of
from lift_lightning.selection import Selected, SelectionConfig, Solved, select_matrices
from lift_lightning.sharding import Owned, Ranks, local, owned, ranks_of
from lift_lightning.shares import SPLIT, Shares, own_config, shape_of
from lift_lightning.subspace import BASIS_DTYPE
from lift_lightning.threads import on_device, one_thread, one_thread_each

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
        imbalance: entries selected on the rank that has most, in units of the mean, where parameters are split over
            ranks; else 1.
        error: the largest error that the subspace solver estimates of its matrices (see `low_rank_factors`), about the
            share of a mask that differs from the exact one.
        bases: of the solver, by parameter name, for the next refresh; over several ranks, of the matrices that this
            one decomposed, and None for the others.
    """

    seconds: float
    selected: int
    entries: int
    overlap: float | None
    unreduced: int
    solvers: dict[str, int]
    error: float
    bases: Bases = field(repr=False)
    imbalance: float = 1.0

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
    shares: Shares | None = None,
    statistics: Statistics | None = None,
    kept: dict[str, Tensor] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> RefreshReport:
    """Select for every sparse parameter and hand the indices to the optimizer.

    In a group of processes every rank has to call this, with the same arguments, except that a rank needs the bases of
    its own matrices only. Ranks that hold whole parameters must hold the same ones.

    Args:
        optimizer: its sparse groups are selected for; to be called between steps.
        config: criterion and budget; `density_of` must be `targets` (see `SelectionConfig.of_targets`).
        device: where the decompositions run, one matrix at a time while the next is copied there; each parameter's own
            if not given.
        basis_device: where the bases wait for the next refresh; where they were made if not given. `cpu` keeps them out
            of the GPU's memory, in pinned memory.
        bases: from the last report.
        shares: what `divide_budget` found, where `config.divides` or the budget changes from selection to selection.
        statistics: what `gradient_statistics` found, for the criteria that need it.
        kept: by parameter name the flat indices of entries that are selected whatever their score, ascending.
        progress: wraps the list of parameters, such as tqdm or `rich.progress.track`.

    Raises:
        DecompositionError: naming the parameter whose weights are not finite or did not decompose. Parameters before
            it have their new selection, the others their old one. Every rank raises what one of them met.
        ConfigError: if the budget is to be divided and there are no shares, or `statistics` or `kept` are given and the
            parameters are split over ranks.
    """
    if config.divides and shares is None:
        raise ConfigError(f"count={config.count}, allocation={config.allocation}: call divide_budget first")
    if optimizer.split_over is not None and (statistics is not None or kept is not None):
        raise ConfigError(SPLIT.format(what="a selection by gradients, or one that keeps entries,"))
    started = time.perf_counter()
    parameters = list(optimizer.sparse_parameters())
    ranks = ranks_of([parameter for _, parameter, _ in parameters])
    # What is selected here, of those what was before, and what was selected before.
    selected = stayed = before = 0
    solved: list[Solved] = []
    found: Bases = {}
    jobs = [
        _Job(
            name,
            p,
            owned(p),
            group["halves"],
            (bases or {}).get(name),
            None if shares is None else shares[name],
            None if statistics is None else statistics[name],
            None if kept is None else kept[name],
        )
        for name, p, group in parameters
    ]
    select_each = _select_each(jobs, config, device) if ranks is None else _select_over(ranks, jobs, config, device)
    # Closed at once if anything below raises, so that threads and settings do not wait for the traceback to go.
    with closing(select_each) as chosen_in_turn:
        for _, (job, chosen) in zip(progress(parameters), chosen_in_turn, strict=True):
            found[job.name] = [_stored(basis, basis_device) for basis in chosen.bases]
            solved += chosen.solved
            if optimizer.is_selected(job.parameter):
                before += optimizer.indices(job.parameter).numel()
            stayed += optimizer.set_indices(job.parameter, chosen.indices)
            selected += optimizer.indices(job.parameter).numel()
    most = selected
    if ranks is not None:
        counts = ranks.objects((solved, selected, stayed, before))
        solved = [one for theirs in counts for one in theirs[0]]
        if optimizer.split_over is not None:
            most = max(theirs[1] for theirs in counts)
            selected, stayed, before = (sum(theirs[i] for theirs in counts) for i in (1, 2, 3))
    return RefreshReport(
        seconds=time.perf_counter() - started,
        selected=selected,
        entries=sum(job.owned.numel for job in jobs),
        overlap=stayed / selected if before else None,
        unreduced=sum(job.unreduced(config) for job in jobs) if config.criterion == "lift" else 0,
        solvers=dict(Counter(one.solver for one in solved)),
        error=max((one.error for one in solved), default=0.0),
        bases=found,
        imbalance=1.0 if ranks is None or not selected or most == selected else most * ranks.size / selected,
    )


def own_bases(optimizer: SparseAdamW, config: SelectionConfig, bases: Bases) -> Bases:
    """Of the bases of all matrices those that this rank will decompose at its next refresh; all in a single process."""
    parameters = list(optimizer.sparse_parameters())
    ranks = ranks_of([parameter for _, parameter, _ in parameters])
    if ranks is None:
        return bases
    mine = {
        (u.parameter, u.block)
        for u in assign(units_of([owned(p).shape for _, p, _ in parameters], config), ranks.size)[ranks.rank]
    }
    kept: Bases = {}
    for i, (name, parameter, _) in enumerate(parameters):
        theirs, shape = bases.get(name, []), owned(parameter).shape
        each = len(theirs) // (shape[0] if len(shape) == 3 else 1)
        kept[name] = [basis if (i, j // each) in mine else None for j, basis in enumerate(theirs)]
    return kept


def gathered_bases(ranks: Ranks, optimizer: SparseAdamW, bases: Bases) -> Bases:
    """On rank 0 the bases of all ranks, which each call this; elsewhere none.

    Args:
        ranks: that the refresh was split over.
        optimizer: whose parameters they are of.
        bases: of a report; each matrix has one on one rank at most.
    """
    gathered: Bases = {}
    for name, parameter, group in optimizer.sparse_parameters():
        views = matrix_views(torch.empty(owned(parameter).shape, device="meta"), group["halves"])
        mine = bases.get(name) or [None] * len(views)
        gathered[name] = []
        for view, basis in zip(views, mine, strict=True):
            flat = torch.empty(0, dtype=BASIS_DTYPE) if basis is None else basis.reshape(-1)
            found = ranks.gather(flat.to(parameter.device))
            whole = None if found is None or not found.numel() else found.view(min(view.shape), -1)
            gathered[name].append(whole)
    return gathered


@dataclass(frozen=True)
class _Job:
    """One parameter to select for."""

    name: str
    parameter: nn.Parameter
    owned: Owned
    halves: Halves | None
    bases: list[Tensor | None] | None
    shares: list[Share] | None = None
    statistics: Tensor | None = None  # in the parameter's shape
    kept: Tensor | None = None  # flat indices into it

    def select(self, config: SelectionConfig, copies: Iterator[Tensor] | None = None) -> Selected:
        """For all of it."""
        return self._select(local(self.parameter), 0, self.bases, config, copies)

    def select_block(
        self, matrix: Tensor, unit: Unit, config: SelectionConfig, device: torch.device | str | None
    ) -> Selected:
        """For one matrix of it, which is handed over whole; the indices are into the parameter."""
        each = len(matrix_views(matrix, self.halves))
        first = unit.block * each
        bases = None if self.bases is None else self.bases[first : first + each]
        copies = on_device(iter(matrix_views(matrix, self.halves)), device)
        chosen = self._select(matrix, first, bases, config, copies)
        return chosen._replace(indices=chosen.indices + unit.start)

    def matrices(self) -> int:
        """How many it has."""
        count = self.owned.shape[0] if len(self.owned.shape) == 3 else 1
        return count if self.halves is None else 2 * count

    def unreduced(self, config: SelectionConfig) -> int:
        """How many of its matrices are no larger than the rank of the approximation."""
        views = matrix_views(shape_of(self.parameter), self.halves)
        return sum(
            own.approximation_rank >= min(v.shape)
            for own, v in zip(self._configs(config, 0, len(views)), views, strict=True)
        )

    def small(self) -> bool:
        """Whether a decomposition of it is faster on one thread."""
        return self.parameter.device.type == "cpu" and self.owned.numel <= _SMALL

    def _select(
        self,
        tensor: Tensor,
        first: int,
        bases: list[Tensor | None] | None,
        config: SelectionConfig,
        copies: Iterator[Tensor] | None,
    ) -> Selected:
        views = matrix_views(tensor, self.halves)
        try:
            return select_matrices(
                tensor,
                views,
                self._configs(config, first, len(views)),
                basis=bases,
                copies=copies,
                statistics=self._views_of(self.statistics, first, len(views)),
                kept=self._views_of(self._kept_mask(), first, len(views)),
            )
        except DecompositionError as error:
            raise DecompositionError(f"cannot select entries of {self.name!r}: {error}") from error

    def _configs(self, config: SelectionConfig, first: int, count: int) -> list[SelectionConfig]:
        """One for each of its matrices from the first on."""
        own = [own_config(config, self.name, first + i) for i in range(count)]
        if self.shares is None:
            return own
        return [with_share(one, self.shares[first + i]) for i, one in enumerate(own)]

    def _views_of(self, tensor: Tensor | None, first: int, count: int) -> list[Tensor] | None:
        return None if tensor is None else matrix_views(tensor, self.halves)[first : first + count]

    def _kept_mask(self) -> Tensor | None:
        """Bool in the parameter's shape; made when it is its turn, since it has a byte for every entry."""
        if self.kept is None:
            return None
        mask = torch.zeros(self.owned.numel, dtype=torch.bool, device=self.kept.device)
        mask[self.kept.long()] = True
        return mask.view(self.owned.shape)


Chosen = Generator[tuple[_Job, Selected]]


def _select_each(jobs: list[_Job], config: SelectionConfig, device: torch.device | str | None) -> Chosen:
    """In order: small matrices on the CPU several at once, all others one by one."""
    if all(job.small() for job in jobs) and (device is None or torch.device(device).type == "cpu"):
        # Set here once: threads that set and reset it by themselves would get in each other's way.
        with float32_products(torch.device("cpu")):
            yield from zip(jobs, one_thread_each(lambda job: job.select(config), jobs), strict=True)
    else:
        matrices = (view for job in jobs for view in matrix_views(local(job.parameter), job.halves))
        copies = on_device(matrices, device)
        for job in jobs:
            yield job, job.select(config, copies)


def _select_over(ranks: Ranks, jobs: list[_Job], config: SelectionConfig, device: torch.device | str | None) -> Chosen:
    """Each as soon as its last matrix is done; of a parameter that is split the indices are those of this rank."""
    units = units_of([job.owned.shape for job in jobs], config)
    spans = ranks.objects([(job.owned.start, job.owned.stop) for job in jobs])
    parts: dict[int, list[Tensor]] = {i: [] for i in range(len(jobs))}
    bases: dict[int, list[Tensor | None]] = {i: [None] * job.matrices() for i, job in enumerate(jobs)}
    solved: dict[int, list[Solved]] = {i: [] for i in range(len(jobs))}
    missing = Counter(unit.parameter for unit in units)
    for turn in turns(units, ranks.size):
        mine = turn[ranks.rank]
        matrix = _collect(ranks, jobs, spans, turn)
        chosen, met = None, None
        if mine is not None:
            job = jobs[mine.parameter]
            try:
                with one_thread() if job.small() else nullcontext():
                    chosen = job.select_block(matrix, mine, config, device)
                each = len(chosen.bases)
                bases[mine.parameter][mine.block * each : (mine.block + 1) * each] = chosen.bases
                solved[mine.parameter] += chosen.solved
            except Exception as error:  # any: the other ranks must not wait for this one
                met = error
        del matrix
        ranks.raise_together(met)
        for unit, indices in _hand_out(ranks, jobs, spans, turn, chosen):
            parts[unit.parameter].append(indices)
            missing[unit.parameter] -= 1
            if not missing[unit.parameter]:
                i, done = unit.parameter, parts.pop(unit.parameter)
                # Blocks of a parameter may come in any order.
                indices = done[0] if len(done) == 1 else torch.cat(done).sort().values
                yield jobs[i], Selected(indices, bases.pop(i), tuple(solved.pop(i)))


Spans = list[list[tuple[int, int]]]  # by rank and parameter, which flat range is there


def _collect(ranks: Ranks, jobs: list[_Job], spans: Spans, turn: list[Unit | None]) -> Tensor:
    """The matrix that this rank works on in this turn, (M, N); empty if it has none."""
    mine = turn[ranks.rank]
    split = [unit for unit in turn if unit is not None and jobs[unit.parameter].owned.group is not None]
    # One exchange for the turn, in the dtype that holds the values of all.
    dtypes = [jobs[unit.parameter].parameter.dtype for unit in split]
    dtype = functools.reduce(torch.promote_types, dtypes) if split else torch.float32
    nothing = torch.empty(0, dtype=dtype, device=jobs[0].parameter.device)
    received = nothing
    if split:
        sent = [_slice(jobs[u.parameter], u).to(dtype) if u in split else nothing for u in turn]
        sizes = [len(_overlap(mine, theirs[mine.parameter])) if mine in split else 0 for theirs in spans]
        received = torch.cat(ranks.exchange(sent, sizes))
    if mine is None:
        return received
    job = jobs[mine.parameter]
    if job.owned.group is not None:
        return received.view(mine.shape).to(job.parameter.dtype)
    whole = local(job.parameter)
    return whole if whole.ndim == 2 else whole[mine.block]


def _slice(job: _Job, unit: Unit) -> Tensor:
    """What this rank has of a unit."""
    here = _overlap(unit, (job.owned.start, job.owned.stop))
    return local(job.parameter).reshape(-1)[here.start - job.owned.start : here.stop - job.owned.start]


def _hand_out(
    ranks: Ranks, jobs: list[_Job], spans: Spans, turn: list[Unit | None], chosen: Selected | None
) -> Iterator[tuple[Unit, Tensor]]:
    """For each unit of the turn its indices into the parameter, those that are this rank's."""
    mine = turn[ranks.rank]
    device = jobs[0].parameter.device
    if mine is None or chosen is None:
        sent = [torch.empty(0, dtype=torch.int64, device=device)] * ranks.size
    else:
        sent = [chosen.indices[slice_for_shard(chosen.indices, *theirs[mine.parameter])] for theirs in spans]
    for unit, indices in zip(turn, ranks.exchange(sent), strict=True):
        if unit is not None:
            yield unit, indices


def _overlap(unit: Unit, span: tuple[int, int]) -> range:
    """Which flat indices of a unit lie in a rank's range."""
    start, stop = max(unit.start, span[0]), min(unit.start + unit.entries, span[1])
    return range(start, max(start, stop))


def _stored(basis: Tensor | None, device: torch.device | str | None) -> Tensor | None:
    if basis is None or device is None:
        return basis
    stored = basis.to(device)
    return stored.pin_memory() if basis.is_cuda and not stored.is_cuda else stored
