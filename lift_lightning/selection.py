"""Which entries of a weight matrix are trained: the criteria of selection, their budget, and blocks.

Letters: M, N rows and columns of one matrix; E matrices in a batch (fused experts); K selected entries of one matrix;
R rank of the low-rank approximation; r budget rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lift_lightning.errors import ConfigError
from lift_lightning.indices import Part, rows_at_a_time, top_k_indices, top_k_of_parts
from lift_lightning.lowrank import (
    DEFAULT_TOLERANCE,
    LowRankFactors,
    Solver,
    check_finite,
    float32_products,
    low_rank_factors,
)

Criterion = Literal["lift", "magnitude", "random"]
Keep = Literal["largest", "smallest"]
DensityOf = Literal["targets", "model"]

DEFAULT_RANK = 128  # the paper's budget for most of its experiments


@dataclass(frozen=True)
class SelectionConfig:
    """How the entries of each targeted matrix are chosen and how many there are.

    Args:
        criterion: `lift` scores an entry by its magnitude after the rank-R approximation (paper, Algorithm 1),
            `magnitude` by its own magnitude, `random` by chance.
        rank: r, the budget of each matrix as a LoRA rank: K = min(r * (M + N), M * N). 128 if neither this nor
            `density` is given.
        density: the budget as a share of the entries instead, above 0 and up to 1.
        density_of: whose entries `density` is a share of: the targeted matrices', or the whole model's.
        lra_rank: R, the rank of the approximation. The same as `rank` if not given (paper, App. G.8: R near r works
            best), 128 with `density`. R of min(M, N) or more means the matrix itself, so plain magnitude.
        keep: `largest` is the paper's method; `smallest` reproduces the entries that the released code picks.
        solver: how the approximation is computed: `exact`, `subspace`, or `auto`, which chooses by size; see
            `low_rank_factors`.
        tolerance: of the subspace solver, about the share of the mask that may differ from the exact one.
        block: (b, c) selects whole blocks of b rows and c columns (LIFT_Structured, App. G.7), scored by the sum of
            squares; K is rounded down to whole blocks, at least one.
        seed: of the `random` criterion.

    Raises:
        ConfigError: if a value is out of its range, or `rank` and `density` are both given.
    """

    criterion: Criterion = "lift"
    rank: int | None = None
    density: float | None = None
    density_of: DensityOf = "targets"
    lra_rank: int | None = None
    keep: Keep = "largest"
    solver: Solver = "auto"
    tolerance: float = DEFAULT_TOLERANCE
    block: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.density is not None:
            raise ConfigError(
                f"rank={self.rank} and density={self.density} both set the budget: give one and leave the other null"
            )
        for name, value in (("rank", self.rank), ("lra_rank", self.lra_rank)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density must be above 0 and at most 1, got {self.density}")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance must be above 0 and below 1, got {self.tolerance}")
        if self.density_of == "model" and self.density is None:
            raise ConfigError("density_of='model' needs a density")
        for name, choices in (("criterion", Criterion), ("keep", Keep), ("solver", Solver), ("density_of", DensityOf)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ConfigError(f"block must be two positive sizes, rows and columns, got {self.block}")

    @property
    def approximation_rank(self) -> int:
        """R, with its default filled in."""
        return self.lra_rank or self.rank or DEFAULT_RANK

    def budget(self, rows: int, columns: int) -> int:
        """K for an M x N matrix, before it is rounded to blocks.

        Raises:
            ValueError: if the density is still a share of the whole model; see `of_targets`.
        """
        if self.density is None:
            return min((self.rank or DEFAULT_RANK) * (rows + columns), rows * columns)
        if self.density_of == "model":
            raise ValueError(
                "a density of the model's entries must be turned into one of the targets': call of_targets"
            )
        return max(1, min(round(self.density * rows * columns), rows * columns))

    def of_targets(self, target_entries: int, model_entries: int) -> SelectionConfig:
        """The same budget with `density` counted over the targeted matrices, as `select` needs it.

        Raises:
            ConfigError: if the share of the model is more than the targeted matrices hold.
        """
        if self.density is None or self.density_of == "targets":
            return self
        density = self.density * model_entries / target_entries
        if density > 1:
            raise ConfigError(
                f"density={self.density} of the model's {model_entries} entries is more than the {target_entries} that "
                f"the targeted matrices hold; the most is {target_entries / model_entries:.4f}"
            )
        return replace(self, density=density, density_of="targets")


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


class Scores(NamedTuple):
    """The (M, N) scores of a matrix, made part by part.

    Attributes:
        part: (slice of rows, slice of columns) -> the float32 scores there, none of them NaN.
        factors: of the low-rank approximation, where there is one.
    """

    part: Part
    factors: LowRankFactors | None = None


def select(
    weight: Tensor, config: SelectionConfig, *, basis: Tensor | None = None, statistics: Any | None = None
) -> Selection:
    """Choose the entries of one weight.

    Args:
        weight: (M, N), or (E, M, N) for a batch of matrices with a budget of K each; any strides, any floating dtype.
            The computation runs on its device. Beside the weight there are the factors, one block of scores and, for
            the exact solver, a square of the shorter side in float64 or, for the subspace solver, a float32 copy of a
            weight of another dtype and, where it saves products, that square in float32.
        config: criterion and budget.
        basis: from the last call on this weight.
        statistics: what a criterion needs beyond the weight; none of today's needs any.

    Raises:
        ValueError: if the weight is neither 2-D nor 3-D, or the block does not divide it.
        DecompositionError: if the weight holds NaN or infinity, or the solver does not converge.
    """
    weight = weight.detach()
    if weight.ndim == 2:
        scores = CRITERIA[config.criterion](weight, config, basis, statistics)
        with float32_products(weight.device):
            indices = _choose(scores, weight, config)
        if scores.factors is None:
            return Selection(indices, None)
        return Selection(indices, scores.factors.basis, (Solved(scores.factors.solver, scores.factors.error),))
    if weight.ndim != 3:
        raise ValueError(f"a weight to select from is (M, N) or (E, M, N), got shape {tuple(weight.shape)}")
    entries = weight.shape[1] * weight.shape[2]
    parts = [
        select(matrix, replace(config, seed=config.seed + e), basis=None if basis is None else basis[e])
        for e, matrix in enumerate(weight)
    ]
    indices = torch.cat([part.indices + e * entries for e, part in enumerate(parts)])
    bases = [part.basis for part in parts if part.basis is not None]
    # Where one of them has none, all start cold.
    stacked = torch.stack(bases) if len(bases) == len(parts) else None
    return Selection(indices, stacked, tuple(solved for part in parts for solved in part.solved))


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
    config: SelectionConfig,
    *,
    basis: list[Tensor | None] | None = None,
    copies: Iterator[Tensor] | None = None,
) -> Selected:
    """Choose from a parameter that holds one or several matrices, each with a budget of its own.

    Args:
        parameter: contiguous, any shape.
        matrices: (M, N) views of the parameter's memory, of any strides (see `param_groups.matrix_views`).
        config: criterion and budget.
        basis: one per matrix, from the last call on this parameter.
        copies: the same matrices on the device where the computation should run, in order (see `threads.on_device`);
            one is taken for each of `matrices`. If not given it runs on the parameter's own.

    Returns:
        Ascending flat int64 indices into the parameter, on its device; the basis of each matrix, for the next call; how
        each was decomposed.

    Raises:
        ValueError, DecompositionError: as `select`.
    """
    found: list[Tensor] = []
    bases: list[Tensor | None] = []
    solved: list[Solved] = []
    for i, view in enumerate(matrices):
        part = select(
            view if copies is None else next(copies),
            replace(config, seed=config.seed + i),
            basis=basis[i] if basis else None,
        )
        indices = part.indices.to(parameter.device)
        row, column = indices // view.shape[1], indices % view.shape[1]
        start = int(view.storage_offset()) - int(parameter.storage_offset())
        found.append(row * view.stride(0) + column * view.stride(1) + start)
        bases.append(part.basis)
        solved += part.solved
    return Selected(found[0] if len(found) == 1 else torch.cat(found).sort().values, bases, tuple(solved))


def _lift_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Any | None) -> Scores:
    """|W'| for W' the best rank-R approximation of W (paper, Algorithm 1)."""
    if config.approximation_rank >= min(weight.shape):
        return _magnitude_scores(weight, config, basis, statistics)
    factors = low_rank_factors(
        weight, config.approximation_rank, solver=config.solver, basis=basis, tolerance=config.tolerance
    )
    # In the factors' own precision, and rounded once.
    return Scores(lambda part: (factors.left[part[0]] @ factors.right[:, part[1]]).abs_().float(), factors)


def _magnitude_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Any | None) -> Scores:
    check_finite(weight)
    return Scores(lambda part: weight[part].float().abs())


def _random_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Any | None) -> Scores:
    # Drawn on the CPU, so that every device gets the same mask from the same seed.
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(config.seed), dtype=torch.float32)
    return Scores(lambda part: drawn[part].to(weight.device))


CRITERIA: dict[str, Callable[[Tensor, SelectionConfig, Tensor | None, Any | None], Scores]] = {
    "lift": _lift_scores,
    "magnitude": _magnitude_scores,
    "random": _random_scores,
}


def _choose(scores: Scores, weight: Tensor, config: SelectionConfig) -> Tensor:
    rows, columns = weight.shape
    k = config.budget(rows, columns)
    largest = config.keep == "largest"
    if config.block is None:
        return top_k_of_parts(scores.part, (rows, columns), k, weight.device, largest=largest)
    high, wide = config.block
    if rows % high or columns % wide:
        raise ConfigError(f"blocks of {high}x{wide} do not divide a {rows}x{columns} matrix")
    step = high * rows_at_a_time(high * columns, weight.device)
    parts = [scores.part((slice(start, min(start + step, rows)), slice(None))) for start in range(0, rows, step)]
    per_block = torch.cat(
        [p.double().square().view(p.shape[0] // high, high, columns // wide, wide).sum(dim=(1, 3)) for p in parts]
    )
    blocks = top_k_indices(per_block, max(1, k // math.prod(config.block)), largest=largest)
    corner = blocks // (columns // wide) * high * columns + blocks % (columns // wide) * wide
    within = torch.arange(high, device=weight.device)[:, None] * columns + torch.arange(wide, device=weight.device)
    return (corner[:, None] + within.reshape(-1)).reshape(-1).sort().values
