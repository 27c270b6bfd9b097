"""Selections looked at: what two have in common, what of a matrix they hold, and where in it they lie.

Letters: M, N rows and columns of one matrix; K selected entries.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lift_lightning.lowrank import low_rank_factors
from lift_lightning.selection_config import SelectionConfig

# Bins of log2 |W'|: the threshold of a ranking over matrices is found to within a hundredth of an octave.
_BINS_PER_OCTAVE, _LOWEST, _HIGHEST = 100, -60, 20


def overlap(one: Tensor, other: Tensor) -> float:
    """Share of the first selection's entries that the second has as well.

    Args:
        one: (K,) flat indices without repeats, not empty.
        other: (K',) likewise.
    """
    return float(torch.isin(one, other).double().mean())


def share_in_busiest(indices: Tensor, shape: tuple[int, int], axis: int, share: float = 0.1) -> float:
    """Share of the selected entries that lie in the busiest tenth of the rows (axis 0) or columns (axis 1).

    A tenth of them where the entries are spread evenly.

    Args:
        indices: (K,) flat indices into an (M, N) matrix, not empty.
        shape: (M, N).
        axis: 0 for rows, 1 for columns.
        share: of the rows or columns that are counted, at least one.
    """
    lines = indices // shape[1] if axis == 0 else indices % shape[1]
    counts = lines.bincount(minlength=shape[axis]).sort(descending=True).values
    return float(counts[: max(1, round(share * shape[axis]))].sum() / indices.numel())


class GlobalRanking:
    """How many entries of each matrix are among the best of all matrices together.

    One matrix at a time gives a histogram of its scores, |W'| after the rank-R approximation; the threshold that lets
    the asked share of all entries pass is read from their sum.
    """

    def __init__(self, config: SelectionConfig) -> None:
        self.config = config
        self._counts: list[Tensor] = []

    def add(self, weight: Tensor) -> None:
        """Score one matrix."""
        if self.config.criterion == "lift" and self.config.approximation_rank < min(weight.shape):
            factors = low_rank_factors(weight, self.config.approximation_rank, solver=self.config.solver)
            scores = (factors.left @ factors.right).abs().float()
        else:
            scores = weight.abs()
        octaves = scores.clamp(min=2.0**_LOWEST, max=2.0**_HIGHEST * 0.999).log2().sub(_LOWEST)
        bins = (octaves * _BINS_PER_OCTAVE).long().flatten()
        self._counts.append(bins.bincount(minlength=(_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE).cpu())

    def shares(self, density: float) -> list[float]:
        """Of each matrix, in order: the share of its entries above the threshold that lets `density` of all pass."""
        above = torch.stack(self._counts).flip(1).cumsum(1).double()
        wanted = density * above[:, -1].sum()
        place = int((above.sum(0) >= wanted).to(torch.uint8).argmax())
        before = above[:, place - 1] if place else torch.zeros(len(above), dtype=above.dtype)
        # Of the bin that holds the threshold every matrix has the same part.
        part = (wanted - before.sum()) / (above[:, place] - before).sum()
        chosen = before + part * (above[:, place] - before)
        return [float(share) for share in chosen / above[:, -1]]


def replaced(selections: Iterable[Tensor]) -> list[float]:
    """Mask churn: of each selection but the first, the share of entries that the one before did not have."""
    found, before = [], None
    for indices in selections:
        if before is not None:
            found.append(1 - overlap(indices, before))
        before = indices
    return found
