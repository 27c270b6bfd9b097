"""Table and figure of LIFT's settings, changed one at a time (study 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.learning import STUDY
from benchmarks.studies.learning_cases import (
    COMPONENT_BUDGET,
    COMPONENTS,
    DENSITIES,
    FEWER_SEEDS,
    HEAT_LRA_RANKS,
    HEAT_RANKS,
    HEAT_SEEDS,
    INTERVALS,
    LRA_RANKS,
    RATES,
    SIZE_RATES,
    SIZE_SEED,
    VARIANT_RATE,
    Case,
)
from benchmarks.studies.learning_results import accuracy, percent, runs_of
from benchmarks.studies.records import RUNS, Run, Store
from benchmarks.studies.summary import Interval, interval, markdown, written
from benchmarks.studies.update_results import update_figures
from lift_lightning.analysis.plots import LEGEND, canvas, heat_map, style


class Setting(NamedTuple):
    """What is changed, with its unit, and of each variant the value; the empty name is LIFT as it is."""

    title: str
    values: Mapping[str, str]
    ordered: bool = True  # whether the values are joined by a line


def _in_order(values: Mapping[float, str], unchanged: float) -> dict[str, str]:
    """Names of variants by rising value, LIFT as it is among them."""
    return {name: f"{value:g}" for value, name in sorted({**values, unchanged: ""}.items())}


# LIFT as it is: 5.2% of the entries, on the approximation of rank 16, chosen anew every 50 steps.
SETTINGS: dict[str, Setting] = {
    "interval": Setting(
        "steps between refreshes", {**_in_order({n: f"interval{n}" for n in INTERVALS}, 50), "fixed": "never"}
    ),
    "directions": Setting(
        "singular directions kept",
        {"": "largest", **{f"directions-{name}": name for name in ("hybrid", "random", "smallest")}},
        ordered=False,
    ),
    "lra_rank": Setting("rank of the approximation", _in_order({r: f"lra{r}" for r in LRA_RANKS}, 16)),
}


# At three rates each, one seed.
SIZES: dict[str, Setting] = {
    "component": Setting(
        f"type of layer: {COMPONENT_BUDGET:,} entries in one",
        {name: name.removesuffix("_proj") for name in COMPONENTS},
        ordered=False,
    ),
    "density": Setting("entries trained, %", _in_order({100 * d: f"density{d:g}" for d in DENSITIES}, 5.2)),
}


def variant_runs(store: Store, name: str) -> list[Run]:
    """The seeds of one variant; the empty name is LIFT as it is."""
    return runs_of(store, [Case("lift", VARIANT_RATE, seed, name) for seed in FEWER_SEEDS])


def effective_rank(runs: Sequence[Run]) -> Interval:
    """Of the update, as a share of the full one: the mean over the matrices that were trained, over seeds."""
    return interval([update_figures(run)["effective_rank"] for run in runs])


def variant_table(folder: Path = RUNS) -> str:
    """Accuracies and effective rank of the update of every variant."""
    store = Store(STUDY, folder)
    rows = []
    for title, values, _ in SETTINGS.values():
        for i, (name, text) in enumerate(values.items()):
            if runs := variant_runs(store, name):
                value = f"{text} (as it is)" if not name else text
                accuracies = [percent(accuracy(runs, skill)) for skill in ("target", "source")]
                rank = written(effective_rank(runs), ".1f", percent=True)
                rows.append([title if i == 0 else "", value, str(len(runs)), *accuracies, rank])
    return markdown(["setting", "value", "seeds", "target", "source", "effective rank of the update, of full"], rows)


def size_runs(store: Store, question: str) -> dict[str, dict[float, Run]]:
    """Of each value of a setting the runs that are there, by rate."""
    return {
        text: {lr: run for lr in RATES for run in runs_of(store, [Case("lift", lr, SIZE_SEED, name)])}
        for name, text in SIZES[question].values.items()
    }


def size_table(folder: Path = RUNS) -> str:
    """Target and source at every rate that was run: one seed."""
    store, rows = Store(STUDY, folder), []
    rates = sorted({lr for some in SIZE_RATES.values() for lr in some})
    for question, (title, _, _) in SIZES.items():
        for i, (text, runs) in enumerate(size_runs(store, question).items()):
            cells = [_pair(runs[lr]) if lr in runs else "" for lr in rates]
            rows.append([title if i == 0 else "", text, *cells])
    return markdown(["target / source, %", "", *(f"{lr:g}" for lr in rates)], rows)


def _pair(run: Run) -> str:
    return f"{100 * run['accuracy']['target']:.0f} / {100 * run['accuracy']['source']:.0f}"


def draw_variants(folder: Path = RUNS) -> Figure:
    """Target and source against each setting, effective rank of the update against the approximation's, heat maps."""
    store = Store(STUDY, folder)
    figure, every = canvas(2, 4, width=5.2, height=3.1)
    for axes, setting in zip(every, SETTINGS.values(), strict=False):
        _accuracies(axes, store, setting)
    every[0].legend(fontsize=8, **LEGEND)
    _ranks(every[3], store)
    for axes, skill in zip(every[4:], ("target", "source"), strict=False):
        _heat(axes, store, skill)
    for axes, question in zip(every[6:], SIZES, strict=True):
        _sizes(axes, store, question)
    return figure


def _sizes(axes: Axes, store: Store, question: str) -> None:
    """Target against source over the rates, a line for each value, the lowest rate at the right."""
    for i, (text, runs) in enumerate(size_runs(store, question).items()):
        source, target = ([100 * run["accuracy"][skill] for run in runs.values()] for skill in ("source", "target"))
        axes.plot(source, target, label=text, linewidth=1.1, markersize=5, **style(i))
    axes.set(xlabel="source accuracy, %", ylabel="target accuracy, %", xlim=(-3, 103), ylim=(-3, 103))
    axes.legend(fontsize=8, title=SIZES[question].title, title_fontsize=8, ncols=2, **LEGEND)


def _there(store: Store, setting: Setting) -> dict[str, list[Run]]:
    found = {text: variant_runs(store, name) for name, text in setting.values.items()}
    return {text: runs for text, runs in found.items() if runs}


def _accuracies(axes: Axes, store: Store, setting: Setting) -> None:
    there = _there(store, setting)
    for i, skill in enumerate(("target", "source")):
        _line(axes, [accuracy(runs, skill) for runs in there.values()], skill, i, joined=setting.ordered)
    axes.set_xticks(range(len(there)), list(there))
    axes.set(xlabel=setting.title, ylabel="accuracy, %", ylim=(-3, 103))


def _ranks(axes: Axes, store: Store) -> None:
    there = _there(store, SETTINGS["lra_rank"])
    _line(axes, [effective_rank(runs) for runs in there.values()], "", 0)
    axes.set_xticks(range(len(there)), list(there))
    axes.set(xlabel=SETTINGS["lra_rank"].title, ylabel="effective rank of update, %", ylim=(-3, 103))


def _line(axes: Axes, found: Sequence[Interval], label: str, i: int, *, joined: bool = True) -> None:
    means, halves = [100 * one.mean for one in found], [100 * one.half for one in found]
    look = {"linestyle": "-" if joined else "none", **style(i)}
    places = [place + 0.08 * i for place in range(len(found))]  # beside the other skill's interval
    axes.errorbar(places, means, halves, label=label, capsize=2, markersize=5, linewidth=1.2, **look)


def _heat(axes: Axes, store: Store, skill: str) -> None:
    values = [[_heat_cell(store, rank, lra, skill) for lra in HEAT_LRA_RANKS] for rank in HEAT_RANKS]
    heat_map(axes, values, [str(rank) for rank in HEAT_LRA_RANKS], [str(rank) for rank in HEAT_RANKS])
    axes.set(xlabel="rank of the approximation", ylabel="rank of the budget", title=f"{skill} accuracy")


def _heat_cell(store: Store, rank: int, lra: int, skill: str) -> float:
    """Mean of the seeds; LIFT as it is, with the budget of rank 8 and the approximation of rank 16."""
    name = f"rank{rank}-lra{lra}" if rank != 8 else "" if lra == 16 else f"lra{lra}"
    runs = runs_of(store, [Case("lift", VARIANT_RATE, seed, name) for seed in HEAT_SEEDS])
    return accuracy(runs, skill).mean if runs else float("nan")
