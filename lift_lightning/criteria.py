"""How an entry of a weight matrix is scored: one function for each criterion, all with one contract.

Letters: M, N rows and columns of one matrix; R rank of the low-rank approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lift_lightning.indices import Part
from lift_lightning.lowrank import LowRankFactors, check_finite, low_rank_factors
from lift_lightning.selection_config import SelectionConfig


class Scores(NamedTuple):
    """The (M, N) scores of a matrix, made part by part.

    Attributes:
        part: (slice of rows, slice of columns) -> the float32 scores there, none of them NaN.
        factors: of the low-rank approximation, where there is one.
        additive: whether the score of several entries is the sum of theirs, as for squares and for scores with a sign;
            else it is the sum of the squares.
    """

    part: Part
    factors: LowRankFactors | None = None
    additive: bool = False


# (weight (M, N), settings, basis of the solver, statistics (M, N)) -> scores
CriterionFunction = Callable[[Tensor, SelectionConfig, Tensor | None, Tensor | None], Scores]


def lift_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Tensor | None) -> Scores:
    """|W'| for W' the rank-R approximation of W, the best one for the largest directions (paper, Algorithm 1)."""
    if config.approximation_rank >= min(weight.shape):
        return magnitude_scores(weight, config, basis, statistics)
    factors = low_rank_factors(
        weight,
        config.approximation_rank,
        solver=config.solver,
        basis=basis,
        tolerance=config.tolerance,
        directions=config.directions,
        seed=config.seed,
    )
    # In the factors' own precision, and rounded once.
    return Scores(lambda part: (factors.left[part[0]] @ factors.right[:, part[1]]).abs_().float(), factors)


def magnitude_scores(
    weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Tensor | None
) -> Scores:
    """|W|."""
    check_finite(weight)
    return Scores(lambda part: weight[part].float().abs())


def gradient_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Tensor | None) -> Scores:
    """|sum over batches of G| (SIFT, arXiv 2312.11875), or the sum of G^2 (FISH, arXiv 2111.09839)."""
    found = _checked(statistics, weight, config)
    return Scores(lambda part: found[part].float().abs(), additive=config.gradient_power == 2)


def movement_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Tensor | None) -> Scores:
    """-W * (sum over batches of G): positive where a step would carry the entry away from zero (arXiv 2005.07683)."""
    check_finite(weight)
    found = _checked(statistics, weight, config)
    return Scores(lambda part: -weight[part].float() * found[part].float(), additive=True)


def random_scores(weight: Tensor, config: SelectionConfig, basis: Tensor | None, statistics: Tensor | None) -> Scores:
    """Uniform numbers of the seed."""
    # Drawn on the CPU, so that every device gets the same mask from the same seed.
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(config.seed), dtype=torch.float32)
    return Scores(lambda part: drawn[part].to(weight.device))


def _checked(statistics: Tensor | None, weight: Tensor, config: SelectionConfig) -> Tensor:
    if statistics is None or statistics.shape != weight.shape:
        what = "none" if statistics is None else f"statistics of shape {tuple(statistics.shape)}"
        raise ValueError(
            f"criterion={config.criterion} needs the gradient statistics of a weight of shape {tuple(weight.shape)}, "
            f"got {what}: MaskRefreshCallback takes them, elsewhere gradient_statistics does"
        )
    check_finite(statistics)
    return statistics


CRITERIA: dict[str, CriterionFunction] = {
    "lift": lift_scores,
    "magnitude": magnitude_scores,
    "gradient": gradient_scores,
    "movement": movement_scores,
    "random": random_scores,
}
