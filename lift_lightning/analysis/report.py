"""What an analysis found: one row for each matrix or measurement, a table of means, a figure; written to a folder."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
RANGES_OF = 2  # columns; more do not fit a terminal, and the CSV has every matrix


@dataclass(frozen=True)
class Findings:
    """Of one analysis.

    Attributes:
        name: of the analysis, and of its files.
        rows: for the CSV file; all with the same keys.
        table: what is shown.
        figure: what is drawn.
    """

    name: str
    rows: Sequence[Row]
    table: Table
    figure: Figure


def check_output(output: str, *, overwrite: bool) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
        FileExistsError: if it is a file, or not empty unless `overwrite` is on.
    """
    folder = Path(output).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for table and figure")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder, or set overwrite to true")
    return folder


def write(found: Findings, folder: Path) -> None:
    """`<name>.csv` and `<name>.png` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{found.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(found.rows[0]))
        writer.writeheader()
        writer.writerows(found.rows)
    found.figure.savefig(folder / f"{found.name}.png", dpi=130)


def by_layer(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each type of layer, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["layer"]), []).append(row)
    return found


def layer_table(rows: Sequence[Row], columns: Mapping[str, str], title: str) -> Table:
    """Means over the matrices of each type of layer, and of all; of up to two columns the lowest and highest too.

    Matrices of which a number is not defined are left out of its means.


    Args:
        rows: one for each matrix.
        columns: keys of the rows and how their numbers are written, such as `.3f`.
        title: above it.
    """
    spread = _spread if len(columns) <= RANGES_OF else _mean
    what = "mean (lowest to highest)" if spread is _spread else "mean"
    table = Table(title=title, caption=f"{what} over the matrices of a type")
    table.add_column("layer")
    table.add_column("matrices", justify="right")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    groups = by_layer(rows)
    for layer, members in groups.items():
        cells = (spread(_numbers(members, name), form) for name, form in columns.items())
        table.add_row(layer, str(len(members)), *cells, end_section=layer == list(groups)[-1])
    cells = (spread(_numbers(rows, name), form) for name, form in columns.items())
    table.add_row("all", str(len(rows)), *cells)
    return table


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    values = (float(row[name]) for row in rows)
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float], form: str) -> str:
    return format(statistics.fmean(values), form) if values else "-"


def _spread(values: Sequence[float], form: str) -> str:
    mean = _mean(values, form)
    return f"{mean} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else mean
