"""Figures of one matrix, or of one matrix before and after training, from their singular values and vectors.

Letters: M, N rows and columns of the matrix; S = min(M, N) singular values; k leading directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lift_lightning.lowrank import check_finite, low_rank_factors

# App. G.3: "10 x the default tolerance" of torch.linalg.matrix_rank.
RANK_TOLERANCE = 10.0
# The top eigenspace has 128 directions (App. H.1), and at most an eighth of those that a small matrix has.
DIRECTIONS, SMALLEST_PART = 128, 8


def singular_spectrum(matrix: Tensor) -> Tensor:
    """(S,) singular values in float64, descending, by torch's own SVD.

    `lowrank.singular_values` is faster and enough for choosing ranks; it takes roots of the Gram matrix's eigenvalues,
    so that what is below 1e-8 of the largest is noise there. Ranks are counted here, which asks for more.

    Args:
        matrix: (M, N), any floating dtype.

    Raises:
        DecompositionError: if it holds NaN or infinity.
    """
    check_finite(matrix)
    return torch.linalg.svdvals(matrix.detach().float()).double()


def numerical_rank(values: Tensor, shape: tuple[int, ...], tolerance: float = RANK_TOLERANCE) -> int:
    """Singular values above `tolerance` times the threshold of `torch.linalg.matrix_rank` (paper, App. G.3).

    That threshold is max(M, N) times float32's machine epsilon, of the largest value.

    Args:
        values: (S,) descending.
        shape: (M, N).
        tolerance: what to multiply the threshold by.
    """
    threshold = tolerance * max(shape) * torch.finfo(torch.float32).eps * values[0]
    return int((values > threshold).sum())


def effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli 2007); 0 of a matrix of zeros."""
    if values[0] == 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm; 0 of a matrix of zeros."""
    return float(values.square().sum() / values[0].square()) if values[0] > 0 else 0.0


def top_directions(shape: tuple[int, int], directions: int | None) -> int:
    """How many directions make the top eigenspace of a matrix: what was asked for, as far as it has so many."""
    return min(DIRECTIONS, max(1, min(shape) // SMALLEST_PART)) if directions is None else min(directions, *shape)


def leading_right_vectors(matrix: Tensor, k: int) -> Tensor:
    """(N, k') right singular vectors of the largest singular values, orthonormal, in float64.

    k' is k, or the number of singular values above 1e-7 of the largest where there are fewer: what belongs to zero is
    any direction. From the exact solver of `low_rank_factors`, whose right factor spans them. The directions within the
    span may be turned; what is made of them here does not depend on it.
    """
    factors = low_rank_factors(matrix, k, solver="exact")
    values = factors.left.double().norm(dim=0) * factors.right.double().norm(dim=1)
    kept = int((values > 1e-7 * values[0]).sum())
    vectors, _ = torch.linalg.qr(factors.right.double().T[:, :kept])
    return vectors


def alignment_score(before: Tensor, after: Tensor) -> float:
    """How much of the top eigenspace is left where it was (paper, App. H.1).

    With v_j the leading right singular vectors before and v'_i those after: d_i = sum_j (v'_i . v_j)^2, and the score
    is the mean of d_i over i. 1 for the same subspace, k / N on average for one drawn at random.

    Args:
        before: (N, k) orthonormal columns.
        after: (N, k), likewise.

    Returns:
        NaN if one has fewer directions than the other, or none: there is no top eigenspace of that size.

    Raises:
        ValueError: if they are of different spaces.
    """
    if before.shape[0] != after.shape[0]:
        raise ValueError(f"eigenspaces of one space are compared, got {tuple(before.shape)} and {tuple(after.shape)}")
    if before.shape != after.shape or before.shape[1] == 0:
        return math.nan
    return float((after.T @ before).square().sum() / before.shape[1])


def energy_shares(values: Tensor) -> Tensor:
    """(S,) share of the squared Frobenius norm that the first 1, 2, ..., S directions hold.

    Args:
        values: (S,) singular values, descending; all shares of a matrix of zeros are 0.
    """
    squares = values.square()
    return squares.cumsum(0) / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)


def share_held(matrix: Tensor, indices: Tensor) -> float:
    """Share of the squared Frobenius norm that some entries hold.

    Args:
        matrix: (M, N).
        indices: (K,) flat indices.
    """
    squares = matrix.detach().double().square().flatten()
    return float(squares[indices.long()].sum() / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny))
