"""How one budget is divided: exact sums, floors and caps, one threshold against a sort of everything, ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_matrix
from tiny import tiny_llama

from lift_lightning import SelectionConfig, SparseAdamW, build_param_groups
from lift_lightning.allocation import Share, allocate, apportion, profile, with_share
from lift_lightning.errors import ConfigError
from lift_lightning.lowrank import singular_values
from lift_lightning.refresh import refresh_masks
from lift_lightning.shares import divide_budget

SHAPES = [(20, 30), (33, 16), (8, 50), (24, 24)]
SCALES = [1.0, 3.0, 0.2, 1.0]
WEIGHTS = [random_matrix(*shape, seed=i) * SCALES[i] for i, shape in enumerate(SHAPES)]
SIZES = [w.numel() for w in WEIGHTS]


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.integers(0, 50), st.integers(0, 200)).map(lambda t: (t[0], t[1], t[1] + t[2])),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_apportioned_numbers_add_up_within_floors_and_caps(parts, share):
    weights, floors, caps = (list(column) for column in zip(*parts, strict=True))
    total = sum(floors) + round(share * (sum(caps) - sum(floors)))
    counts = apportion(total, weights, floors, caps)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(floors, counts, caps, strict=True))


def test_apportioned_by_weight_with_the_largest_fractions_rounded_up():
    assert apportion(10, [1.0, 1.0, 1.0], [0, 0, 0], [9, 9, 9]) == [4, 3, 3]
    assert apportion(10, [6.0, 3.0, 1.0], [0, 0, 0], [9, 9, 9]) == [6, 3, 1]
    assert apportion(10, [6.0, 3.0, 1.0], [0, 0, 0], [4, 9, 9]) == [4, 5, 1]  # 6 are left for 3 : 1
    assert apportion(10, [6.0, 3.0, 1.0], [0, 0, 4], [9, 9, 9]) == [4, 2, 4]
    with pytest.raises(ValueError, match="5 is more than the caps"):
        apportion(5, [1.0], [0], [4])


def test_a_count_is_divided_by_size_to_the_entry():
    config = SelectionConfig(criterion="magnitude", count=1001)
    shares = allocate([profile(w, config) for w in WEIGHTS], config)
    assert sum(share.entries for share in shares) == 1001
    for share, size in zip(shares, SIZES, strict=True):
        assert abs(share.entries - 1001 * size / sum(SIZES)) < 1
    with pytest.raises(ConfigError, match=f"a budget of 99999 entries is more than the {sum(SIZES)}"):
        allocate([profile(w, config) for w in WEIGHTS], SelectionConfig(criterion="magnitude", count=99999))


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("criterion", ["magnitude", "lift", "movement"])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_one_threshold_for_all_against_a_sort_of_everything(criterion, floor, keep):
    config = SelectionConfig(criterion=criterion, count=700, lra_rank=4, allocation="global", floor=floor, keep=keep)
    gradients = [random_matrix(*w.shape, seed=20 + i) for i, w in enumerate(WEIGHTS)]
    profiles = [profile(w, config, statistics=g) for w, g in zip(WEIGHTS, gradients, strict=True)]
    found = [share.entries for share in allocate(profiles, config)]
    floors = [math.floor(floor * 700 * size / sum(SIZES)) for size in SIZES]
    ranked = []
    for i, (weight, gradient) in enumerate(zip(WEIGHTS, gradients, strict=True)):
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        scores = {
            "magnitude": weight.abs(),
            "lift": ((left[:, :4] * values[:4]) @ right[:4]).abs(),
            "movement": -weight * gradient,
        }[criterion]
        ordered = sorted((scores if keep == "largest" else -scores).flatten().tolist(), reverse=True)
        ranked += [(value, i) for value in ordered[floors[i] :]]
    best = [i for _, i in sorted(ranked, reverse=True)[: 700 - sum(floors)]]
    expected = [floors[i] + best.count(i) for i in range(len(WEIGHTS))]
    assert sum(found) == 700
    # Scores that agree in 12 bits of the mantissa are not told apart.
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    if floor == 0.0 and criterion == "magnitude" and keep == "largest":
        assert found[2] < 20 < found[1]  # the small weights lose nearly all


@pytest.mark.parametrize("allocation", ["energy", "effective_rank", "hard_threshold"])
def test_ranks_from_the_spectrum(allocation):
    config = SelectionConfig(density=0.1, allocation=allocation, energy=0.7, floor=0.2)
    shares = allocate([profile(w, config) for w in WEIGHTS], config)
    assert sum(share.entries for share in shares) == sum(config.budget(*w.shape) for w in WEIGHTS)
    for weight, share in zip(WEIGHTS, shares, strict=True):
        values = torch.linalg.svdvals(weight.double())
        if allocation == "energy":
            held = (values**2).cumsum(0) / (values**2).sum()
            expected = next(i + 1 for i, one in enumerate(held.tolist()) if one >= 0.7)
        elif allocation == "effective_rank":
            p = values / values.sum()
            expected = round(float(torch.exp(-(p * p.log()).sum())))
        else:
            beta = min(weight.shape) / max(weight.shape)
            omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
            expected = max(1, int((values > omega * values.median()).sum()))
        assert share.lra_rank == min(expected, min(weight.shape) - 1)
        assert share.entries >= math.floor(0.2 * 0.1 * weight.numel())


def test_a_matrix_of_low_rank_gets_its_rank():
    weight = random_matrix(30, 3) @ random_matrix(3, 40, seed=1) + 1e-3 * random_matrix(30, 40, seed=2)
    config = SelectionConfig(density=0.1, allocation="hard_threshold")
    assert profile(weight, config).lra_rank == 3
    torch.testing.assert_close(singular_values(weight), torch.linalg.svdvals(weight.double()), rtol=1e-9, atol=1e-6)
    assert profile(torch.zeros(4, 6), config).lra_rank == 1


def test_a_share_becomes_settings_of_one_matrix():
    config = SelectionConfig(density=0.1, allocation="energy", floor=0.0)
    own = with_share(config, Share(7, 55))
    assert (own.approximation_rank, own.budget(20, 30), own.divides) == (7, 55, True)
    assert with_share(SelectionConfig(rank=5), Share(None, 9)).approximation_rank == 5


@pytest.mark.parametrize("allocation", ["each", "global", "energy", "effective_rank", "hard_threshold"])
def test_every_allocation_selects_what_it_promises(allocation):
    optimizer = SparseAdamW(build_param_groups(tiny_llama()))
    budget = {"count": 3000} if allocation == "each" else {"density": 0.1}
    config = SelectionConfig(allocation=allocation, **budget)
    shares = divide_budget(optimizer, config)
    report = refresh_masks(optimizer, config, shares=shares)
    for name, parameter, _ in optimizer.sparse_parameters():
        assert optimizer.indices(parameter).numel() == sum(share.entries for share in shares[name])
    everything = [p for _, p, _ in optimizer.sparse_parameters()]
    expected = 3000 if allocation == "each" else sum(config.budget(*p.shape) for p in everything)
    assert report.selected == expected
    with pytest.raises(ConfigError, match="call divide_budget first"):
        refresh_masks(optimizer, config)
