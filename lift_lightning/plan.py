"""Which rank decomposes which matrix, and when: all compute at once, and each matrix is decomposed by one of them.

Letters: W ranks; M, N rows and columns of a matrix, S the shorter of them; R rank of the approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lift_lightning.lowrank import decomposition_cost
from lift_lightning.selection import SelectionConfig

# Multiplications that take as long as ranking the score of one entry.
_RANKING = 100


@dataclass(frozen=True)
class Unit:
    """What one rank works on at one time: a matrix of a parameter, whole, or the two that share it.

    Attributes:
        parameter: its place among the sparse parameters.
        block: which matrix of it; 0 but for fused experts.
        shape: (M, N).
        cost: of its decomposition, in multiplications.
    """

    parameter: int
    block: int
    shape: tuple[int, int]
    cost: float

    @property
    def start(self) -> int:
        """Its first flat index in the parameter."""
        return self.block * self.entries

    @property
    def entries(self) -> int:
        """How many it has; they lie together."""
        return self.shape[0] * self.shape[1]


def units_of(shapes: Sequence[Sequence[int]], config: SelectionConfig) -> list[Unit]:
    """The units of parameters of shape (M, N), or (E, M, N) for fused experts."""
    units = []
    for i, shape in enumerate(shapes):
        rows, columns = shape[-2:]
        cost = decomposition_cost(rows, columns, config.approximation_rank) if config.criterion == "lift" else 0.0
        cost += _RANKING * rows * columns
        units += [Unit(i, block, (rows, columns), cost) for block in range(shape[0] if len(shape) == 3 else 1)]
    return units


def assign(units: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """For each rank its units, the costliest first.

    The next one, by cost, always goes to the rank that has least so far (Graham 1969): no rank is left with more than
    the mean and one unit. A function of its arguments alone, so that all ranks find the same.
    """
    loads = [0.0] * ranks
    owned: list[list[Unit]] = [[] for _ in range(ranks)]
    for unit in sorted(units, key=lambda u: (-u.cost, u.parameter, u.block)):
        rank = loads.index(min(loads))
        loads[rank] += unit.cost
        owned[rank].append(unit)
    return owned


def turns(units: Sequence[Unit], ranks: int) -> list[list[Unit | None]]:
    """In each turn every rank works on one unit, or on none where it has no more."""
    owned = assign(units, ranks)
    length = max(len(mine) for mine in owned)
    return [[mine[i] if i < len(mine) else None for mine in owned] for i in range(length)]
