"""Means with 95% intervals, and Markdown tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Student's t, 97.5%, by degrees of freedom (any table; for example NIST/SEMATECH e-Handbook, 1.3.6.7.2).
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Interval(NamedTuple):
    """Mean of some runs and half the width of its 95% interval; NaN of a single run.

    The interval is Student's, of runs that differ by their seed. Of accuracies near 0 or 1 it may reach over the end.
    """

    mean: float
    half: float
    runs: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Of at least one run."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, 1)
    return Interval(mean, T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)), len(values))


def geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower end of the 95% interval, geometric mean, upper end: for what is drawn on a logarithmic axis."""
    logs = interval([math.log(value) for value in values])
    return math.exp(logs.low), math.exp(logs.mean), math.exp(logs.high)


def written(found: Interval, form: str = ".3f", *, percent: bool = False) -> str:
    """`0.953 ± 0.012`, or `95.3 ± 1.2%`; a single run without the interval."""
    factor, unit = (100.0, "%") if percent else (1.0, "")
    mean = format(factor * found.mean, form)
    return f"{mean}{unit}" if found.runs == 1 else f"{mean} ± {factor * found.half:{form}}{unit}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is to the left and the others to the right."""
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
