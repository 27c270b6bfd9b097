"""Tables and figures of study 4, of the runs that are there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.learning import STUDY
from benchmarks.studies.learning_cases import (
    HEADLINE,
    LEARNED,
    METHODS,
    RATES,
    SEEDS,
    Case,
    bracket_cases,
    brackets,
    chosen_rates,
    level_seeds,
    tuning_cases,
)
from benchmarks.studies.records import RUNS, Run, Store
from benchmarks.studies.summary import Interval, interval, markdown, written
from lift_lightning.analysis.plots import COLOURS, LEGEND, canvas, style

SKILLS = ("target", "source", "bridge")
SHAPES = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)}
SHAPES |= {"gate": (640, 256), "up": (640, 256), "down": (256, 640)}
# Drawn in one panel; the others, beside LIFT, in another.
SHOWN = ("full", "lora", "pissa", "lift", "lift-smallest", "magnitude", "random")


def runs_of(store: Store, cases: Iterable[Case]) -> list[Run]:
    """Those that are there."""
    return [store.load(case.name) for case in cases if store.has(case.name)]


def accuracy(runs: Sequence[Run], skill: str) -> Interval:
    """Of one skill, over seeds."""
    return interval([run["accuracy"][skill] for run in runs])


def percent(found: Interval) -> str:
    """With one digit."""
    return written(found, ".1f", percent=True)


# ---------------------------------------------------------------- rates


def rate_table(folder: Path = RUNS) -> str:
    """Validation accuracy on the target and accuracy on the source at every rate; the chosen one in bold."""
    store = Store(STUDY, folder)
    chosen = chosen_rates(store)
    rows = []
    for method, (label, _, _) in METHODS.items():
        cells = []
        for lr in RATES:
            runs = runs_of(store, tuning_cases([method], [lr]))
            text = (
                f"{100 * runs[0]['accuracy']['target']:.0f} / {100 * runs[0]['accuracy']['source']:.0f}" if runs else ""
            )
            cells.append(f"**{text}**" if chosen.get(method) == lr else text)
        rows.append([label, *cells])
    return markdown(["target / source, %", *(f"{lr:g}" for lr in RATES)], rows)


def draw_frontier(folder: Path = RUNS) -> Figure:
    """Target against source over the rates, a line for each method: one seed, validation questions."""
    store = Store(STUDY, folder)
    figure, every = canvas(2, width=5.6, height=4.6)
    groups = (SHOWN, tuple(method for method in METHODS if method not in SHOWN or method == "lift"))
    for axes, methods in zip(every, groups, strict=True):
        for i, method in enumerate(methods):
            runs = runs_of(store, tuning_cases([method]))
            _path(axes, runs, METHODS[method][0], i)
        _skill_axes(axes)
        axes.legend(fontsize=8, loc="lower center", ncols=2, **LEGEND)
    return figure


def _path(axes: Axes, runs: Sequence[Run], label: str, i: int) -> None:
    source, target = ([100 * run["accuracy"][skill] for run in runs] for skill in ("source", "target"))
    axes.plot(source, target, label=label, linewidth=1.1, markersize=5, alpha=0.9, **style(i))


def _skill_axes(axes: Axes) -> None:
    axes.set(xlabel="source accuracy, % (what was known)", ylabel="target accuracy, % (what was learned)")
    axes.set(xlim=(-3, 103), ylim=(-3, 103))


# ---------------------------------------------------------------- fresh seeds


def main_runs(folder: Path = RUNS) -> dict[str, list[Run]]:
    """The five seeds of each method at its best rate."""
    store = Store(STUDY, folder)
    found = {method: runs_of(store, [Case(method, lr, n) for n in SEEDS]) for method, lr in chosen_rates(store).items()}
    return {method: runs for method, runs in found.items() if runs}


def main_table(folder: Path = RUNS) -> str:
    """Accuracies with intervals at the best rate, entries trained and changed, memory."""
    rows = []
    for method, runs in main_runs(folder).items():
        rows.append(
            [
                METHODS[method][0],
                _rate(runs[0]["lr"]),
                str(len(runs)),
                *(percent(accuracy(runs, skill)) for skill in SKILLS),
                f"{runs[0]['trained']:,}",
                f"{statistics.fmean(entries_changed(run) for run in runs):,.0f}",
                mebibytes(runs[0]),
            ]
        )
    heads = ["", "best rate", "seeds", *SKILLS, "numbers trained at a time", "entries changed in the end"]
    return markdown([*heads, "state and gradients, MiB"], rows)


def entries_changed(run: Run) -> float:
    """Of the 28 matrices: with a mask that is chosen anew, more than are trained at a time."""
    return sum(one["changed"] * math.prod(shape_of(name)) for name, one in run["updates"].items())


def shape_of(name: str) -> tuple[int, int]:
    """(M, N) of a matrix of the bundled model."""
    return SHAPES[name.rsplit(".", 2)[1].removesuffix("_proj")]


def mebibytes(run: Run) -> str:
    """Of the optimizer's state and the gradients, which a sparse state has in it and a dense one beside it.

    Full fine-tuning of the matrices alone was run as a mask of everything, and takes what no one would spend on it.
    """
    method = run["case"]["method"]
    if method == "full-matrices":
        return ""
    beside = 0 if run["refreshes"] else 4 * run["trained"]
    return f"{(run['state_bytes'] + beside) / 2**20:.2f}"


def _rate(lr: float) -> str:
    """With a mark where it is an end of the grid, and a better one may lie beyond."""
    return f"{lr:g}{' (end)' if lr in (min(RATES), max(RATES)) else ''}"


def source_at(runs: Sequence[Run], level: float = LEARNED) -> float | None:
    """Source accuracy where the target reaches a level first, with rising rate; between two runs in a straight line.

    Args:
        runs: of one method and seed, by rising rate.
        level: of the target.

    Returns:
        None if no run reaches it. Where the lowest rate does already, that run's.
    """
    before: Run | None = None
    for run in runs:
        source, target = run["accuracy"]["source"], run["accuracy"]["target"]
        if target >= level:
            if before is None:
                return source
            part = (level - before["accuracy"]["target"]) / (target - before["accuracy"]["target"])
            return before["accuracy"]["source"] + part * (source - before["accuracy"]["source"])
        before = run
    return None


def sources_at(store: Store, method: str, level: float = LEARNED) -> dict[int, float | None]:
    """The same of every seed that was run on both sides of the level."""
    found = {}
    for seed in level_seeds(method):
        cases = bracket_cases(store, method, seed, level)
        if cases and all(store.has(case.name) for case in cases):
            found[seed] = source_at(runs_of(store, [Case(method, lr, seed) for lr in RATES]), level)
    return found


def level_table(folder: Path = RUNS) -> str:
    """Target and source on both sides of the level, the source at it, and how much more of it LIFT has."""
    store, rows = Store(STUDY, folder), []
    lift = _reached(sources_at(store, "lift"))
    for method, rates in brackets(store).items():
        sides = [runs_of(store, [Case(method, lr, seed) for seed in level_seeds(method)]) for lr in rates]
        if not all(sides):
            continue
        cells = [
            f"{lr:g}: {100 * accuracy(runs, 'target').mean:.0f} / {100 * accuracy(runs, 'source').mean:.0f}"
            for lr, runs in zip(rates, sides, strict=True)
        ]
        sources = sources_at(store, method)
        reached = _reached(sources)
        pairs = [100 * (lift[seed] - reached[seed]) for seed in reached if seed in lift]
        rows.append(
            [
                METHODS[method][0],
                *cells,
                ", ".join("not reached" if one is None else f"{100 * one:.0f}" for one in sources.values()),
                percent(interval(list(reached.values()))) if reached else "",
                written(interval(pairs), ".1f") if pairs and method != "lift" else "",
            ]
        )
    heads = [
        "below: target / source, %",
        "above: target / source, %",
        f"source at {LEARNED:.0%}, seed by seed",
        "mean",
    ]
    return markdown(["", *heads, "LIFT's less this, points"], rows)


def _reached(sources: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: source for seed, source in sources.items() if source is not None}


def headline_table(folder: Path = RUNS) -> str:
    """Of the methods that are asked for most: the source at the level, target and source at the best rate, memory."""
    store, best, rows = Store(STUDY, folder), main_runs(folder), []
    for method in (method for method in HEADLINE if method in best):
        reached = list(_reached(sources_at(store, method)).values())
        kept = percent(interval(reached)) if reached else ""
        at_best = [percent(accuracy(best[method], skill)) for skill in ("target", "source")]
        rows.append([METHODS[method][0], kept, *at_best, mebibytes(best[method][0])])
    heads = [f"source at {LEARNED:.0%} target", "best rate: target", "source", "state and gradients, MiB"]
    return markdown(["", *heads], rows)


def draw_main(folder: Path = RUNS) -> Figure:
    """Every seed, means and 95% intervals: the source where the target is learned, and both at the best rate."""
    store = Store(STUDY, folder)
    figure, (first, second) = canvas(2, width=5.8, height=4.8)
    kept = {method: list(_reached(sources_at(store, method)).values()) for method in brackets(store)}
    kept = {method: sources for method, sources in kept.items() if sources}
    row_by_row(first, kept)
    first.set(xlabel="source accuracy, %", title=f"where {LEARNED:.0%} of the target is learned")
    best = main_runs(folder)
    remarks = {method: f" ({runs[0]['lr']:g})" for method, runs in best.items()}
    for offset, skill, fill in ((-0.15, "target", "full"), (0.15, "source", "none")):
        shares = {method: [run["accuracy"][skill] for run in runs] for method, runs in best.items()}
        row_by_row(second, shares, offset, fill, remarks)
    second.set(xlabel="accuracy on target (filled) and source (open), %", title="at the best rate for the target")
    return figure


def row_by_row(
    axes: Axes,
    series: Mapping[str, Sequence[float]],
    offset: float = 0.0,
    fill: str = "full",
    remarks: Mapping[str, str] | None = None,
) -> None:
    """Shares of each method in a row: every seed in grey, their mean and its interval."""
    looks = {method: style(i) for i, method in enumerate(METHODS)}
    for i, (method, values) in enumerate(series.items()):
        one, height = interval(values), i + offset
        axes.plot([100 * value for value in values], [height] * len(values), "|", color="grey", markersize=7)
        half = {"xerr": 100 * one.half, "capsize": 2, "fillstyle": fill, "markersize": 6}
        axes.errorbar(100 * one.mean, height, **half, **looks[method])
    labels = [f"{METHODS[method][0]}{(remarks or {}).get(method, '')}" for method in series]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-3, 103)


def draw_losses(folder: Path = RUNS, window: int = 10) -> Figure:
    """Training loss of every step (Fig. 15): means over the seeds, smoothed over ten steps."""
    figure, every = canvas(2, width=5.4)
    found = main_runs(folder)
    groups = (SHOWN, tuple(method for method in METHODS if method not in SHOWN or method == "lift"))
    for axes, methods in zip(every, groups, strict=True):
        for i, method in enumerate(method for method in methods if method in found):
            curves = [[math.nan if loss is None else loss for loss in run["losses"]] for run in found[method]]
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            smooth = [statistics.fmean(mean[max(0, j - window + 1) : j + 1]) for j in range(len(mean))]
            label = f"{METHODS[method][0]} ({found[method][0]['lr']:g})"
            line = "-" if i < len(COLOURS) else "--"
            axes.plot(range(1, len(smooth) + 1), smooth, line, label=label, linewidth=1.2, color=style(i)["color"])
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.legend(fontsize=8, **LEGEND)
    return figure
