"""What is in a delta, and how two checkpoints differ, as tables."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.table import Table

from lift_lightning.delta.extract import Difference
from lift_lightning.delta.format import Delta


def inspect(delta: Delta) -> Table:
    """One row for each kind of tensor, with layer numbers starred, and totals with the size in bytes per entry."""
    rows: dict[tuple[str, str], list[int]] = {}
    stored = dict.fromkeys(delta.description.tensors, 0)
    for key, tensor in delta.tensors.items():
        stored[key.rpartition(".")[0]] += tensor.nbytes
    for name, record in delta.description.tensors.items():
        row = rows.setdefault((_starred(name), record.kind), [0, 0, 0, 0])
        for i, value in enumerate((1, record.numel, record.changed, stored[name])):
            row[i] += value
    order = ("sparse", "whole", "added", "removed", "same")
    ordered = sorted(rows.items(), key=lambda item: order.index(item[0][1]))
    table = Table(title=f"Delta of {delta.description.base_label}", caption=_caption(delta))
    _columns(table, "entries", "changed", "share", "MiB")
    previous = None
    for (name, kind), (tensors, entries, changed, nbytes) in ordered:
        if previous not in (None, kind):
            table.add_section()
        previous = kind
        size = f"{nbytes / 2**20:.2f}" if nbytes else "-"
        table.add_row(name, kind, str(tensors), f"{entries:,}", f"{changed:,}", _share(changed, entries), size)
    return table


def _caption(delta: Delta) -> str:
    records = [record for record in delta.description.tensors.values() if record.kind != "removed"]
    entries, changed = sum(record.numel for record in records), sum(record.changed for record in records)
    dtypes = ", ".join(dict.fromkeys(record.dtype for record in records))
    per_entry = f", {delta.nbytes / changed:.2f} bytes each" if changed else ""
    trained = delta.description.recipe
    lines = [
        f"{changed:,} of {entries:,} entries ({_share(changed, entries)}) in {dtypes}; {delta.nbytes / 2**20:,.2f} MiB"
        + per_entry
    ]
    if delta.description.base_values:
        lines.append("with the values of the base")
    lines.append("recipe: " + (", ".join(trained) if trained else "not known"))
    return "\n".join(lines)


def difference_table(differences: Iterable[Difference], left: str, right: str) -> Table:
    """One row for each kind of tensor, with layer numbers starred."""
    rows: dict[tuple[str, str], list[float]] = {}
    for found in differences:
        row = rows.setdefault((_starred(found.name), found.kind), [0, 0, 0, 0.0])
        row[0] += 1
        row[1] += found.entries
        row[2] += found.changed
        row[3] = max(row[3], found.largest or 0.0)
    entries, changed = sum(int(row[1]) for row in rows.values()), sum(int(row[2]) for row in rows.values())
    caption = f"{changed:,} of {entries:,} entries differ ({_share(changed, entries)})"
    table = Table(title=f"{left} and {right}", caption=caption)
    _columns(table, "entries", "changed", "share", "largest")
    order = ("changed", "reshaped", "left only", "right only", "same")
    for (name, kind), (tensors, total, differing, largest) in sorted(
        rows.items(), key=lambda item: order.index(item[0][1])
    ):
        shown = f"{largest:.3g}" if largest else "-"
        share = _share(int(differing), int(total))
        table.add_row(name, kind, f"{tensors:.0f}", f"{total:,.0f}", f"{differing:,.0f}", share, shown)
    return table


def _columns(table: Table, *numbers: str) -> None:
    table.add_column("tensor", overflow="fold")
    table.add_column("kind")
    for heading in ("tensors", *numbers):
        table.add_column(heading, justify="right")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if part and whole else "-"


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
