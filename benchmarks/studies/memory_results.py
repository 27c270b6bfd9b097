"""Tables and figure of the memory study."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.studies.memory import LARGE, METHODS, STUDY
from benchmarks.studies.records import RUNS, Run, Store
from benchmarks.studies.summary import markdown
from lift_lightning.analysis.memory import GIB, LABELS, PARTS, Footprint
from lift_lightning.analysis.memory import draw as draw_bars
from lift_lightning.analysis.plots import LEGEND, canvas

MIB = 2**20


def large_table(folder: Path = RUNS) -> str:
    """GiB of every part, for the models that fit nowhere here."""
    store, rows = Store(STUDY, folder), []
    for model in LARGE:
        for method in METHODS:
            found = store.load(f"{model}-{method}")["predicted"]
            sizes = (f"{found[part] / GIB:.2f}" for part in (*PARTS, "peak"))
            rows.append([f"{model}, {LABELS[method]}", *sizes, f"{found['trained'] / 1e6:,.0f} M"])
    return markdown(["GiB", *PARTS, "peak", "trained"], rows)


def check_table(folder: Path = RUNS) -> str:
    """Prediction and measurement on SmolLM2, above the loaded model."""
    rows = []
    for run in Store(STUDY, folder):
        if "measured" in run:
            predicted, measured = above_model(run, folder), run["measured"]
            ratio = f"{predicted / measured - 1:+.1%}"
            label = f"{LABELS[run['method']]}, {run['note']}"
            rows.append([label, f"{predicted / MIB:,.0f}", f"{measured / MIB:,.0f}", ratio])
    return markdown(["MiB above the loaded model", "predicted", "measured", "difference"], rows)


def above_model(run: Run, folder: Path = RUNS) -> int:
    """Bytes of the predicted peak beyond the model's own weights, which are those of full fine-tuning."""
    own = Store(STUDY, folder).load(f"{run['model']}-{run['note']}-full")["predicted"]["weights"]
    return run["predicted"]["peak"] - own


def draw(folder: Path = RUNS) -> Figure:
    """Stacked bars for both large models."""
    store = Store(STUDY, folder)
    figure, every = canvas(2, width=5.6, height=4.2)
    for axes, model in zip(every, LARGE, strict=True):
        found = {LABELS[m]: Footprint(**store.load(f"{model}-{m}")["predicted"]) for m in METHODS}
        draw_bars(axes, found, f"{model}, 1 x 2,048 tokens, rank 128", legend=False)
    every[0].legend(fontsize=8, loc="upper left", **LEGEND)
    return figure
