"""Which entries of a weight matrix are trained: the criteria of selection, their budget, and blocks.

Letters: M, N rows and columns of one matrix; E matrices in a batch (fused experts); K selected entries of one matrix;
R rank of the low-rank approximation; r budget rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lift_lightning.criteria import CRITERIA, Scores
from lift_lightning.errors import ConfigError
from lift_lightning.indices import rows_at_a_time, top_k_indices, top_k_of_parts
from lift_lightning.lowrank import float32_products
from lift_lightning.selection_config import SelectionConfig

__all__ = ["Selected", "Selection", "SelectionConfig", "Solved", "select", "select_indices", "select_matrices"]


class Solved(NamedTuple):
    """How a matrix was decomposed: by which solver, and with what error it says (see `LowRankFactors`)."""

    solver: str
    error: float


class Selection(NamedTuple):
    """What `select` returns.

    Attributes:
        indices: (K,) int64 flat indices into the weight, ascending; for a batch of E matrices the sum of their K.
        basis: to hand to the next `select` on the same weight, None where the solver keeps none.
        solved: one for each matrix that was decomposed.
    """

    indices: Tensor
    basis: Tensor | None
    solved: tuple[Solved, ...] = ()


def select(
    weight: Tensor,
    config: SelectionConfig,
    *,
    basis: Tensor | None = None,
    statistics: Tensor | None = None,
    kept: Tensor | None = None,
) -> Selection:
    """Choose the entries of one weight.

    Args:
        weight: (M, N), or (E, M, N) for a batch of matrices with a budget of K each; any strides, any floating dtype.
            The computation runs on its device. Beside the weight there are the factors, one block of scores and, for
            the exact solver, a square of the shorter side in float64 or, for the subspace solver, a float32 copy of a
            weight of another dtype and, where it saves products, that square in float32.
        config: criterion and budget.
        basis: from the last call on this weight.
        statistics: of the weight's shape, for the criteria `gradient` and `movement`: the gradient summed over batches,
            or the sum of its squares (see `gradients.gradient_statistics`).
        kept: bool, of the weight's shape: entries that are selected whatever their score, before any others.

    Raises:
        ConfigError: if the block does not divide the weight.
        ValueError: if the weight is neither 2-D nor 3-D, or the criterion lacks its statistics.
        DecompositionError: if the weight holds NaN or infinity, or the solver does not converge.
    """
    weight = weight.detach()
    if weight.ndim == 2:
        scores = CRITERIA[config.criterion](weight, config, basis, statistics)
        with float32_products(weight.device):
            indices = _choose(scores, weight, config, kept)
        if scores.factors is None:
            return Selection(indices, None)
        return Selection(indices, scores.factors.basis, (Solved(scores.factors.solver, scores.factors.error),))
    if weight.ndim != 3:
        raise ValueError(f"a weight to select from is (M, N) or (E, M, N), got shape {tuple(weight.shape)}")
    entries = weight.shape[1] * weight.shape[2]
    parts = [
        select(
            matrix,
            replace(config, seed=config.seed + e, count=_share(config.count, e, len(weight))),
            basis=None if basis is None else basis[e],
            statistics=None if statistics is None else statistics[e],
            kept=None if kept is None else kept[e],
        )
        for e, matrix in enumerate(weight)
    ]
    indices = torch.cat([part.indices + e * entries for e, part in enumerate(parts)])
    bases = [part.basis for part in parts if part.basis is not None]
    # Where one of them has none, all start cold.
    stacked = torch.stack(bases) if len(bases) == len(parts) else None
    return Selection(indices, stacked, tuple(solved for part in parts for solved in part.solved))


def _share(count: int | None, place: int, matrices: int) -> int | None:
    """Of a count over matrices of one size; the first have what is left over."""
    return None if count is None else count // matrices + (place < count % matrices)


def select_indices(weight: Tensor, config: SelectionConfig) -> Tensor:
    """`select(weight, config).indices`: (K,) int64, ascending flat indices on the weight's device."""
    return select(weight, config).indices


class Selected(NamedTuple):
    """What `select_matrices` returns; `bases` has one for each matrix."""

    indices: Tensor
    bases: list[Tensor | None]
    solved: tuple[Solved, ...]


def select_matrices(
    parameter: Tensor,
    matrices: list[Tensor],
    config: SelectionConfig | Sequence[SelectionConfig],
    *,
    basis: list[Tensor | None] | None = None,
    copies: Iterator[Tensor] | None = None,
    statistics: Sequence[Tensor] | None = None,
    kept: Sequence[Tensor] | None = None,
) -> Selected:
    """Choose from a parameter that holds one or several matrices, each with a budget of its own.

    Args:
        parameter: contiguous, any shape.
        matrices: (M, N) views of the parameter's memory, of any strides (see `param_groups.matrix_views`).
        config: criterion and budget of each matrix, or of all of them; the seed counts up then.
        basis: one per matrix, from the last call on this parameter.
        copies: the same matrices on the device where the computation should run, in order (see `threads.on_device`);
            one is taken for each of `matrices`. If not given it runs on the parameter's own.
        statistics: one per matrix, as for `select`, on any device.
        kept: one per matrix, likewise.

    Returns:
        Ascending flat int64 indices into the parameter, on its device; the basis of each matrix, for the next call; how
        each was decomposed.

    Raises:
        ValueError, DecompositionError: as `select`.
    """
    if isinstance(config, SelectionConfig):
        config = [replace(config, seed=config.seed + i) for i in range(len(matrices))]
    found: list[Tensor] = []
    bases: list[Tensor | None] = []
    solved: list[Solved] = []
    for i, view in enumerate(matrices):
        matrix = view if copies is None else next(copies)
        part = select(
            matrix,
            config[i],
            basis=basis[i] if basis else None,
            statistics=None if statistics is None else statistics[i].to(matrix.device),
            kept=None if kept is None else kept[i].to(matrix.device),
        )
        indices = part.indices.to(parameter.device)
        row, column = indices // view.shape[1], indices % view.shape[1]
        start = int(view.storage_offset()) - int(parameter.storage_offset())
        found.append(row * view.stride(0) + column * view.stride(1) + start)
        bases.append(part.basis)
        solved += part.solved
    return Selected(found[0] if len(found) == 1 else torch.cat(found).sort().values, bases, tuple(solved))


def _choose(scores: Scores, weight: Tensor, config: SelectionConfig, kept: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    k = config.budget(rows, columns)
    largest = config.keep == "largest"
    first = math.inf if largest else -math.inf
    if config.block is None:
        part = scores.part
        if kept is not None:
            part = lambda where: scores.part(where).masked_fill(kept[where], first)  # noqa: E731
        return top_k_of_parts(part, (rows, columns), k, weight.device, largest=largest)
    high, wide = (side if size == -1 else size for size, side in zip(config.block, (rows, columns), strict=True))
    if rows % high or columns % wide:
        raise ConfigError(f"blocks of {high}x{wide} do not divide a {rows}x{columns} matrix")
    per_block = _block_scores(scores, (rows, columns), (high, wide), weight.device)
    if kept is not None:
        whole = kept.view(rows // high, high, columns // wide, wide).any(dim=3).any(dim=1)
        per_block = per_block.masked_fill(whole, first)
    blocks = top_k_indices(per_block, max(1, k // (high * wide)), largest=largest)
    corner = blocks // (columns // wide) * high * columns + blocks % (columns // wide) * wide
    within = torch.arange(high, device=weight.device)[:, None] * columns + torch.arange(wide, device=weight.device)
    return (corner[:, None] + within.reshape(-1)).reshape(-1).sort().values


def _block_scores(scores: Scores, shape: tuple[int, int], block: tuple[int, int], device: torch.device) -> Tensor:
    """(M / b, N / c) float64; some rows of the entries' scores exist at a time, and blocks may be higher than that."""
    (rows, columns), (high, wide) = shape, block
    sums = torch.zeros(rows // high, columns // wide, dtype=torch.float64, device=device)
    step = rows_at_a_time(columns, device)
    for start in range(0, rows, step):
        part = scores.part((slice(start, min(start + step, rows)), slice(None))).double()
        across = (part if scores.additive else part.square()).view(part.shape[0], columns // wide, wide).sum(dim=2)
        sums.index_add_(0, torch.arange(start, start + part.shape[0], device=device) // high, across)
    return sums
