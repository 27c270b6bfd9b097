"""The plan of a refresh over ranks: balanced, complete, and the same for all."""

from __future__ import annotations

import pytest

from lift_lightning.lowrank import decomposition_cost
from lift_lightning.plan import Unit, assign, turns, units_of
from lift_lightning.selection import SelectionConfig

SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30
LLAMA_2_7B = [(4096, 4096)] * 4 * 32 + [(11008, 4096), (11008, 4096), (4096, 11008)] * 32


@pytest.mark.parametrize("rank", [32, 128])
@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("shapes", [SMOLLM2, LLAMA_2_7B], ids=["SmolLM2-135M", "LLaMA-2-7B"])
def test_no_rank_has_a_fifth_more_than_the_mean(shapes: list[tuple[int, int]], ranks: int, rank: int):
    loads = [sum(u.cost for u in mine) for mine in assign(units_of(shapes, SelectionConfig(rank=rank)), ranks)]
    assert max(loads) / (sum(loads) / ranks) <= 1.2


@pytest.mark.parametrize("ranks", [1, 3, 8, 300])
def test_every_unit_has_its_turn_once(ranks: int):
    units = units_of(SMOLLM2, SelectionConfig(rank=8))
    planned = turns(units, ranks)
    assert all(len(turn) == ranks for turn in planned)
    had = [unit for turn in planned for unit in turn if unit is not None]
    assert sorted(had, key=lambda u: u.parameter) == units


def test_the_units_of_one_turn_cost_alike():
    for turn in turns(units_of(LLAMA_2_7B, SelectionConfig()), 8)[:-1]:
        costs = [unit.cost for unit in turn if unit is not None]
        assert max(costs) <= 3 * min(costs)


def test_fused_experts_are_units_of_their_own():
    units = units_of([(3, 10, 4), (5, 6)], SelectionConfig())
    assert [(u.parameter, u.block, u.start, u.entries) for u in units] == [
        (0, 0, 0, 40),
        (0, 1, 40, 40),
        (0, 2, 80, 40),
        (1, 0, 0, 30),
    ]


def test_the_plan_is_a_function_of_its_arguments():
    units = [Unit(i, 0, (4, 4), 1.0) for i in range(5)]
    assert [[u.parameter for u in mine] for mine in assign(units, 2)] == [[0, 2, 4], [1, 3]]
    assert assign(list(reversed(units)), 2) == assign(units, 2)


def test_other_criteria_cost_by_size():
    small, large = units_of([(10, 10), (100, 100)], SelectionConfig(criterion="magnitude"))
    assert large.cost == 100 * small.cost


def test_a_decomposition_costs_what_its_solver_does():
    subspace = decomposition_cost(4096, 11008, 128)
    assert subspace == decomposition_cost(11008, 4096, 128)
    assert subspace < 11008 * 4096 * (128 + 4 * 160)
    assert decomposition_cost(192, 576, 128) > 18 * 192**3  # exact
    assert decomposition_cost(64, 500, 64) == 0  # plain magnitude
