"""How many entries an adapter trains, and the rank that spends a budget.

Letters: M, N rows and columns of one matrix; r rank of its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from lift_lightning.errors import ConfigError


def trained_entries(method: str, shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Over matrices of these shapes: r * (M + N) each, with DoRA's magnitudes M more."""
    return sum(rank * (rows + columns) + (rows if method == "dora" else 0) for rows, columns in shapes)


def largest_rank(method: str, shapes: Sequence[tuple[int, int]], budget: int) -> int:
    """The largest rank at which the adapters train no more than `budget` entries.

    Raises:
        ConfigError: if one of rank 1 trains more.
    """
    least = trained_entries(method, shapes, 1)
    if least > budget:
        raise ConfigError(
            f"match_budget: method={method} trains {least:,} entries at rank 1 already, the budget is {budget:,}: set "
            "a larger lift.rank or lift.density"
        )
    each = sum(rows + columns for rows, columns in shapes)
    return 1 + (budget - least) // each
