"""Tables and figures of studies 4 and 5, of the runs that are there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.studies.learning import STUDY
from benchmarks.studies.learning_cases import (
    COMPONENTS,
    FEWER_SEEDS,
    HEAT_LRA_RANKS,
    HEAT_RANKS,
    HEAT_SEEDS,
    LEARNED,
    LRA_RANKS,
    METHODS,
    RATES,
    RATES_BETWEEN,
    SEEDS,
    VARIANT_RATE,
    Case,
    chosen_rates,
    lift_variants,
    tuning_cases,
)
from benchmarks.studies.records import RUNS, Run, Store
from benchmarks.studies.summary import Interval, interval, markdown, written
from lift_lightning.analysis.plots import LEGEND, canvas, style

SKILLS = ("target", "source", "bridge")
ALL_RATES = tuple(sorted((*RATES, *RATES_BETWEEN)))
# What is drawn as a line of its own; the others are shown together.
HEADLINE = ("full", "lora", "dora", "pissa", "lift", "magnitude", "random")
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
    rates, chosen = ALL_RATES, chosen_rates(store)
    rows = []
    for method, (label, _, _) in METHODS.items():
        cells = []
        for lr in rates:
            runs = runs_of(store, tuning_cases([method], [lr]))
            text = (
                f"{100 * runs[0]['accuracy']['target']:.0f} / {100 * runs[0]['accuracy']['source']:.0f}" if runs else ""
            )
            cells.append(f"**{text}**" if chosen.get(method) == lr else text)
        rows.append([label, *cells])
    return markdown(["target / source, %", *(f"{lr:g}" for lr in rates)], rows)


def draw_frontier(folder: Path = RUNS) -> Figure:
    """Target against source over the rates, a line for each method: one seed, validation questions."""
    store = Store(STUDY, folder)
    figure, every = canvas(2, width=5.6, height=4.6)
    groups = (SHOWN, tuple(method for method in METHODS if method not in SHOWN or method == "lift"))
    for axes, methods in zip(every, groups, strict=True):
        for i, method in enumerate(methods):
            runs = runs_of(store, tuning_cases([method], ALL_RATES))
            _path(axes, runs, METHODS[method][0], i)
        _skill_axes(axes)
        axes.legend(fontsize=8, loc="lower left", **LEGEND)
    return figure


def _path(axes: Axes, runs: Sequence[Run], label: str, i: int) -> None:
    source, target = ([100 * run["accuracy"][skill] for run in runs] for skill in ("source", "target"))
    axes.plot(source, target, label=label, linewidth=1.1, markersize=5, alpha=0.9, **style(i))


def _skill_axes(axes: Axes) -> None:
    axes.set(xlabel="source accuracy, % (what was known)", ylabel="target accuracy, % (what was learned)")
    axes.set(xlim=(-3, 103), ylim=(-3, 103))


# ---------------------------------------------------------------- the best rate, five seeds


def main_runs(folder: Path = RUNS) -> dict[str, list[Run]]:
    """The five seeds of each method at its best rate."""
    store = Store(STUDY, folder)
    found = {
        method: runs_of(store, [Case(method, lr, seed) for seed in SEEDS]) for method, lr in chosen_rates(store).items()
    }
    return {method: runs for method, runs in found.items() if runs}


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


def main_table(folder: Path = RUNS, methods: Iterable[str] = METHODS) -> str:
    """Accuracies with intervals at the best rate, the source at a level of the target, trained numbers and state."""
    store, rows, found = Store(STUDY, folder), [], main_runs(folder)
    for method in (method for method in methods if method in found):
        runs = found[method]
        kept = source_at(runs_of(store, tuning_cases([method], ALL_RATES)))
        rows.append(
            [
                METHODS[method][0],
                _rate(runs[0]["lr"]),
                str(len(runs)),
                *(percent(accuracy(runs, skill)) for skill in SKILLS),
                "not reached" if kept is None else f"{100 * kept:.0f}%",
                f"{runs[0]['trained']:,}",
                f"{runs[0]['state_bytes'] / 2**20:.2f}",
            ]
        )
    heads = [
        "",
        "best rate",
        "seeds",
        *SKILLS,
        f"source at {LEARNED:.0%} target (seed 0)",
        "numbers trained",
        "state, MiB",
    ]
    return markdown(heads, rows)


def _rate(lr: float) -> str:
    """With a mark where it is an end of the grid, and a better one may lie beyond."""
    return f"{lr:g}{' (end)' if lr in (min(RATES), max(RATES)) else ''}"


def headline_table(folder: Path = RUNS) -> str:
    """The same of the methods that are asked for most."""
    return main_table(folder, HEADLINE)


def draw_main(folder: Path = RUNS) -> Figure:
    """Target against source with 95% intervals."""
    figure, (axes,) = canvas(width=6.4, height=4.8)
    for i, (method, runs) in enumerate(main_runs(folder).items()):
        source, target = accuracy(runs, "source"), accuracy(runs, "target")
        axes.errorbar(
            100 * source.mean,
            100 * target.mean,
            xerr=100 * source.half,
            yerr=100 * target.half,
            label=f"{METHODS[method][0]} ({runs[0]['lr']:g})",
            capsize=2,
            markersize=6,
            linewidth=1.2,
            **style(i),
        )
    _skill_axes(axes)
    axes.legend(fontsize=7, loc="lower right", ncols=2, **LEGEND)
    return figure


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
            axes.plot(range(1, len(smooth) + 1), smooth, label=label, linewidth=1.2, color=style(i)["color"])
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.legend(fontsize=8, **LEGEND)
    return figure


# ---------------------------------------------------------------- LIFT's settings


def variant_runs(store: Store, name: str) -> list[Run]:
    """The seeds of one variant; the empty name is LIFT as it is."""
    return runs_of(store, [Case("lift", VARIANT_RATE, seed, name) for seed in FEWER_SEEDS])


def variant_table(folder: Path = RUNS) -> str:
    """Accuracies of every variant."""
    store = Store(STUDY, folder)
    rows = []
    titles = {
        "interval": "steps between refreshes (50)",
        "directions": "singular directions (largest)",
        "component": "one type of layer, 65,536 entries (all, 143,360)",
        "density": "share of the entries (5.2%)",
        "lra_rank": "rank of the approximation (16)",
    }
    rows.append(["LIFT as it is", "", *_variant_cells(variant_runs(store, ""))])
    for question, values in lift_variants().items():
        for name, _ in values:
            if runs := variant_runs(store, name):
                rows.append([titles[question], name, *_variant_cells(runs)])
    return markdown(["what differs (as it is)", "", "seeds", *SKILLS], rows)


def _variant_cells(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return ["0", "", "", ""]
    return [str(len(runs)), *(percent(accuracy(runs, skill)) for skill in SKILLS)]


def draw_variants(folder: Path = RUNS) -> Figure:
    """Accuracy on target and source against each setting."""
    store = Store(STUDY, folder)
    figure, every = canvas(3, 2, height=3.2)
    numbers = {
        "interval": {"interval5": "5", "interval20": "20", "": "50", "interval100": "100", "fixed": "never"},
        "directions": {"": "largest", "directions-hybrid": "hybrid", "directions-random": "random"}
        | {"directions-smallest": "smallest"},
        "component": {name: name.removesuffix("_proj") for name in COMPONENTS},
        "density": {"density0.01": "1", "density0.02": "2", "": "5.2", "density0.1": "10", "density0.2": "20"},
        "lra_rank": _ranks_in_order(),
    }
    labels = {
        "interval": "steps between refreshes",
        "directions": "singular directions kept",
        "component": "the one type of layer trained",
        "density": "entries trained, %",
        "lra_rank": "rank of the approximation (of 128 or 256)",
    }
    for axes, (question, names) in zip(every, numbers.items(), strict=False):
        _variant_lines(axes, store, names)
        axes.set(xlabel=labels[question], ylabel="accuracy, %", ylim=(-3, 103))
    every[0].legend(fontsize=8, **LEGEND)
    _heat(every[5], store)
    return figure


def _ranks_in_order() -> dict[str, str]:
    found: dict[str, str] = {}
    for rank in sorted((*LRA_RANKS, 16)):
        found["" if rank == 16 else f"lra{rank}"] = str(rank)
    return found


def _variant_lines(axes: Axes, store: Store, names: Mapping[str, str]) -> None:
    there = {name: text for name, text in names.items() if variant_runs(store, name)}
    for i, skill in enumerate(("target", "source")):
        found = [accuracy(variant_runs(store, name), skill) for name in there]
        means, halves = [100 * one.mean for one in found], [100 * one.half for one in found]
        axes.errorbar(range(len(found)), means, halves, label=skill, capsize=2, markersize=5, linewidth=1.2, **style(i))
    axes.set_xticks(range(len(there)), list(there.values()))


def _heat(axes: Axes, store: Store) -> None:
    values = [[_heat_cell(store, rank, lra) for lra in HEAT_LRA_RANKS] for rank in HEAT_RANKS]
    axes.grid(visible=False)
    axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(HEAT_LRA_RANKS)), [str(rank) for rank in HEAT_LRA_RANKS])
    axes.set_yticks(range(len(HEAT_RANKS)), [str(rank) for rank in HEAT_RANKS])
    axes.set(xlabel="rank of the approximation", ylabel="rank of the budget", title="target accuracy, %")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")


def _heat_cell(store: Store, rank: int, lra: int) -> float:
    name = f"rank{rank}-lra{lra}" if rank != 8 else f"lra{lra}"
    runs = runs_of(store, [Case("lift", VARIANT_RATE, seed, name) for seed in HEAT_SEEDS])
    return 100 * statistics.fmean(run["accuracy"]["target"] for run in runs) if runs else float("nan")


# ---------------------------------------------------------------- study 5


def update_figures(run: Run) -> dict[str, float]:
    """Means over the matrices of a run; ranks as shares of the full one."""
    updates = run["updates"]
    full = {name: 128 if "k_proj" in name or "v_proj" in name else 256 for name in updates}
    return {
        "rank": statistics.fmean(one["rank"] / full[name] for name, one in updates.items()),
        "effective_rank": statistics.fmean(one["effective_rank"] / full[name] for name, one in updates.items()),
        "stable_rank": statistics.fmean(one["stable_rank"] for one in updates.values()),
        "norm": statistics.fmean(one["norm"] for one in updates.values()),
        "alignment": statistics.fmean(one["alignment"] for one in updates.values()),
        "spectral_norm": statistics.fmean(
            one["spectral_norm_after"] / one["spectral_norm_before"] for one in updates.values()
        ),
    }


def update_table(folder: Path = RUNS) -> str:
    """Of each method at its best rate: rank of the update, its size, turn of the top eigenspace."""
    rows = []
    for method, runs in main_runs(folder).items():
        figures = [update_figures(run) for run in runs]
        found = {key: interval([one[key] for one in figures]) for key in figures[0]}
        rows.append(
            [
                METHODS[method][0],
                f"{runs[0]['lr']:g}",
                written(found["rank"], ".1f", percent=True),
                written(found["effective_rank"], ".1f", percent=True),
                written(found["stable_rank"], ".1f"),
                written(found["norm"], ".1f", percent=True),
                written(found["alignment"], ".3f"),
                written(found["spectral_norm"], ".3f"),
            ]
        )
    heads = ["", "rate", "rank, of full", "effective rank, of full", "stable rank", "norm, of the weights'"]
    return markdown([*heads, "alignment", "spectral norm, of that before"], rows)


def draw_updates(folder: Path = RUNS) -> Figure:
    """Rank of the update at the best rates; alignment against the size of the update, over all rates."""
    store = Store(STUDY, folder)
    figure, (first, second) = canvas(2, width=5.8, height=4.4)
    found = main_runs(folder)
    for i, runs in enumerate(found.values()):
        shares = interval([update_figures(run)["rank"] for run in runs])
        effective = interval([update_figures(run)["effective_rank"] for run in runs])
        for offset, one, fill in ((-0.15, shares, "full"), (0.15, effective, "none")):
            first.errorbar(
                100 * one.mean, i + offset, xerr=100 * one.half, capsize=2, fillstyle=fill, markersize=6, **style(i)
            )
    first.set_yticks(range(len(found)), [METHODS[method][0] for method in found], fontsize=8)
    first.invert_yaxis()
    first.set(xlabel="rank of the update (filled) and effective rank (open), % of full", xlim=(-3, 103))
    for i, method in enumerate(SHOWN):
        runs = runs_of(store, tuning_cases([method], ALL_RATES))
        points = [update_figures(run) for run in runs]
        second.plot(
            [100 * one["norm"] for one in points],
            [one["alignment"] for one in points],
            label=METHODS[method][0],
            markersize=5,
            linewidth=1.1,
            **style(i),
        )
    second.set(
        xlabel="norm of the update, % of the weights'", ylabel="alignment of the top 16 directions", xscale="log"
    )
    second.set_ylim(0, 1.02)
    second.legend(fontsize=8, **LEGEND)
    return figure
