"""What training did, from two checkpoints: alignment, rank of the update, its histogram, spectral norms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lift_lightning.analysis.matrices import Checkpoint, Place, Progress
from lift_lightning.analysis.plots import LEGEND, canvas, over_depth, style
from lift_lightning.analysis.report import Findings, layer_table
from lift_lightning.analysis.spectra import (
    alignment_score,
    effective_rank,
    leading_right_vectors,
    numerical_rank,
    singular_spectrum,
    stable_rank,
    top_directions,
)

# Histogram of log10 |update|: from 1e-9 to 10 in tenths of a decade; what is exactly zero is counted apart.
_LOWEST, _HIGHEST, _PER_DECADE = -9, 1, 10


def read_pairs(
    base: Checkpoint, trained: Checkpoint, progress: Progress, device: torch.device
) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Each matrix before and after, in float32, where the decomposition is to run."""
    for place in progress(base.places):
        yield place, base.read(place).to(device), trained.read(place).to(device)


def rounding_note(base: Checkpoint, trained: Checkpoint) -> str:
    """What a table of updates has to say where the files are narrower than float32; empty where they are not."""
    place = base.places[0]
    before, after = (str(one.dtype(place)).removeprefix("torch.") for one in (base, trained))
    if before == after == "float32":
        return ""
    return (
        f"; stored in {before} and {after}: the rounding of the files is part of the update, which raises its rank; "
        "merge adapters and export in float32 to see what training did"
    )


def alignment(
    base: Checkpoint, trained: Checkpoint, progress: Progress, device: torch.device, directions: int | None
) -> Findings:
    """The alignment score of every matrix (App. H.1, Fig. 12)."""
    rows: list[dict[str, Any]] = []
    for place, before, after in read_pairs(base, trained, progress, device):
        k = top_directions(place.shape, directions)
        score = alignment_score(leading_right_vectors(before, k), leading_right_vectors(after, k))
        rows.append({"matrix": place.name, "layer": place.layer, "depth": place.depth, "directions": k, "score": score})
    table = layer_table(rows, {"score": ".4f"}, "Alignment of the top eigenspace")
    figure, (axes,) = canvas(width=6.5)
    over_depth(axes, rows, "score", "alignment score")
    axes.set_title("Top eigenspace before and after (1: not turned)", fontsize=10)
    return Findings("alignment", rows, table, figure)


def update_rank(base: Checkpoint, trained: Checkpoint, progress: Progress, device: torch.device) -> Findings:
    """Rank, effective rank and stable rank of the update of every matrix (App. G.3, Fig. 13)."""
    rows: list[dict[str, Any]] = []
    for place, before, after in read_pairs(base, trained, progress, device):
        values = singular_spectrum(after - before)
        rows.append(
            {
                "matrix": place.name,
                "layer": place.layer,
                "depth": place.depth,
                "full_rank": min(place.shape),
                "rank": numerical_rank(values, place.shape),
                "effective_rank": effective_rank(values),
                "stable_rank": stable_rank(values),
            }
        )
    columns = {"full_rank": ".0f", "rank": ".0f", "effective_rank": ".1f", "stable_rank": ".1f"}
    table = layer_table(rows, columns, "Rank of the update")
    table.caption = f"{table.caption}{rounding_note(base, trained)}"
    figure, (first, second) = canvas(2)
    shares = [{**row, "share": row["rank"] / row["full_rank"]} for row in rows]
    over_depth(first, shares, "share", "rank / full rank")
    first.set_ylim(-0.03, 1.05)
    over_depth(second, rows, "effective_rank", "effective rank", legend=False)
    second.set_ylim(bottom=0)
    return Findings("rank", rows, table, figure)


def histogram(base: Checkpoint, trained: Checkpoint, progress: Progress, device: torch.device) -> Findings:
    """How large the updates of single entries are (Fig. 5), for each type of layer."""
    edges = torch.linspace(_LOWEST, _HIGHEST, (_HIGHEST - _LOWEST) * _PER_DECADE + 1)
    counts: dict[str, Tensor] = {}
    zeros: dict[str, int] = {}
    means = []
    for place, before, after in read_pairs(base, trained, progress, device):
        size = (after - before).abs().flatten()
        moved = size[size > 0]
        logs = moved.log10().clamp(_LOWEST, _HIGHEST).cpu()
        found = torch.histogram(logs, edges).hist.long()
        counts[place.layer] = counts.get(place.layer, torch.zeros_like(found)) + found
        zeros[place.layer] = zeros.get(place.layer, 0) + size.numel() - moved.numel()
        mean = float(moved.double().mean()) if moved.numel() else 0.0
        share = moved.numel() / size.numel()
        means.append({"layer": place.layer, "changed": share, "mean": mean, "largest": float(size.max())})
    rows: list[dict[str, Any]] = []
    figure, (axes,) = canvas(width=6.5)
    for i, (layer, found) in enumerate(counts.items()):
        total = int(found.sum()) + zeros[layer]
        rows.append({"layer": layer, "from": 0.0, "to": 0.0, "entries": zeros[layer]})
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), found.tolist(), strict=True):
            if count:
                rows.append({"layer": layer, "from": 10**low, "to": 10**high, "entries": count})
        centres = 10 ** ((edges[:-1] + edges[1:]) / 2)
        shown = found > 0
        axes.plot(centres[shown], found[shown] / total, label=layer, markersize=3, linewidth=1.2, **style(i))
    axes.set(xlabel="size of the update of an entry", ylabel="share of all entries")
    if any(found.any() for found in counts.values()):
        axes.set(xscale="log", yscale="log")
    else:
        axes.text(0.5, 0.5, "no entry changed", transform=axes.transAxes, ha="center")
    axes.set_title(f"Updates that are not zero, {_PER_DECADE} bins to a decade", fontsize=10)
    axes.legend(**LEGEND, fontsize=8, ncols=2)
    columns = {"changed": ".2%", "mean": ".2e", "largest": ".2e"}
    table = layer_table(means, columns, "Updates of single entries")
    table.caption = f"{table.caption}; mean of those that changed{rounding_note(base, trained)}"
    return Findings("histogram", rows, table, figure)


def norms(base: Checkpoint, trained: Checkpoint, progress: Progress, device: torch.device) -> Findings:
    """The spectral norm of every matrix before and after (App. C)."""
    rows: list[dict[str, Any]] = []
    for place, before, after in read_pairs(base, trained, progress, device):
        one, other = (float(torch.linalg.matrix_norm(matrix, 2)) for matrix in (before, after))
        rows.append(
            {
                "matrix": place.name,
                "layer": place.layer,
                "depth": place.depth,
                "before": one,
                "after": other,
                "change": other / one - 1 if one else math.nan,
                "update": float(torch.linalg.matrix_norm(after - before, 2)),
            }
        )
    columns = {"before": ".3f", "after": ".3f", "change": "+.3%", "update": ".4f"}
    table = layer_table(rows, columns, "Spectral norm")
    table.caption = f"{table.caption}; update: spectral norm of the difference"
    figure, (first, second) = canvas(2)
    percent = [{**row, "change": 100 * float(row["change"])} for row in rows]
    over_depth(first, percent, "change", "change of the spectral norm, %")
    over_depth(second, rows, "update", "spectral norm of the update", legend=False)
    return Findings("norms", rows, table, figure)
