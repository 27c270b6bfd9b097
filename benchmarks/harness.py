"""What the benchmarks share: options, timing in turn, rows with a goal, one table, one JSON file.

A row compares two medians, `ours` and `rival`, by their ratio, or holds one number of ours alone. `better` says which
way the ratio (or that number) should go: with `higher` the ratio is rival / ours, "x faster"; with `lower` it is
ours / rival.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from environment import commit, machine, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
SEED = 0
# A rival whose first run takes longer than this many seconds is not run again.
ONCE_ABOVE = 30.0

Better = Literal["lower", "higher"]
Item = TypeVar("Item")


# ---------------------------------------------------------------- options


class Options(NamedTuple):
    """The command line of every benchmark."""

    name: str
    quick: bool
    out: Path
    threads: int
    repeats: int | None

    def times(self, usual: int) -> int:
        """How often something is measured: as asked for, twice if quick, else as usual."""
        return self.repeats or (2 if self.quick else usual)


def options(name: str, description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Read the command line, seed torch and set its threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small stand-ins, to see that it runs; measures nothing")
    parser.add_argument("--out", type=Path, help=f"JSON file; benchmarks/results/{name}.json, a temporary one if quick")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; all cores if not given")
    parser.add_argument("--repeats", type=int, help="runs of each side after the warm-up")
    given = parser.parse_args(arguments)
    if given.quick and given.out is not None and given.out.resolve().is_relative_to(RESULTS):
        parser.error("--quick measures nothing, so it does not write to benchmarks/results")
    folder = Path(tempfile.mkdtemp(prefix="bench_")) if given.quick and given.out is None else RESULTS
    torch.manual_seed(SEED)
    torch.set_num_threads(given.threads)
    return Options(name, given.quick, given.out or folder / f"{name}.json", given.threads, given.repeats)


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a bar on stderr."""
    return track(items, description, console=Console(stderr=True))


# ---------------------------------------------------------------- measuring


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    description: str,
    *,
    before: Mapping[str, Callable[[], Any]] | None = None,
    once_above: float = ONCE_ABOVE,
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn (A, B, A, B, ...) after a warm-up of each, so that drift meets all alike.

    Args:
        runs: by name, ours first, then the rivals.
        repeats: samples of each after the warm-up.
        description: of the progress bar.
        before: what to do ahead of a run, by name; not timed.
        once_above: a rival whose warm-up takes more seconds than this has that run as its only sample.
    """
    before = before or {}

    def seconds(name: str) -> float:
        before.get(name, lambda: None)()
        started = time.perf_counter()
        runs[name]()
        return time.perf_counter() - started

    samples: dict[str, list[float]] = {}
    repeated = []
    for i, name in enumerate(progress(list(runs), f"{description}: warm-up")):
        first = seconds(name)
        slow = i > 0 and first > once_above
        samples[name] = [first] if slow else []
        if not slow:
            repeated.append(name)
    for _ in progress(range(repeats), description):
        for name in repeated:
            samples[name].append(seconds(name))
    return samples


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One line of the table; see the top of the file."""

    what: str
    ours: float | None
    rival: float | None
    unit: str
    ratio: float | None
    better: Better
    goal: float | None
    reached: bool | None
    samples: dict[str, list[Any]]
    extra: dict[str, Any] = field(default_factory=dict)


def compare(
    what: str,
    ours: list[float],
    rival: list[float],
    *,
    better: Better,
    goal: float | None = None,
    unit: str = "s",
    extra: dict[str, Any] | None = None,
) -> Row:
    """The medians of both sides and their ratio."""
    mine, theirs = statistics.median(ours), statistics.median(rival)
    above, below = (theirs, mine) if better == "higher" else (mine, theirs)
    ratio = above / below if below else None
    samples = {"ours": ours, "rival": rival}
    return Row(what, mine, theirs, unit, ratio, better, goal, _reached(ratio, better, goal), samples, extra or {})


def single(
    what: str,
    value: float | None,
    samples: dict[str, list[Any]],
    *,
    better: Better,
    goal: float | None = None,
    unit: str = "",
    extra: dict[str, Any] | None = None,
) -> Row:
    """A number of ours without a rival; None where nothing could be measured, which reaches no goal."""
    reached = _reached(value, better, goal)
    return Row(what, value, None, unit, None, better, goal, reached, samples, extra or {})


def _reached(value: float | None, better: Better, goal: float | None) -> bool | None:
    if goal is None:
        return None
    if value is None:
        return False
    return value >= goal if better == "higher" else value <= goal


# ---------------------------------------------------------------- report


def report(chosen: Options, rows: list[Row], settings: dict[str, Any]) -> None:
    """Print the table and write the JSON file."""
    content = {
        "name": chosen.name,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {"quick": chosen.quick, "seed": SEED, **settings},
        "rows": [asdict(row) for row in rows],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    # Redirected output would be folded at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table(chosen, rows, content["machine"]))
    console.print(f"written to {chosen.out}", highlight=False, soft_wrap=True)


def _table(chosen: Options, rows: list[Row], machine: dict[str, Any]) -> Table:
    title = f"{chosen.name} (quick: these numbers mean nothing)" if chosen.quick else chosen.name
    table = Table(title=title, caption=f"medians; {machine['cpu']}, {machine['threads']} threads, GPU {machine['gpu']}")
    extras = list(dict.fromkeys(key for row in rows for key in row.extra))
    table.add_column("what")
    for name in ("ours", "rival", "ratio", "goal", "reached", *extras):
        table.add_column(name, justify="right")
    for row in rows:
        once = " (once)" if len(row.samples.get("rival", ())) == 1 < len(row.samples["ours"]) else ""
        reached = {None: "", True: "yes", False: "no"}[row.reached]
        cells = [_number(row.ours, row.unit), _number(row.rival, row.unit) + once, _ratio(row), _goal(row), reached]
        table.add_row(row.what, *cells, *(_number(row.extra.get(key)) for key in extras))
    return table


def _number(value: Any, unit: str = "") -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text} {unit}".rstrip()


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.3g}x faster" if row.better == "higher" else f"{row.ratio:.3g}x"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"{'≥' if row.better == 'higher' else '≤'} {row.goal:g}{'' if row.rival is None else 'x'}"
