"""Rank-R approximation of one matrix.

Letters: M, N rows and columns of the matrix; R rank of the approximation; S = min(M, N), its shorter side; b columns of
the basis that the subspace solver iterates on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lift_lightning.subspace import OVERSAMPLING, leading_subspace

Solver = Literal["auto", "exact", "subspace"]
Directions = Literal["largest", "smallest", "random", "hybrid"]
SolverUsed = Literal["exact", "subspace", "exact after subspace"]

# Error of the subspace solver, see `low_rank_factors`.
DEFAULT_TOLERANCE = 3e-3

# Up to this shorter side a full eigendecomposition is as cheap as a few rounds of iteration.
_EXACT_UP_TO = 128

# Entries of the weight that are in float64 at one time.
_BLOCK_ENTRIES = 2**22


class DecompositionError(ValueError):
    """A matrix could not be decomposed: it holds NaN or infinity, or the solver did not converge."""


class LowRankFactors(NamedTuple):
    """`left @ right` is the best rank-R approximation of a matrix in the Frobenius norm, or of other directions of it.

    Attributes:
        left: (M, R), float64 from the exact solver, float32 from the subspace solver (float64 for weights all below
            1e-3 or with some above 1e3, which it scales).
        right: (R, N), likewise.
        basis: (S, b) float16, what the subspace solver wants back at its next call on the same parameter to start
            warm; None from the exact one.
        solver: which one made the factors.
        error: estimated error against the best approximation, relative to its bulk; 0 for the exact solver.
    """

    left: Tensor
    right: Tensor
    basis: Tensor | None
    solver: SolverUsed = "exact"
    error: float = 0.0


def low_rank_factors(
    weight: Tensor,
    rank: int,
    *,
    solver: Solver = "auto",
    basis: Tensor | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    directions: Directions = "largest",
    seed: int = 0,
) -> LowRankFactors:
    """Factor the best rank-R approximation of a matrix (Eckart-Young), on the matrix's own device.

    `exact` takes the eigenvectors of the Gram matrix of the shorter side, which are the singular vectors of that side,
    and projects the matrix on the leading R. It works in float64 throughout: the Gram matrix squares the singular
    values, so in float32 two of them that differ by less than about 3e-4 of the largest would mix, and entries near
    the selection threshold would change places.

    `subspace` iterates in float32 until the estimated error is below `tolerance`: root mean square over the entries,
    relative to that of the approximation's bulk (all of it but for outlying rows and columns). The share of a 5% mask
    that differs from the exact one is about as large, 0.6 to 1.1 times on average (docs/performance.md).

    `auto` takes `subspace` where it is cheaper: for shorter sides above 128 of which the basis, R + 32 columns, is less
    than half. Where it does not converge, because the R-th singular value does not stand out from the next 32 or
    rounding stands in the way, `auto` goes on with `exact`, and `solver` says so.

    Args:
        weight: (M, N), any floating dtype; not changed.
        rank: R. Values above S mean S, and then the product is the matrix itself.
        solver: `exact`, `subspace` or `auto`.
        basis: from an earlier call, for a warm start. The exact solver needs none and is a function of the matrix
            alone; the subspace solver is one of the matrix and the basis.
        tolerance: for the estimated error of the subspace solver.
        directions: which R singular directions the product keeps (paper, App. B.2): the `largest`, the `smallest`, R at
            `random`, or `hybrid`, half of R, rounded up, the largest and the rest the smallest. All but the largest
            take the exact solver.
        seed: of the random ones.

    Returns:
        The two factors, the basis for the next call, which solver made them and the error it estimates.

    Raises:
        ValueError: if `weight` is not a matrix, `rank` is below 1, the solver is unknown or the basis does not fit.
        DecompositionError: if the matrix holds NaN or infinity, or the solver asked for does not converge.
    """
    if weight.ndim != 2:
        raise ValueError(f"low_rank_factors takes one matrix, got a tensor of shape {tuple(weight.shape)}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(get_args(Solver))}")
    largest = check_finite(weight)
    weight, rank = weight.detach(), min(rank, *weight.shape)
    if directions not in get_args(Directions):
        raise ValueError(f"unknown directions {directions!r}: choose one of {', '.join(get_args(Directions))}")
    if directions != "largest":
        if solver == "subspace":
            raise ValueError(f"the subspace solver finds the largest directions only, not {directions}: take exact")
        return _exact(weight, rank, largest, _places(directions, rank, min(weight.shape), seed))
    if solver == "exact" or (solver == "auto" and not _subspace_is_cheaper(weight.shape[0], weight.shape[1], rank)):
        return _exact(weight, rank, largest)
    factors = _subspace(weight, rank, basis, tolerance, largest)
    if factors.error <= tolerance:
        return factors
    if solver == "auto":
        return _exact(weight, rank, largest)._replace(solver="exact after subspace")
    raise DecompositionError(
        f"the subspace solver did not converge on a {weight.shape[0]}x{weight.shape[1]} matrix at rank {rank}: "
        f"estimated error {factors.error:.1e}, tolerance {tolerance:.1e}; take solver auto or exact, or another rank"
    )


def check_finite(weight: Tensor) -> float:
    """The largest magnitude.

    Raises:
        DecompositionError: if any entry is NaN or infinite, saying how many.
    """
    if not weight.numel():
        return 0.0
    # One pass that makes nothing of the weight's size; both ends are NaN if any entry is.
    lowest, highest = torch.stack(torch.aminmax(weight.detach())).tolist()
    largest = max(-lowest, highest)
    if not math.isfinite(largest):
        bad = int(weight.numel() - torch.isfinite(weight).sum())
        raise DecompositionError(
            f"{bad} of {weight.numel()} entries are NaN or infinite; training has diverged or the checkpoint is broken"
        )
    return largest


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32: no TF32, no autocast, whatever is set for training.

    TF32 keeps 10 bits of the factors, so the mask would depend on a switch that belongs to the training step.
    """
    settings = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    with ExitStack() as stack:
        # Since 2.9 each backend has a setting of its own, and reading the old one raises where those differ from it.
        if all(hasattr(setting, "fp32_precision") for setting in settings):
            for setting in settings:
                stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
                setting.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def decomposition_cost(rows: int, columns: int, rank: int) -> float:
    """Multiplications in float32, about, of a later decomposition by the solver `auto` and of the scores it gives."""
    side, length = min(rows, columns), max(rows, columns)
    scores = float(rows * columns * rank)
    if rank >= side:
        return 0.0
    if _subspace_is_cheaper(rows, columns, rank):
        width = rank + OVERSAMPLING
        return scores + 3 * side * length * width + 20 * side * width**2  # three products; QR and small products
    return scores + 2 * (side**2 * length + 9 * side**3)  # in float64, which takes twice as long


def _subspace_is_cheaper(rows: int, columns: int, rank: int) -> bool:
    side = min(rows, columns)
    return side > _EXACT_UP_TO and 2 * (rank + OVERSAMPLING) < side


def _subspace(weight: Tensor, rank: int, basis: Tensor | None, tolerance: float, largest: float) -> LowRankFactors:
    rows, columns = weight.shape
    # Fourth powers of the singular values must lie in the range of float32. Few weights need the scaled copy it takes.
    scale = 1.0 if largest == 0 or 1e-3 < largest < 1e3 else largest
    matrix = (weight if scale == 1.0 else weight.double() / scale).float()
    wide = rows <= columns
    try:
        with float32_products(weight.device):
            found = leading_subspace(matrix if wide else matrix.T, rank, tolerance, basis)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(f"the eigensolver did not converge on a {rows}x{columns} matrix: {error}") from error
    left, right = found.left, found.right
    if scale != 1.0:
        left, right = left.double(), right.double() * scale
    if not wide:
        left, right = right.T, left.T
    return LowRankFactors(left, right, found.basis, "subspace", found.error)


def singular_values(weight: Tensor) -> Tensor:
    """All S singular values of a matrix, in float64, descending.

    Raises:
        DecompositionError: if the matrix holds NaN or infinity, or the eigensolver does not converge.
    """
    largest = check_finite(weight) or 1.0
    short_side_first = weight.detach() if weight.shape[0] <= weight.shape[1] else weight.detach().T
    try:
        squares = torch.linalg.eigvalsh(_gram(short_side_first, largest))
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(f"the eigensolver did not converge on a {tuple(weight.shape)} matrix") from error
    return squares.clamp(min=0).sqrt().flip(0) * largest


def _places(directions: Directions, rank: int, side: int, seed: int) -> Tensor:
    """(R,) places of the singular directions that are kept, of S in descending order."""
    if directions == "smallest":
        return torch.arange(side - rank, side)
    if directions == "random":  # drawn on the CPU, so that every device gets the same
        return torch.randperm(side, generator=torch.Generator().manual_seed(seed))[:rank].sort().values
    return torch.cat([torch.arange(rank - rank // 2), torch.arange(side - rank // 2, side)])


def _exact(weight: Tensor, rank: int, largest: float, places: Tensor | None = None) -> LowRankFactors:
    rows, columns = weight.shape
    wide = rows <= columns
    short_side_first = weight if wide else weight.T
    # A common factor changes no eigenvector; without it the squares of very small or large weights leave the range.
    try:
        _, vectors = torch.linalg.eigh(_gram(short_side_first, largest or 1.0))
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(f"the eigensolver did not converge on a {rows}x{columns} matrix: {error}") from error
    descending = vectors.flip(1)  # eigh sorts ascending
    leading = descending[:, :rank] if places is None else descending[:, places.to(weight.device)]
    # (R, L), in blocks like the Gram matrix: no float64 copy of the whole weight exists.
    blocks = short_side_first.split(max(1, _BLOCK_ENTRIES // min(rows, columns)), dim=1)
    projection = torch.cat([leading.T @ block.double() for block in blocks], dim=1)
    if wide:
        return LowRankFactors(leading, projection, None)
    return LowRankFactors(projection.T, leading.T, None)


def _gram(matrix: Tensor, scale: float) -> Tensor:
    """A A^T / scale^2 in float64 for A (S, L), summed over blocks of columns."""
    side = matrix.shape[0]
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for block in matrix.split(max(1, _BLOCK_ENTRIES // side), dim=1):
        block = block.double() / scale
        gram.addmm_(block, block.T)
    return gram
