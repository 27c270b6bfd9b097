"""What training did to one matrix: size and rank of the update, and the turn of the top eigenspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lift_lightning.analysis.spectra import (
    alignment_score,
    effective_rank,
    leading_right_vectors,
    numerical_rank,
    singular_spectrum,
    stable_rank,
)


@dataclass(frozen=True)
class Update:
    """Figures of one matrix before and after.

    Attributes:
        changed: share of the entries that differ.
        norm: Frobenius norm of the update, as a share of the weight's before.
        rank: of the update, counted with the paper's tolerance (App. G.3).
        effective_rank: of the update; the exponential of the entropy of its singular values.
        stable_rank: of the update; its squared Frobenius norm over its squared spectral norm.
        spectral_norm_before: largest singular value before.
        spectral_norm_after: and after (App. C).
        alignment: score of the top eigenspaces before and after (App. H.1).
    """

    changed: float
    norm: float
    rank: int
    effective_rank: float
    stable_rank: float
    spectral_norm_before: float
    spectral_norm_after: float
    alignment: float


def compare_matrix(before: Tensor, after: Tensor, k: int) -> Update:
    """All figures of one matrix.

    Args:
        before: (M, N), any floating dtype.
        after: (M, N), likewise, on the same device.
        k: directions of the top eigenspace; the paper takes 128 of matrices with 4,096 columns.

    Raises:
        ValueError: if the shapes differ.
        DecompositionError: if one of them holds NaN or infinity.
    """
    if before.shape != after.shape:
        raise ValueError(f"the matrix is {tuple(before.shape)} before and {tuple(after.shape)} after")
    before, after = before.detach().float(), after.detach().float()
    difference = after - before
    values = singular_spectrum(difference)
    return Update(
        changed=float((difference != 0).double().mean()),
        norm=float(difference.norm() / before.norm().clamp(min=torch.finfo(before.dtype).tiny)),
        rank=numerical_rank(values, tuple(before.shape)),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        spectral_norm_before=float(torch.linalg.matrix_norm(before, 2)),
        spectral_norm_after=float(torch.linalg.matrix_norm(after, 2)),
        alignment=alignment_score(leading_right_vectors(before, k), leading_right_vectors(after, k)),
    )
