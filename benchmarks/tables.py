"""Copy the results of the benchmarks into docs/performance.md, so that no figure there is typed by hand.

    python benchmarks/tables.py [--check]

Every `<!-- benchmark: NAME -->` of the page is followed by a table of benchmarks/results/NAME.json, up to
`<!-- end -->`. With --check nothing is written, and the exit status says whether the page is up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- benchmark: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str) -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda match: f"<!-- benchmark: {match[1]} -->\n{_table(match[1])}<!-- end -->", page)


def _table(name: str) -> str:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = result["rows"]
    extras = list(dict.fromkeys(key for row in rows for key in row["extra"]))
    heads = ["", "ours", "rival", "ratio", "goal", "reached", *extras]
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1)]
    lines += [_cells(row) + [_number(row["extra"].get(key)) for key in extras] for row in rows]
    used = [i for i in range(len(heads)) if i == 0 or any(line[i] for line in lines[2:])]
    table = "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines)
    machine, versions = result["machine"], result["versions"]
    source = (
        f"`benchmarks/results/{name}.json`, {result['date'][:10]}: {machine['cpu']}, {machine['threads']} threads, no "
        f"GPU, torch {versions['torch']}"
    )
    return f"\n{table}\n\n{source}\n\n"


def _cells(row: dict[str, Any]) -> list[str]:
    higher = row["better"] == "higher"
    times = "" if row["rival"] is None else "×"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}×{' faster' if higher else ''}"
    goal = "" if row["goal"] is None else f"{'≥' if higher else '≤'} {row['goal']:g}{times}"
    reached = {None: "", True: "yes", False: "no"}[row["reached"]]
    return [row["what"], _number(row["ours"], row["unit"]), _number(row["rival"], row["unit"]), ratio, goal, reached]


def _number(value: Any, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{f'{value:.4g}' if isinstance(value, float) else value} {unit}".strip()


def main() -> int:
    """Write or check the page."""
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
