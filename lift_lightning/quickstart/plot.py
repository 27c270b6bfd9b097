"""The picture of one run: loss, overlap of the masks, and the skills, over the steps."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Series = list[tuple[int, float]]


def read_metrics(log_dir: Path) -> dict[str, Series]:
    """What Lightning's CSVLogger wrote, by name of the metric, as (step, value)."""
    found: dict[str, Series] = {}
    with (log_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def plot_run(log_dir: Path, output: Path) -> Path:
    """Draw a run's metrics into a PNG file and return its path."""
    metrics = read_metrics(log_dir)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, overlap, skills = figure.subplots(1, 3)
    _line(loss, metrics.get("train_loss", []), "training")
    loss.set(title="Loss", ylabel="per label token", yscale="log")
    _line(overlap, metrics.get("lift_overlap", []), "", marker="o")
    overlap.set(title="Mask kept at each refresh", ylabel="share of entries", ylim=(0, 1.05))
    for name, label in (("target_accuracy", "target: two-step problems"), ("source_accuracy", "source: facts")):
        _line(skills, metrics.get(name, []), label, marker="o")
    skills.set(title="Held-out questions", ylabel="accuracy", ylim=(-0.02, 1.05))
    if skills.lines:
        skills.legend(loc="lower right", frameon=False)
    for axes in (loss, overlap, skills):
        axes.set_xlabel("optimizer step")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    return output


def plot_comparison(points: Sequence[tuple[str, float, float]], before: tuple[float, float], output: Path) -> Path:
    """Target accuracy against source accuracy, a point for each run.

    Args:
        points: label of the method, source and target accuracy after training.
        before: the same before training.
        output: the PNG file.
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(dict.fromkeys(label for label, _, _ in points)):
        kept, learned = zip(*((x, y) for other, x, y in points if other == label), strict=True)
        axes.scatter(kept, learned, label=label, marker="osD^v"[i % 5], s=45)
    axes.scatter(*before, label="before", marker="x", color="black")
    axes.set(xlabel="source accuracy (what was known)", ylabel="target accuracy (what was learned)")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    return output


def _line(axes: Axes, series: Series, label: str, marker: str = "") -> None:
    if series:
        steps, values = zip(*series, strict=True)
        axes.plot(steps, values, label=label, marker=marker, markersize=4)
