"""Copy the results of the studies into docs/results/README.md, and draw their figures.

    python -m benchmarks.studies.page [--check]

Every `<!-- study: NAME -->` of the page is followed by a table that is made of the runs in benchmarks/studies/runs, up
to `<!-- end -->`: no figure there is typed by hand. README.md takes the same tables between the same marks. With
--check nothing is written, and the exit status says whether the pages are up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from matplotlib.figure import Figure

from benchmarks.environment import ROOT
from benchmarks.studies import learning_results, memory_results, small_results, update_results, variant_results
from benchmarks.studies.records import FIGURES

PAGES = (FIGURES / "README.md", ROOT / "README.md")
BLOCK = re.compile(r"<!-- study: (\w+) -->\n.*?<!-- end -->", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "toy": small_results.toy_table,
    "random_matrices": small_results.random_table,
    "perturbation": small_results.noise_table,
    "rates": learning_results.rate_table,
    "level": learning_results.level_table,
    "learning": learning_results.main_table,
    "headline": learning_results.headline_table,
    "variants": variant_results.variant_table,
    "sizes": variant_results.size_table,
    "updates": update_results.update_table,
    "memory": memory_results.large_table,
    "memory_check": memory_results.check_table,
}
DRAWINGS: dict[str, Callable[[], Figure]] = {
    "toy": small_results.draw_toy,
    "random_matrices": small_results.draw_random,
    "perturbation": small_results.draw_noise,
    "frontier": learning_results.draw_frontier,
    "learning": learning_results.draw_main,
    "losses": learning_results.draw_losses,
    "variants": variant_results.draw_variants,
    "updates": update_results.draw_updates,
    "memory": memory_results.draw,
}


def filled(page: str) -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda match: f"<!-- study: {match[1]} -->\n\n{TABLES[match[1]]()}\n<!-- end -->", page)


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the exit status says whether all is there")
    check = parser.parse_args().check
    stale = False
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        stale |= after != before
        if not check:
            path.write_text(after, encoding="utf-8")
    if not check:
        for name, draw in DRAWINGS.items():
            draw().savefig(FIGURES / f"study_{name}.png", dpi=110)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
