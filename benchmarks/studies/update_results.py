"""Tables and figures of study 5: what became of the weights in the runs of study 4."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.studies.learning import STUDY
from benchmarks.studies.learning_cases import METHODS, tuning_cases
from benchmarks.studies.learning_results import SHOWN, main_runs, row_by_row, runs_of, shape_of
from benchmarks.studies.records import RUNS, Run, Store
from benchmarks.studies.summary import interval, markdown, written
from lift_lightning.analysis.plots import LEGEND, canvas, style


def update_figures(run: Run) -> dict[str, float]:
    """Means over the matrices that the run changed; ranks as shares of the full one."""
    updates = {name: one for name, one in run["updates"].items() if one["changed"]}
    full = {name: min(shape_of(name)) for name in updates}
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
    for offset, key, fill in ((-0.15, "rank", "full"), (0.15, "effective_rank", "none")):
        shares = {method: [update_figures(run)[key] for run in runs] for method, runs in found.items()}
        row_by_row(first, shares, offset, fill)
    first.set_xlabel("rank of the update (filled) and effective rank (open), % of full")
    for i, method in enumerate(SHOWN):
        runs = runs_of(store, tuning_cases([method]))
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
