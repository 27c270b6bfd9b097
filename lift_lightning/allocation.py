"""How a budget of entries is divided among matrices: by size, by one threshold for all, or by their ranks.

Letters: M, N rows and columns of one matrix; S = min(M, N); K its selected entries; R rank of its approximation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lift_lightning.criteria import CRITERIA
from lift_lightning.errors import ConfigError
from lift_lightning.indices import rows_at_a_time
from lift_lightning.lowrank import float32_products, singular_values
from lift_lightning.selection_config import ADAPTIVE, SelectionConfig

# Of a score's 32 bits those that are left out when scores are counted: two that agree in the other 21 (sign, exponent
# and 12 bits of the mantissa) are not told apart.
_BITS_LEFT_OUT = 11


class Share(NamedTuple):
    """What one matrix gets: R (None for what the settings say) and K."""

    lra_rank: int | None
    entries: int


class Profile(NamedTuple):
    """What is known of one matrix before the budget is divided: numbers that are much fewer than its entries.

    Attributes:
        shape: (M, N).
        lra_rank: R, where the matrix has one of its own.
        bins: ascending classes of its scores, where all matrices compete; None elsewhere.
        counts: entries in each.
    """

    shape: tuple[int, int]
    lra_rank: int | None = None
    bins: Tensor | None = None
    counts: Tensor | None = None


def with_share(config: SelectionConfig, share: Share) -> SelectionConfig:
    """The settings for the one matrix whose share this is."""
    return replace(
        config,
        rank=None,
        density=None,
        density_of="targets",
        count=share.entries,
        allocation="each",
        lra_rank=config.approximation_rank if share.lra_rank is None else share.lra_rank,
    )


def profile(weight: Tensor, config: SelectionConfig, *, statistics: Tensor | None = None) -> Profile:
    """Look at one (M, N) matrix; for `global` it is decomposed, for the adaptive allocations its spectrum is taken."""
    shape = (weight.shape[0], weight.shape[1])
    if config.allocation in ADAPTIVE:
        values = singular_values(weight)
        return Profile(shape, min(_rank_of(values, shape, config), max(1, min(shape) - 1)))
    if config.allocation != "global":
        return Profile(shape)
    scores = CRITERIA[config.criterion](weight.detach(), config, None, statistics)
    counts: dict[int, int] = {}
    step = rows_at_a_time(shape[1], weight.device)
    with float32_products(weight.device):
        for start in range(0, shape[0], step):
            part = scores.part((slice(start, min(start + step, shape[0])), slice(None)))
            bins, found = _ordered_bits(part if config.keep == "largest" else -part).unique(return_counts=True)
            for one, count in zip(bins.tolist(), found.tolist(), strict=True):
                counts[one] = counts.get(one, 0) + count
    ascending = sorted(counts)
    return Profile(shape, None, torch.tensor(ascending), torch.tensor([counts[one] for one in ascending]))


def allocate(profiles: Sequence[Profile], config: SelectionConfig) -> list[Share]:
    """Divide the budget of all matrices; the shares add up to it exactly.

    Raises:
        ConfigError: if it is more than the matrices hold.
    """
    sizes = [rows * columns for rows, columns in (one.shape for one in profiles)]
    total = sum(config.budget(*one.shape) for one in profiles) if config.count is None else config.count
    if total > sum(sizes):
        raise ConfigError(f"a budget of {total} entries is more than the {sum(sizes)} of the targeted matrices")
    if config.allocation == "each" and config.count is None:
        return [Share(None, config.budget(*one.shape)) for one in profiles]
    if config.allocation == "each":
        counts = apportion(total, [float(size) for size in sizes], [0] * len(sizes), sizes)
        return [Share(None, count) for count in counts]
    floors = [math.floor(config.floor * total * size / sum(sizes)) for size in sizes]
    if config.allocation == "global":
        return [Share(None, count) for count in _above_one_threshold(profiles, total, floors)]
    weights = [float((one.lra_rank or 0) * sum(one.shape)) for one in profiles]
    counts = apportion(total, weights, floors, sizes)
    return [Share(one.lra_rank, count) for one, count in zip(profiles, counts, strict=True)]


def apportion(total: int, weights: Sequence[float], floors: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total`: floors, and the rest by the weights as far as the caps allow.

    What a cap cuts off goes to the others, by their weights; of the fractions that are left the largest are rounded up
    (Hamilton's method), of equal ones the first.
    """
    given = [float(floor) for floor in floors]
    open_ = [i for i in range(len(weights)) if weights[i] > 0 and floors[i] < caps[i]]
    rest = float(total - sum(floors))
    while rest > 1e-9 and open_:
        whole = sum(weights[i] for i in open_)
        full = [i for i in open_ if given[i] + rest * weights[i] / whole >= caps[i]]
        if not full:
            for i in open_:
                given[i] += rest * weights[i] / whole
            rest = 0.0
        for i in full:
            rest -= caps[i] - given[i]
            given[i] = float(caps[i])
        open_ = [i for i in open_ if i not in full]
    counts = [min(math.floor(value + 1e-9), cap) for value, cap in zip(given, caps, strict=True)]
    # Rounding leaves less than one for each; where weights of zero left more, it goes wherever there is room.
    by_fraction = sorted(range(len(counts)), key=lambda i: (counts[i] - given[i], i))
    missing = total - sum(counts)
    while missing > 0:
        before = missing
        for i in by_fraction:
            if missing and counts[i] < caps[i]:
                counts[i] += 1
                missing -= 1
        if missing == before:
            raise ValueError(f"{total} is more than the caps, {sum(caps)}, allow")
    return counts


def _above_one_threshold(profiles: Sequence[Profile], total: int, floors: Sequence[int]) -> list[int]:
    """For each matrix its floor, and how many of its other entries are among the best of all matrices together."""
    remaining: list[tuple[Tensor, Tensor]] = []
    for one, floor in zip(profiles, floors, strict=True):
        assert one.bins is not None, "all matrices are profiled alike"
        assert one.counts is not None
        from_the_top = one.counts.flip(0).cumsum(0).flip(0)  # entries of this class and above
        left = (from_the_top - floor).clamp(min=0)
        remaining.append((one.bins, torch.minimum(left, one.counts)))
    rest = total - sum(floors)
    every, place = torch.cat([bins for bins, _ in remaining]).unique(return_inverse=True)
    summed = torch.zeros(len(every), dtype=torch.int64).index_add_(0, place, torch.cat([c for _, c in remaining]))
    above = summed.flip(0).cumsum(0).flip(0)
    threshold = every[int(torch.nonzero(above >= rest).max())] if rest else every[-1] + 1
    surely = [int(counts[bins > threshold].sum()) for bins, counts in remaining]
    at = [int(counts[bins == threshold].sum()) for bins, counts in remaining]
    tied = apportion(rest - sum(surely), [float(count) for count in at], [0] * len(at), at)
    return [sum(three) for three in zip(floors, surely, tied, strict=True)]


def _ordered_bits(scores: Tensor) -> Tensor:
    """int32 in the order of the float32 scores, without their last bits."""
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0: one zero
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) >> _BITS_LEFT_OUT


def _rank_of(values: Tensor, shape: tuple[int, int], config: SelectionConfig) -> int:
    """R of a matrix with these singular values (S,), descending; at least 1."""
    if not float(values[0]) > 0:
        return 1
    if config.allocation == "energy":
        held = values.square().cumsum(0)
        return min(int((held < config.energy * held[-1]).sum()) + 1, len(values))
    if config.allocation == "effective_rank":
        share = values / values.sum()
        return max(1, round(math.exp(float(-torch.xlogy(share, share).sum()))))
    # Gavish & Donoho 2014, eq. (5): an approximation of omega(beta) for a noise level that is not known.
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return max(1, int((values > omega * values.median()).sum()))
