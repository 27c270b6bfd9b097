"""Which adapter methods there are, what a rank of each costs, and how far a rank can go.

Letters: M, N rows and columns of a matrix (outputs and inputs of its layer); r rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lift_lightning.errors import ConfigError

AdapterName = Literal["lora", "rslora", "dora", "pissa", "shira", "spectral"]
Shape = tuple[int, int]


@dataclass(frozen=True)
class AdapterMethod:
    """What is known of a method without a model.

    Attributes:
        name: what `method` says.
        title: what people call it, and its paper.
        marks: what names of its trained parameters contain, and no others.
        entries: (M, N, r) -> numbers that it trains of one matrix.
        largest_rank: (M, N) -> the largest rank that it has there, None where there is no bound.
        alpha: r -> alpha where none is given; None where the method has no alpha.
        transposed: whether it also serves transformers' `Conv1D`, beside `nn.Linear`.
        by_peft: whether peft makes it; else this package does.
    """

    name: AdapterName
    title: str
    marks: str
    entries: Callable[[int, int, int], int]
    largest_rank: Callable[[int, int], int | None] = lambda rows, columns: None
    alpha: Callable[[int], float] | None = None
    transposed: bool = False
    by_peft: bool = True


def _of_two_factors(rows: int, columns: int, rank: int) -> int:
    return rank * (rows + columns)


def _twice(rank: int) -> float:
    return 2.0 * rank


# LoRA practice sets alpha to twice the rank; PiSSA's paper (section 4) to the rank, so that A and B begin as factors of
# the principal part itself.
METHODS: dict[AdapterName, AdapterMethod] = {
    "lora": AdapterMethod("lora", "LoRA (arXiv 2106.09685)", ".lora_", _of_two_factors, alpha=_twice, transposed=True),
    "rslora": AdapterMethod(
        "rslora", "rsLoRA (arXiv 2312.03732)", ".lora_", _of_two_factors, alpha=_twice, transposed=True
    ),
    "dora": AdapterMethod(
        "dora",
        "DoRA (arXiv 2402.09353)",
        ".lora_",
        lambda rows, columns, rank: rank * (rows + columns) + rows,  # a magnitude for each row beside the factors
        alpha=_twice,
        transposed=True,
    ),
    "pissa": AdapterMethod(
        "pissa", "PiSSA (arXiv 2404.02948)", ".lora_", _of_two_factors, min, alpha=float, transposed=True
    ),
    "shira": AdapterMethod(
        "shira",
        "SHiRA, random mask (arXiv 2406.13175)",
        ".shira_weight.",
        _of_two_factors,
        lambda rows, columns: rows * columns // (rows + columns),  # no more entries than the matrix has
    ),
    "spectral": AdapterMethod(
        "spectral", "Spectral Adapter, additive (arXiv 2405.13952)", ".spectral_a", _of_two_factors, min, by_peft=False
    ),
}


def trained_entries(method: AdapterName, shapes: Iterable[Shape], rank: int) -> int:
    """How many numbers an adapter trains.

    Args:
        method: its name.
        shapes: (M, N) of each matrix.
        rank: r, the same for all.
    """
    return sum(METHODS[method].entries(rows, columns, rank) for rows, columns in shapes)


def check_rank(method: AdapterName, shapes: dict[str, Shape], rank: int) -> None:
    """Whether every matrix allows the rank.

    Raises:
        ConfigError: naming the matrix that allows the least, and that rank.
    """
    if rank < 1:
        raise ConfigError(f"adapter_rank must be at least 1, got {rank}")
    bounds = {name: METHODS[method].largest_rank(*shape) for name, shape in shapes.items()}
    bounded = {name: bound for name, bound in bounds.items() if bound is not None}
    if bounded and rank > (least := min(bounded.values())):
        name = next(name for name, bound in bounded.items() if bound == least)
        rows, columns = shapes[name]
        remedy = f"set adapter_rank to at most {least}" if least else "leave it out of target_modules"
        raise ConfigError(
            f"adapter_rank={rank} is too large for method={method!r}: {name} is {rows} x {columns}, which allows "
            f"{least}; {remedy}"
        )
