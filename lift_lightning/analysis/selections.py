"""What LIFT would select, or did: overlap of criteria, churn between checkpoints, spectra, places in the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lift_lightning.analysis.masks import GlobalRanking, overlap, replaced, share_in_busiest
from lift_lightning.analysis.matrices import Checkpoint, Progress
from lift_lightning.analysis.plots import LEGEND, canvas, heat_map, over_depth, style
from lift_lightning.analysis.report import Findings, Row, layer_table
from lift_lightning.analysis.spectra import effective_rank, energy_shares, share_held, singular_spectrum, stable_rank
from lift_lightning.selection import select_indices
from lift_lightning.selection_config import SelectionConfig


def label_of(config: SelectionConfig) -> str:
    """Of a selection, for tables and figures."""
    if config.criterion != "lift":
        return config.criterion
    directions = "" if config.directions == "largest" else f", {config.directions} directions"
    return f"LIFT{' smallest' if config.keep == 'smallest' else ''} R={config.approximation_rank}{directions}"


def overlaps(
    model: Checkpoint, configs: Sequence[SelectionConfig], progress: Progress, device: torch.device
) -> Findings:
    """Share of the entries that each two selections have in common, in every matrix (Fig. 17)."""
    labels = [label_of(config) for config in configs]
    rows: list[Row] = []
    for place in progress(model.places):
        weight = model.read(place).to(device)
        chosen = [select_indices(weight, config) for config in configs]
        row = {"matrix": place.name, "layer": place.layer, "depth": place.depth}
        pairs = [(i, j) for i in range(len(configs)) for j in range(i)]
        rows.append({**row, **{f"{labels[j]} / {labels[i]}": overlap(chosen[j], chosen[i]) for i, j in pairs}})
    mean = {key: sum(float(row[key]) for row in rows) / len(rows) for key in rows[0] if " / " in key}
    table = layer_table(
        rows, {key: ".3f" for key in mean if key.startswith(f"{labels[0]} / ")}, "Overlap of selections"
    )
    figure, (first, second) = canvas(2, width=5.4, height=4.2)
    values = [
        [1.0 if one == other else mean.get(f"{one} / {other}", mean.get(f"{other} / {one}", 0.0)) for other in labels]
        for one in labels
    ]
    heat_map(first, values, labels, labels)
    first.set_title("share in common, mean over matrices", fontsize=10)
    over_depth(second, rows, f"{labels[0]} / {labels[1]}", f"overlap of {labels[0]} and {labels[1]}")
    second.set_ylim(0, 1.02)
    return Findings("overlap", rows, table, figure)


def churn(
    checkpoints: Sequence[Checkpoint], config: SelectionConfig, progress: Progress, device: torch.device
) -> Findings:
    """What of the selection is replaced from one checkpoint to the next, and since the first."""
    labels = [f"{i}: {one.label.rstrip('/').split('/')[-1]}" for i, one in enumerate(checkpoints)]
    rows: list[Row] = []
    for place in progress(checkpoints[0].places):
        chosen = [select_indices(one.read(place).to(device), config) for one in checkpoints]
        row = {"matrix": place.name, "layer": place.layer, "depth": place.depth}
        steps = {f"to {label}": share for label, share in zip(labels[1:], replaced(chosen), strict=True)}
        since = {f"0 to {label}": 1 - overlap(chosen[i], chosen[0]) for i, label in enumerate(labels) if i > 1}
        rows.append({**row, **steps, **since})
    keys = [key for key in rows[0] if key not in ("matrix", "layer", "depth")]
    table = layer_table(rows, dict.fromkeys(keys, ".2%"), f"Selection replaced, {label_of(config)}")
    figure, axes = canvas(min(len(keys), 4), math.ceil(len(keys) / 4), width=5.0)
    top = 100 * max(float(row[key]) for row in rows for key in keys)
    for one, key in zip(axes, keys, strict=False):
        percent = [{**row, key: 100 * float(row[key])} for row in rows]
        over_depth(one, percent, key, "entries replaced, %", legend=one is axes[0])
        one.set(title=key, ylim=(0, 1.05 * top or 1))
    return Findings("churn", rows, table, figure)


def spectra(model: Checkpoint, config: SelectionConfig, progress: Progress, device: torch.device) -> Findings:
    """Singular values of every matrix, and what share of its energy R directions and a mask of K entries hold."""
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    depths = sorted({place.depth for place in model.places})
    middle = depths[len(depths) // 2]
    for place in progress(model.places):
        weight = model.read(place).to(device)
        values = singular_spectrum(weight)
        shares = energy_shares(values)
        rank = min(config.approximation_rank, len(values))
        magnitude = replace(config, criterion="magnitude", lra_rank=None, directions="largest", keep="largest")
        rows.append(
            {
                "matrix": place.name,
                "layer": place.layer,
                "depth": place.depth,
                "largest": float(values[0]),
                "effective_rank": effective_rank(values),
                "stable_rank": stable_rank(values),
                "energy_in_R": float(shares[rank - 1]),
                "held_by_mask": share_held(weight, select_indices(weight, config)),
                "held_by_magnitude": share_held(weight, select_indices(weight, magnitude)),
            }
        )
        if place.depth == middle:
            curves.setdefault(place.layer, (values / values[0]).tolist())
    columns = {"effective_rank": ".1f", "stable_rank": ".1f", "energy_in_R": ".1%"}
    columns |= {"held_by_mask": ".1%", "held_by_magnitude": ".1%"}
    table = layer_table(rows, columns, f"Spectra, {label_of(config)}")
    table.caption = f"{table.caption}; energy: squared Frobenius norm, in the first R directions and in the K entries"
    figure, (first, second) = canvas(2)
    for i, (layer, curve) in enumerate(curves.items()):
        first.plot(range(1, len(curve) + 1), curve, label=layer, linewidth=1.2, color=style(i)["color"])
    first.axvline(config.approximation_rank, color="black", linestyle=":", linewidth=1)
    first.set(xscale="log", yscale="log", xlabel="singular value, by size", ylabel="share of the largest")
    first.set_title(f"block {middle}; dotted: R", fontsize=10)
    first.legend(**LEGEND, fontsize=8)
    over_depth(second, rows, "held_by_mask", "share of the energy in the mask", legend=False)
    second.set_ylim(bottom=0)
    return Findings("spectra", rows, table, figure)


def positions(model: Checkpoint, config: SelectionConfig, progress: Progress, device: torch.device) -> Findings:
    """Where the selected entries lie: in few rows or columns, and at which depth if all matrices compete."""
    ranking = GlobalRanking(config)
    found: list[dict[str, Any]] = []
    for place in progress(model.places):
        weight = model.read(place).to(device)
        chosen = select_indices(weight, config)
        chance = select_indices(weight, replace(config, criterion="random", lra_rank=None, keep="largest"))
        ranking.add(weight)
        found.append(
            {
                "matrix": place.name,
                "layer": place.layer,
                "depth": place.depth,
                "selected": chosen.numel(),
                "entries": weight.numel(),
                "in_busiest_rows": share_in_busiest(chosen, place.shape, 0),
                "in_busiest_columns": share_in_busiest(chosen, place.shape, 1),
                "random_in_busiest_rows": share_in_busiest(chance, place.shape, 0),
                "random_in_busiest_columns": share_in_busiest(chance, place.shape, 1),
            }
        )
    density = sum(row["selected"] for row in found) / sum(row["entries"] for row in found)
    rows = [{**row, "global_share": share} for row, share in zip(found, ranking.shares(density), strict=True)]
    columns = dict.fromkeys(("in_busiest_rows", "in_busiest_columns", "global_share"), ".1%")
    chances = [sum(row[f"random_in_busiest_{lines}"] for row in found) / len(found) for lines in ("rows", "columns")]
    table = layer_table(rows, columns, f"Where the entries lie, {label_of(config)}")
    table.caption = (
        f"{table.caption}; share of the selected entries in the busiest tenth of rows and columns (of random ones "
        f"{chances[0]:.1%} and {chances[1]:.1%}); share of a matrix's entries that would be selected if the best "
        f"{density:.1%} of all matrices were"
    )
    figure, (first, second, third) = canvas(3)
    percent = [{key: 100 * v if key in columns else v for key, v in row.items()} for row in rows]
    over_depth(first, percent, "in_busiest_rows", "in the busiest tenth of the rows, %")
    over_depth(second, percent, "in_busiest_columns", "in the busiest tenth of the columns, %", legend=False)
    over_depth(third, percent, "global_share", "selected if all matrices compete, %", legend=False)
    for axes, level in ((first, 100 * chances[0]), (second, 100 * chances[1]), (third, 100 * density)):
        axes.axhline(level, color="black", linestyle=":", linewidth=1)
        axes.set_ylim(bottom=0)
    return Findings("positions", rows, table, figure)
