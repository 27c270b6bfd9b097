"""Which entries of a weight matrix are trained: the criteria of selection, their budget, and blocks.

Letters: M, N rows and columns of one matrix; E matrices in a batch (fused experts); K selected entries of one matrix;
R rank of the low-rank approximation; r budget rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lift_lightning.errors import ConfigError
from lift_lightning.indices import top_k_indices
from lift_lightning.lowrank import Solver, check_finite, low_rank_factors

Criterion = Literal["lift", "magnitude", "random"]
Keep = Literal["largest", "smallest"]
DensityOf = Literal["targets", "model"]

DEFAULT_RANK = 128  # the paper's budget for most of its experiments

# Entries of the score matrix that are computed in float64 at one time.
_SCORE_BLOCK_ENTRIES = 2**22


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
        solver: how the approximation is computed, see `low_rank_factors`.
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


class Selection(NamedTuple):
    """What `select` returns.

    Attributes:
        indices: (K,) int64 flat indices into the weight, ascending; for a batch of E matrices the sum of their K.
        basis: to hand to the next `select` on the same weight, None where the solver keeps none.
    """

    indices: Tensor
    basis: Tensor | None


class Scores(NamedTuple):
    """(M, N) float32 scores, none of them NaN, and the basis of the solver."""

    values: Tensor
    basis: Tensor | None


def select(
    weight: Tensor, config: SelectionConfig, *, basis: Tensor | None = None, statistics: Any | None = None
) -> Selection:
    """Choose the entries of one weight.

    Args:
        weight: (M, N), or (E, M, N) for a batch of matrices with a budget of K each; any strides, any floating dtype.
            The computation runs on its device, in float64 on blocks, with one float32 matrix of scores.
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
        return Selection(_choose(scores.values, config), scores.basis)
    if weight.ndim != 3:
        raise ValueError(f"a weight to select from is (M, N) or (E, M, N), got shape {tuple(weight.shape)}")
    entries = weight.shape[1] * weight.shape[2]
    parts = [
        select(matrix, replace(config, seed=config.seed + e), basis=None if basis is None else basis[e])
        for e, matrix in enumerate(weight)
    ]
    indices = torch.cat([part.indices + e * entries for e, part in enumerate(parts)])
    bases = [part.basis for part in parts if part.basis is not None]
    return Selection(indices, torch.stack(bases) if bases else None)


def select_indices(weight: Tensor, config: SelectionConfig) -> Tensor:
    """`select(weight, config).indices`: (K,) int64, ascending flat indices on the weight's device."""
    return select(weight, config).indices


def select_matrices(
    parameter: Tensor,
    matrices: list[Tensor],
    config: SelectionConfig,
    *,
    basis: list[Tensor | None] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Choose from a parameter that holds one or several matrices, each with a budget of its own.

    Args:
        parameter: contiguous, any shape.
        matrices: (M, N) views of the parameter's memory, of any strides (see `param_groups.matrix_views`).
        config: criterion and budget.
        basis: one per matrix, from the last call on this parameter.
        device: where the computation runs, one matrix at a time; the parameter's own if not given.

    Returns:
        Ascending flat int64 indices into the parameter, on its device, and the bases for the next call.

    Raises:
        ValueError, DecompositionError: as `select`.
    """
    found: list[Tensor] = []
    bases: list[Tensor | None] = []
    for i, view in enumerate(matrices):
        part = select(
            view.to(device) if device is not None else view,
            replace(config, seed=config.seed + i),
            basis=basis[i] if basis else None,
        )
        indices = part.indices.to(parameter.device)
        row, column = indices // view.shape[1], indices % view.shape[1]
        start = int(view.storage_offset()) - int(parameter.storage_offset())
        found.append(row * view.stride(0) + column * view.stride(1) + start)
        bases.append(part.basis)
    return (found[0] if len(found) == 1 else torch.cat(found).sort().values), bases


def _lift_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Any | None) -> Scores:
    """|W'| for W' the best rank-R approximation of W (paper, Algorithm 1)."""
    if config.approximation_rank >= min(weight.shape):
        return _magnitude_scores(weight, config, basis, statistics)
    factors = low_rank_factors(weight, config.approximation_rank, solver=config.solver, basis=basis)
    scores = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    # The products are summed in float64 and rounded once, so that a score is off by no more than float32's half unit.
    step = max(1, _SCORE_BLOCK_ENTRIES // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        scores[start : start + step] = (factors.left[start : start + step] @ factors.right).abs_()
    return Scores(scores, factors.basis)


def _magnitude_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Any | None) -> Scores:
    check_finite(weight)
    return Scores(weight.float().abs(), None)


def _random_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Any | None) -> Scores:
    # Drawn on the CPU, so that every device gets the same mask from the same seed.
    generator = torch.Generator().manual_seed(config.seed)
    return Scores(torch.rand(weight.shape, generator=generator).to(weight.device), None)


CRITERIA: dict[str, Callable[[Tensor, SelectionConfig, Tensor | None, Any | None], Scores]] = {
    "lift": _lift_scores,
    "magnitude": _magnitude_scores,
    "random": _random_scores,
}


def _choose(scores: Tensor, config: SelectionConfig) -> Tensor:
    rows, columns = scores.shape
    k = config.budget(rows, columns)
    largest = config.keep == "largest"
    if config.block is None:
        return top_k_indices(scores, k, largest=largest)
    high, wide = config.block
    if rows % high or columns % wide:
        raise ConfigError(f"blocks of {high}x{wide} do not divide a {rows}x{columns} matrix")
    per_block = scores.double().square().view(rows // high, high, columns // wide, wide).sum(dim=(1, 3))
    blocks = top_k_indices(per_block, max(1, k // math.prod(config.block)), largest=largest)
    corner = blocks // (columns // wide) * high * columns + blocks % (columns // wide) * wide
    within = torch.arange(high, device=scores.device)[:, None] * columns + torch.arange(wide, device=scores.device)
    return (corner[:, None] + within.reshape(-1)).reshape(-1).sort().values
