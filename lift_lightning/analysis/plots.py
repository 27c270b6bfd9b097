"""How figures look: colours that the colour-blind can tell apart, axes with units, nothing that is not data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lift_lightning.analysis.report import Row, by_layer

# Okabe & Ito (2008), without the yellow, which is faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
# See-through, so that what lies under it is not lost.
LEGEND: dict[str, Any] = {"edgecolor": "none", "framealpha": 0.6}


def canvas(columns: int = 1, rows: int = 1, *, width: float = 4.8, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for one in axes:
        one.grid(alpha=0.3)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series: both differ, so that a print in grey can be read."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def over_depth(axes: Axes, rows: Sequence[Row], key: str, label: str, *, legend: bool = True) -> None:
    """A number of each matrix against the depth of its block, a line for each type of layer."""
    for i, (layer, members) in enumerate(by_layer(rows).items()):
        values: dict[int, list[float]] = {}
        for row in members:
            values.setdefault(int(row["depth"]), []).append(float(row[key]))
        means = {depth: sum(found) / len(found) for depth, found in sorted(values.items())}
        axes.plot(list(means), list(means.values()), label=layer, markersize=4, linewidth=1.2, **style(i))
    axes.set(xlabel="block", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        axes.legend(fontsize=8, ncols=2, **LEGEND)


def heat_map(axes: Axes, values: Sequence[Sequence[float]], across: Sequence[str], down: Sequence[str]) -> None:
    """Numbers between 0 and 1, written into their cells."""
    axes.grid(visible=False)
    axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(across)), across, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(down)), down, fontsize=8)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")


def lines(axes: Axes, series: Mapping[str, Mapping[float, Sequence[float]]], *, first_style: int = 0) -> None:
    """Means with the range from the lowest to the highest shaded; of each label the values at each x."""
    for i, (label, points) in enumerate(series.items(), first_style):
        middle = [sum(values) / len(values) for values in points.values()]
        axes.plot(list(points), middle, label=label, markersize=4, **style(i))
        low, high = ([end(values) for values in points.values()] for end in (min, max))
        axes.fill_between(list(points), low, high, alpha=0.2, color=COLOURS[i % len(COLOURS)], linewidth=0)
