"""Rows, answers and scores for the tasks beside this file, which lm-evaluation-harness loads.

It imports nothing of lift_lightning: an exported folder is an ordinary model, and who tests it in the harness need not
install what trained it. Prompt and rule are copies for that; tests/test_lm_eval.py holds them against the package.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

TOLERANCE = 1e-3  # |gold - answer| up to which two numbers are the same


def read_rows(folder: str, llm_adapters: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The test set `<llm_adapters>/<folder>/test.json`. The harness also hands over the arguments of the model."""
    if llm_adapters is None:
        raise ValueError("the harness was not told where the test sets are: add --metadata llm_adapters=<folder>")
    rows = json.loads((Path(llm_adapters).expanduser() / folder / "test.json").read_text(encoding="utf-8"))
    columns = ("instruction", "input", "answer")
    # A column has one type in a Dataset, but files have numbers and texts for answers.
    return {"test": datasets.Dataset.from_list([{name: str(row.get(name, "")) for name in columns} for row in rows])}


def last_number(responses: Iterable[list[str]], docs: Any) -> list[list[float | None]]:
    """Rule `paper` for numbers: the last of each text, commas taken away; None where there is none."""
    return [[_last_number(text) for text in texts] for texts in responses]


def true_or_false(responses: Iterable[list[str]], docs: Any) -> list[list[str | None]]:
    """Rule `paper` for these labels: the first in each text, inside words too; None where there is none."""
    return [[_first_label(text) for text in texts] for texts in responses]


def process_results(doc: dict[str, Any], results: list[float | str | None]) -> dict[str, float]:
    """1 where the answer that the filter read is the right one."""
    answer, gold = results[0], doc["answer"].strip()
    if isinstance(answer, float):
        number = float(gold.replace(",", ""))
        # The margin keeps a difference of exactly 0.001 in decimals inside.
        return {"acc": float(abs(answer - number) <= TOLERANCE + 1e-12 * max(1.0, abs(number)))}
    return {"acc": float(answer is not None and answer == gold.lower())}


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    # Hundreds of digits in a row overflow, and JSON has no infinity.
    return float(numbers[-1]) if numbers and math.isfinite(float(numbers[-1])) else None


def _first_label(text: str) -> str | None:
    match = re.search("true|false", text.lower())
    return match[0] if match else None
