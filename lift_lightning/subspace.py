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
_GRAM_BANDS = 4
_GRAM_SHARE = (_GRAM_BANDS + 1) / (2 * _GRAM_BANDS)
# What a filter aims at below the tolerance, because one round more costs as much as several degrees.
_MARGIN = 1.5
# Products that a decomposition is expected to take, for the choice of how to form them.
_EXPECTED_COLD, _EXPECTED_WARM = 12, 2
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
    apply = _Products(matrix, rank, width, _EXPECTED_COLD if basis is None else _EXPECTED_WARM)
    columns = _start(matrix, width, basis)
    if basis is None:  # two powers, so that the first look at the spectrum is worth something
        columns = apply(torch.linalg.qr(apply(columns)).Q)
    before = math.inf
    settled: Tensor | None = None  # the leading directions of a round whose error was small enough
    for attempt in range(_MAX_ROUNDS):
        columns = torch.linalg.qr(columns).Q
        ritz = _Ritz.of(columns, apply.within(columns), rank)
        if settled is not None and apply.gram is None:
            # By how far the filter has moved them they were off, and are less so now. That spares the second product,
            # which residuals would take.
            look = _look(ritz, (ritz.leading - settled @ (settled.T @ ritz.leading)).norm(dim=0), through_gram=False)
            if look.error <= tolerance and (found := _finished(apply, ritz, look)).error <= tolerance:
                return found
        image = apply.outside() @ ritz.rotation
        # A Ritz vector with residual norm r leans out of the b columns by an angle of at most about r over the distance
        # of its theta to the spectrum outside (Davis-Kahan).
        residuals = (image - ritz.columns * ritz.theta).norm(dim=0)[:rank]
        look = _look(ritz, residuals / ritz.gap, through_gram=apply.gram is not None)
        # Rounding sets a floor: once the error stays where it is, more rounds are in vain. Not so while angles are too
        # wide to be told apart, as at the start on a flat spectrum.
        last = attempt == _MAX_ROUNDS - 1 or 0.9 * before < look.error < min(0.3, 1.1 * before)
        before = look.error
        if look.rounding > tolerance / 4 and attempt < _MAX_ROUNDS - 1:
            apply.gram = None  # from here on without it
            before = math.inf
            columns = apply(ritz.columns)
            continue
        # The first look never suffices: a direction that has come up since, orthogonal to all of an old basis, shows in
        # no residual, but a filter brings it out of the random columns.
        if (look.error <= tolerance and attempt > 0) or last:
            found = _finished(apply, ritz, look)
            if found.error <= tolerance or last:
                return found
            look = look._replace(error=found.error)
        settled = ritz.leading if look.error <= tolerance else None
        degree = _degree(look, tolerance, cold=basis is None and attempt == 0)
        columns = _filter(apply, ritz.columns, image, look, degree)
    raise AssertionError("the last round returns")


def _finished(apply: _Products, ritz: _Ritz, look: _Look) -> Subspace:
    left = ritz.leading
    # Of the columns before the rotation the product is at hand.
    right = left.T @ apply.matrix if apply.gram is not None else ritz.rotation[:, : left.shape[1]].T @ apply.projected
    error = look.error * _outlying_columns(right, look.bulk * math.sqrt(left.shape[0]))
    return Subspace(left, right, ritz.columns.to(BASIS_DTYPE), error, apply.count)


class _Ritz(NamedTuple):
    """The best approximations of leading directions that some columns hold."""

    columns: Tensor  # (S, b), orthonormal
    theta: Tensor  # (b,), descending
    rotation: Tensor  # (b, b), makes them of the columns as they were
    bound: Tensor  # 0-dim, theta_b; 0 where nothing lies outside of the columns
    gap: Tensor  # (R,), how far theta lies above the bound

    @classmethod
    def of(cls, columns: Tensor, small: Tensor, rank: int) -> _Ritz:
        """Rayleigh-Ritz: `columns` (S, b) are orthonormal, `small` (b, b) is A A^T between them."""
        theta, rotation = torch.linalg.eigh((small + small.T) / 2)
        theta, rotation = theta.flip(0).clamp_(min=0), rotation.flip(1)
        side, width = columns.shape
        bound = theta[-1] if width < side else torch.zeros_like(theta[-1])
        gap = (theta[:rank] - bound).clamp_(min=torch.finfo(theta.dtype).tiny)
        return cls(columns @ rotation, theta, rotation, bound, gap)

    @property
    def leading(self) -> Tensor:
        """(S, R)"""
        return self.columns[:, : self.gap.numel()]


class _Products:
    """X -> A A^T X in two steps, through the Gram matrix where that is cheaper, and a count of how often."""

    def __init__(self, matrix: Tensor, rank: int, width: int, expected: int) -> None:
        side, length = matrix.shape
        self.matrix = matrix
        self.count = 0
        # What the first step leaves: X^T A (b, L), or A A^T X (S, b) where there is a Gram matrix.
        self.projected = self.image = matrix.new_empty(0)
        # Multiplications, over S: of forming the Gram matrix, applying it and projecting at the end, against those of
        # two products with A each time but the last.
        through_gram = _GRAM_SHARE * side * length + expected * side * width + length * rank
        self.gram = _gram(matrix) if through_gram < (2 * expected - 1) * length * width else None

    def __call__(self, columns: Tensor) -> Tensor:
        self._begin(columns)
        return self.outside()

    def within(self, columns: Tensor) -> Tensor:
        """X^T A A^T X (b, b), for which the first step is enough."""
        self._begin(columns)
        return self.projected @ self.projected.T if self.gram is None else columns.T @ self.image

    def outside(self) -> Tensor:
        """A A^T X (S, b) of the last X."""
        return self.matrix @ self.projected.T if self.gram is None else self.image

    def _begin(self, columns: Tensor) -> None:
        self.count += 1
        if self.gram is None:
            self.projected = columns.T @ self.matrix
        else:
            self.image = self.gram @ columns


def _gram(matrix: Tensor) -> Tensor:
    """A A^T, each band of rows from its diagonal on, and mirrored: torch has no product that knows of the symmetry."""
    side = matrix.shape[0]
    gram = matrix.new_empty(side, side)
    step = -(-side // _GRAM_BANDS)
    for start in range(0, side, step):
        band = matrix[start : start + step] @ matrix[start:].T
        gram[start : start + step, start:] = band
        gram[start:, start : start + step] = band.T
    return gram


class _Look(NamedTuple):
    """What one round knows, as numbers on the host."""

    error: float
    rounding: float  # the part of the error that a float32 Gram matrix makes by itself
    growth: float  # logarithm of how much one degree amplifies direction R
    top_growth: float  # the same of direction 1
    bound: float  # theta_b
    top: float  # theta_1
    bulk: float  # norm of a row of the approximation that is not an outlier


def _look(ritz: _Ritz, angles: Tensor, *, through_gram: bool) -> _Look:
    """What is known of the leading directions that lean by (R,) `angles` out of where they should lie."""
    columns, theta, _, bound, gap = ritz
    tiny, eps = torch.finfo(theta.dtype).tiny, torch.finfo(theta.dtype).eps
    side, kept = columns.shape[0], theta[: gap.numel()]
    # Rows of the approximation differ in size. A few that stand out carry the norm, but most of a mask lies in others.
    energy = ritz.leading.square() @ kept
    bulk = energy.median()
    bulk = torch.where(bulk > 0, bulk, energy.mean()).clamp(min=tiny)

    # Leaning by the angle a changes the approximation by a sigma_i in the direction it should have and by a sigma_out
    # in the one it has.
    def in_the_approximation(angle: Tensor) -> Tensor:
        return ((angle.clamp(max=1.0).square() * (kept + bound)).sum() / (bulk * side)).sqrt()

    rounding = in_the_approximation(eps * theta[0] / gap) if through_gram else torch.zeros_like(bulk)
    error = (in_the_approximation(angles).square() + rounding.square()).sqrt()
    ratio = (2 * theta / bound.clamp(min=tiny) - 1).clamp(1.0, 1e12)
    growth = (ratio + (ratio.square() - 1).sqrt()).log()
    last_kept = growth[gap.numel() - 1]
    return _Look(*torch.stack([error, rounding, last_kept, growth[0], bound, theta[0], bulk.sqrt()]).tolist())


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
    if look.error <= tolerance:  # one more round to make sure
        return 1
    wanted = math.acosh(_MARGIN * look.error / tolerance) / max(look.growth, 1e-3)
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
    drawn = torch.randn(side, missing, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return torch.cat([known, drawn.to(matrix.device)], dim=1)
