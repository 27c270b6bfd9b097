"""The figures of docs/performance.md are those of benchmarks/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_copied_from_the_results():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], timeout=60, check=False)
    assert done.returncode == 0, "run `python benchmarks/tables.py`"
