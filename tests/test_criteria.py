"""Every criterion, direction and structure against an oracle that sorts all scores of the whole matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import random_matrix

from lift_lightning import SelectionConfig, select, select_indices
from lift_lightning.errors import ConfigError

SHAPES = [(20, 30), (33, 16)]


def brute_force(scores: torch.Tensor, k: int, *, largest: bool = True) -> torch.Tensor:
    """The k best flat indices, the lower one of equal scores, ascending."""
    ranked = sorted(range(scores.numel()), key=lambda i: (-scores.flatten()[i] if largest else scores.flatten()[i], i))
    return torch.tensor(sorted(ranked[:k]))


def directions_of(weight: torch.Tensor, places: list[int]) -> torch.Tensor:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return (left[:, places] * values[places]) @ right[places]


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("directions", "places"),
    [("largest", [0, 1, 2, 3, 4]), ("smallest", [-5, -4, -3, -2, -1]), ("hybrid", [0, 1, 2, -2, -1])],
)
def test_directions_against_the_full_svd(directions, places, shape, keep):
    weight = random_matrix(*shape)
    config = SelectionConfig(density=0.2, lra_rank=5, directions=directions, keep=keep)
    expected = brute_force(directions_of(weight, places).abs(), config.budget(*shape), largest=keep == "largest")
    assert torch.equal(select_indices(weight, config), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_directions_are_some_of_the_singular_directions(shape):
    weight, side = random_matrix(*shape), min(shape)
    config = SelectionConfig(density=0.2, lra_rank=side - 2, directions="random", seed=3)
    found = select_indices(weight, config)
    left_out = itertools.combinations(range(side), 2)
    possible = [
        brute_force(directions_of(weight, [i for i in range(side) if i not in two]).abs(), found.numel())
        for two in left_out
    ]
    assert any(torch.equal(found, one) for one in possible)
    assert torch.equal(found, select_indices(weight, config))
    assert not torch.equal(found, select_indices(weight, SelectionConfig(**{**vars(config), "seed": 4})))


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({"criterion": "magnitude"}, lambda w, g: w.abs()),
        ({"criterion": "gradient"}, lambda w, g: g.abs()),
        ({"criterion": "gradient", "gradient_power": 2}, lambda w, g: g.abs()),
        ({"criterion": "movement"}, lambda w, g: -w * g),
    ],
)
def test_scores_of_entries(settings, scores, keep):
    weight, gradient = random_matrix(20, 30), random_matrix(20, 30, seed=9)
    config = SelectionConfig(density=0.1, keep=keep, **settings)
    expected = brute_force(scores(weight, gradient), 60, largest=keep == "largest")
    assert torch.equal(select(weight, config, statistics=gradient).indices, expected)


@pytest.mark.parametrize("criterion", ["gradient", "movement"])
def test_gradients_that_are_missing_or_of_another_shape_are_asked_for(criterion):
    for statistics in (None, torch.ones(3, 3)):
        with pytest.raises(ValueError, match=f"criterion={criterion} needs the gradient statistics"):
            select(random_matrix(20, 30), SelectionConfig(criterion=criterion), statistics=statistics)


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("block", [(1, -1), (-1, 1), (4, 3), (2, 5), (-1, 10), (-1, -1)])
@pytest.mark.parametrize("criterion", ["lift", "magnitude", "movement"])
def test_blocks_rows_and_columns(criterion, block, keep):
    """Whole blocks, those whose sum is best: of the squares, or of scores that have a sign."""
    weight, gradient = random_matrix(20, 30), random_matrix(20, 30, seed=9)
    config = SelectionConfig(criterion=criterion, density=0.3, lra_rank=4, block=block, keep=keep)
    high, wide = (side if size == -1 else size for size, side in zip(block, (20, 30), strict=True))
    scores = {
        "lift": directions_of(weight, [0, 1, 2, 3]) ** 2,
        "magnitude": weight.double() ** 2,
        "movement": -weight.double() * gradient.double(),
    }[criterion]
    sums = scores.reshape(20 // high, high, 30 // wide, wide).sum(dim=(1, 3))
    chosen = torch.zeros(sums.numel(), dtype=torch.bool)
    chosen[brute_force(sums, max(1, 180 // (high * wide)), largest=keep == "largest")] = True
    mask = chosen.view(sums.shape).repeat_interleave(high, 0).repeat_interleave(wide, 1)
    found = select(weight, config, statistics=gradient).indices
    assert torch.equal(found, mask.flatten().nonzero().squeeze(1))


def test_a_block_that_does_not_divide_the_matrix_is_refused():
    with pytest.raises(ConfigError, match="blocks of 20x7 do not divide a 20x30 matrix"):
        select_indices(random_matrix(20, 30), SelectionConfig(block=(-1, 7)))


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("block", [None, (2, 5)])
def test_what_is_kept_comes_first(block, keep):
    weight = random_matrix(20, 30)
    config = SelectionConfig(criterion="magnitude", density=0.2, block=block, keep=keep)
    opposite = SelectionConfig(
        criterion="magnitude", density=0.1, block=block, keep="smallest" if keep == "largest" else "largest"
    )
    kept = torch.zeros(20, 30, dtype=torch.bool)
    kept.view(-1)[select_indices(weight, opposite)] = True
    found = torch.zeros(20, 30, dtype=torch.bool)
    found.view(-1)[select(weight, config, kept=kept).indices] = True
    assert bool(found[kept].all())
    assert int(found.sum()) == 120
    # The rest is what would have been chosen anyway, as far as the budget goes.
    alone = torch.zeros(20, 30, dtype=torch.bool)
    alone.view(-1)[select_indices(weight, SelectionConfig(**{**vars(config), "density": 0.1}))] = True
    assert torch.equal(found, kept | alone)
