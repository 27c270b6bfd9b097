"""The leading singular subspace of one matrix by filtered, warm-started subspace iteration: matrix products only.

Letters: A (S, L) the matrix, shorter side first; R wanted directions; b = R + oversampling columns iterated on;
theta the eigenvalues of A A^T (squared singular values), descending.

Each round takes the best approximations that the current columns hold (Rayleigh-Ritz), measures how far off they still
are, and if that is too much, applies a Chebyshev polynomial of A A^T that is small on [0, theta_b] and grows fast above
it (Zhou and Saad 2007). How far off is measured in what it costs: the root mean square error that the entries of the
rank-R approximation have left, relative to the size of most of them, which is what the share of wrong entries in a mask
follows (`docs/performance.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 32

# A basis has orthonormal columns, so float16 holds it to 2^-12 relative, far below what a refresh moves it by.
BASIS_DTYPE = torch.float16

_MAX_ROUNDS = 12
# Columns of a warm start that are drawn anew, for directions that the old ones know nothing of.
_PROBES = 2
_MAX_DEGREE = 10
# Products that a decomposition is expected to take, for the choice of how to form them.
_EXPECTED_COLD, _EXPECTED_WARM = 12, 4
# How much more one filter may amplify the first direction than the R-th. float32 has 7 digits: beyond about 5 of them
# what is left of the first direction in the other columns would drown them.
_MAX_SPREAD = 1e5


class Subspace(NamedTuple):
    """The leading R directions of A.

    Attributes:
        left: (S, R) float32, orthonormal columns.
        right: (R, L) float32; `left @ right` approximates A.
        basis: (S, b) in BASIS_DTYPE, to start from next time.
        error: estimated root mean square error of `left @ right` against the best rank-R approximation, relative to
            its bulk: the root mean square of a row, or of a column if that is less, that is not an outlier.
        applications: how often A A^T was applied to b columns.
    """

    left: Tensor
    right: Tensor
    basis: Tensor
    error: float
    applications: int


def leading_subspace(matrix: Tensor, rank: int, tolerance: float, basis: Tensor | None = None) -> Subspace:
    """Iterate until the estimated error is at most `tolerance`, or the rounds are used up.

    Args:
        matrix: A, (S, L) with S <= L, float32, finite; any strides.
        rank: R, at most S.
        tolerance: for the error; the caller compares.
        basis: (S, any) from an earlier call; columns that are missing are drawn at random, the same on every device.

    Raises:
        torch.linalg.LinAlgError: if the eigensolver of the small problem did not converge.
        ValueError: if the basis has another number of rows.
    """
    side, length = matrix.shape
    width = min(side, rank + OVERSAMPLING)
    apply = _Products(matrix, width, _EXPECTED_COLD if basis is None else _EXPECTED_WARM)
    columns = _start(matrix, width, basis)
    if basis is None:  # two powers, so that the first look at the spectrum is worth something
        columns = apply(torch.linalg.qr(apply(columns)).Q)
    before = math.inf
    for attempt in range(_MAX_ROUNDS):
        columns = torch.linalg.qr(columns).Q
        image = apply(columns)
        small = columns.T @ image
        theta, rotation = torch.linalg.eigh((small + small.T) / 2)
        theta, rotation = theta.flip(0).clamp_(min=0), rotation.flip(1)
        columns, image = columns @ rotation, image @ rotation
        residuals = (image - columns * theta).norm(dim=0)
        look = _look(columns, theta, residuals, rank, apply.gram is not None)
        # Rounding sets a floor: once the error stays where it is, more rounds are in vain. Not so while angles are too
        # wide to be told apart, as at the start on a flat spectrum.
        last = attempt == _MAX_ROUNDS - 1 or 0.9 * before < look.error < min(0.3, 1.1 * before)
        before = look.error
        if look.rounding > tolerance / 4 and attempt < _MAX_ROUNDS - 1:
            apply.gram = None  # from here on without it
            before = math.inf
            columns = apply(columns)
            continue
        # The first look never suffices: a direction that has come up since, orthogonal to all of an old basis, shows in
        # no residual, but a filter brings it out of the random columns.
        if (look.error <= tolerance and attempt > 0) or last:
            left = columns[:, :rank]
            # Of the columns before the rotation the product is at hand.
            right = left.T @ matrix if apply.projected is None else rotation[:, :rank].T @ apply.projected
            error = look.error * _outlying_columns(right, look.bulk * math.sqrt(side))
            if error <= tolerance or last:
                return Subspace(left, right, columns.to(BASIS_DTYPE), error, apply.count)
            look = look._replace(error=error)
        columns = _filter(apply, columns, image, look, _degree(look, tolerance, cold=basis is None and attempt == 0))
    raise AssertionError("the last round returns")


class _Products:
    """X -> A A^T X, through the Gram matrix where that is cheaper, and a count of how often."""

    def __init__(self, matrix: Tensor, width: int, expected: int) -> None:
        side, length = matrix.shape
        self.matrix = matrix
        self.count = 0
        self.projected: Tensor | None = None  # (b, L), the first of the two products of the last call
        # Multiplications of forming the Gram matrix and applying it, against those of two products with A each time.
        worth_it = side * length + expected * side * width < 2 * expected * length * width
        self.gram = matrix @ matrix.T if worth_it else None

    def __call__(self, columns: Tensor) -> Tensor:
        self.count += 1
        if self.gram is not None:
            return self.gram @ columns
        self.projected = columns.T @ self.matrix
        return self.matrix @ self.projected.T


class _Look(NamedTuple):
    """What one round knows, as numbers on the host."""

    error: float
    rounding: float  # the part of the error that a float32 Gram matrix makes by itself
    growth: float  # logarithm of how much one degree amplifies direction R
    top_growth: float  # the same of direction 1
    bound: float  # theta_b
    top: float  # theta_1
    bulk: float  # norm of a row of the approximation that is not an outlier


def _look(columns: Tensor, theta: Tensor, residuals: Tensor, rank: int, through_gram: bool) -> _Look:
    side, width = columns.shape
    tiny, eps = torch.finfo(theta.dtype).tiny, torch.finfo(theta.dtype).eps
    kept = theta[:rank]
    bound = theta[-1] if width < side else torch.zeros_like(theta[-1])  # nothing lies outside of all directions
    gap = (kept - bound).clamp_(min=tiny)
    # Rows of the approximation differ in size. A few that stand out carry the norm, but most of a mask lies in others.
    energy = columns[:, :rank].square() @ kept
    bulk = energy.median()
    bulk = torch.where(bulk > 0, bulk, energy.mean()).clamp(min=tiny)

    # A Ritz vector with residual norm r leans out of the b columns by an angle of at most about r over the distance of
    # its theta to the spectrum outside (Davis-Kahan). Leaning by the angle a changes the approximation by a sigma_i
    # in the direction it should have and by a sigma_out in the one it has.
    def in_the_approximation(angle: Tensor) -> Tensor:
        return ((angle.clamp(max=1.0).square() * (kept + bound)).sum() / (bulk * side)).sqrt()

    rounding = in_the_approximation(eps * theta[0] / gap) if through_gram else torch.zeros_like(bulk)
    error = (in_the_approximation(residuals[:rank] / gap).square() + rounding.square()).sqrt()
    ratio = (2 * theta / bound.clamp(min=tiny) - 1).clamp(1.0, 1e12)
    growth = (ratio + (ratio.square() - 1).sqrt()).log()
    return _Look(*torch.stack([error, rounding, growth[rank - 1], growth[0], bound, theta[0], bulk.sqrt()]).tolist())


def _outlying_columns(right: Tensor, row: float) -> float:
    """How much larger most entries are by the norm of a row than by that of a column; 1 if they are not.

    Args:
        right: (R, L); the approximation's columns have the norms of its columns.
        row: norm of a row of the approximation, times sqrt(S).
    """
    energy = right.square().sum(dim=0)
    bulk = energy.median()
    column = float(torch.where(bulk > 0, bulk, energy.mean()).sqrt()) * math.sqrt(right.shape[1])
    return max(1.0, row / column) if column else 1.0


def _degree(look: _Look, tolerance: float, *, cold: bool) -> int:
    """The degree that should bring the error below the tolerance, as far as float32 goes."""
    wanted = math.log(max(look.error / tolerance, 1.5)) / max(look.growth, 1e-3)
    if cold:  # the first look at random columns sees a bound that is too low
        wanted += 2
    spread = math.log(_MAX_SPREAD) / max(look.top_growth - look.growth, 1e-9)
    return max(1, int(min(math.ceil(wanted), _MAX_DEGREE, spread)))


def _filter(apply: Callable[[Tensor], Tensor], columns: Tensor, image: Tensor, look: _Look, degree: int) -> Tensor:
    """The Chebyshev polynomial that is small on [0, bound], scaled to 1 at `top` so that nothing overflows.

    `image` is A A^T applied to the columns, which the round has at hand: the first degree costs no product.
    """
    half = look.bound / 2
    if half <= 0:
        return image  # nothing outside is left to damp
    scale = half / (look.top - half)
    factor = scale
    before, current = columns, (image - half * columns) * (factor / half)
    for _ in range(degree - 1):
        after = 1 / (2 / scale - factor)
        advanced = apply(current)
        advanced.sub_(current, alpha=half).mul_(2 * after / half).sub_(before, alpha=factor * after)
        before, current, factor = current, advanced, after
    return current


def _start(matrix: Tensor, width: int, basis: Tensor | None) -> Tensor:
    side = matrix.shape[0]
    if basis is not None and (basis.ndim != 2 or basis.shape[0] != side):
        raise ValueError(f"a basis for a matrix with a shorter side of {side} is ({side}, b), got {tuple(basis.shape)}")
    known = matrix.new_empty(side, 0)
    if basis is not None:
        known = basis[:, : width - _PROBES].to(matrix.device, torch.float32)
    missing = width - known.shape[1]
    # Drawn on the CPU, so that every device starts from the same columns.
    drawn = torch.randn(side, missing, generator=torch.Generator().manual_seed(0))
    return torch.cat([known, drawn.to(matrix.device)], dim=1)
