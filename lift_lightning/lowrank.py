"""Rank-R approximation of one matrix.

Letters: M, N rows and columns of the matrix; R rank of the approximation; S = min(M, N), its shorter side.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Solver = Literal["auto", "exact"]

# Entries of the weight that are in float64 at one time.
_BLOCK_ENTRIES = 2**22


class DecompositionError(ValueError):
    """A matrix could not be decomposed: it holds NaN or infinity, or the eigensolver did not converge."""


class LowRankFactors(NamedTuple):
    """`left @ right` is the best rank-R approximation of a matrix in the Frobenius norm.

    Attributes:
        left: (M, R), float64.
        right: (R, N), float64.
        basis: what the solver wants back at its next call on the same parameter to start warm; None for `exact`.
    """

    left: Tensor
    right: Tensor
    basis: Tensor | None


def low_rank_factors(
    weight: Tensor, rank: int, *, solver: Solver = "auto", basis: Tensor | None = None
) -> LowRankFactors:
    """Factor the best rank-R approximation of a matrix (Eckart-Young), on the matrix's own device.

    The exact solver takes the eigenvectors of the Gram matrix of the shorter side, which are the singular vectors
    of that side, and projects the matrix on the leading R. It works in float64 throughout: the Gram matrix squares
    the singular values, so in float32 two of them that differ by less than about 3e-4 of the largest would mix, and
    entries near the selection threshold would change places.

    Args:
        weight: (M, N), any floating dtype; not changed.
        rank: R. Values above S mean S, and then the product is the matrix itself.
        solver: `exact`, or `auto`, which today always takes it.
        basis: a basis from an earlier call. The exact solver needs none and is a function of the matrix alone.

    Returns:
        The two factors, and the basis for the next call.

    Raises:
        ValueError: if `weight` is not a matrix, `rank` is below 1 or the solver is unknown.
        DecompositionError: if the matrix holds NaN or infinity, or the eigensolver does not converge.
    """
    if weight.ndim != 2:
        raise ValueError(f"low_rank_factors takes one matrix, got a tensor of shape {tuple(weight.shape)}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(get_args(Solver))}")
    check_finite(weight)
    return _exact(weight.detach(), min(rank, *weight.shape))


def check_finite(weight: Tensor) -> None:
    """Raise DecompositionError if any entry is NaN or infinite, saying how many."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        bad = int(finite.numel() - finite.sum())
        raise DecompositionError(
            f"{bad} of {finite.numel()} entries are NaN or infinite; training has diverged or the checkpoint is broken"
        )


def _exact(weight: Tensor, rank: int) -> LowRankFactors:
    rows, columns = weight.shape
    wide = rows <= columns
    short_side_first = weight if wide else weight.T
    # A common factor changes no eigenvector; without it the squares of very small or large weights leave the range.
    scale = weight.abs().max().double()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    try:
        _, vectors = torch.linalg.eigh(_gram(short_side_first, scale))
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(f"the eigensolver did not converge on a {rows}x{columns} matrix: {error}") from error
    leading = vectors[:, -rank:].flip(1)  # eigh sorts ascending
    # (R, L), in blocks like the Gram matrix: no float64 copy of the whole weight exists.
    blocks = short_side_first.split(max(1, _BLOCK_ENTRIES // min(rows, columns)), dim=1)
    projection = torch.cat([leading.T @ block.double() for block in blocks], dim=1)
    if wide:
        return LowRankFactors(leading, projection, None)
    return LowRankFactors(projection.T, leading.T, None)


def _gram(matrix: Tensor, scale: Tensor) -> Tensor:
    """A A^T / scale^2 in float64 for A (S, L), summed over blocks of columns."""
    side = matrix.shape[0]
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for block in matrix.split(max(1, _BLOCK_ENTRIES // side), dim=1):
        block = block.double() / scale
        gram.addmm_(block, block.T)
    return gram
