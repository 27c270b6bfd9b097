"""Collects the answers of one test run: scores them as they come, writes them down, and sums up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lift_lightning.evaluation.predictions import Prediction, PredictionWriter, Summary, summarise
from lift_lightning.evaluation.scoring import GenericKind, get_task


class AnswerRecorder:
    """Predictions of several tasks, each in `<folder>/<task>.jsonl`.

    Args:
        folder: where the files go; made if missing.
        generic: how test sets that are no known task are scored; None refuses them.
    """

    def __init__(self, folder: Path, generic: GenericKind | None = None) -> None:
        self.folder = folder
        self._generic = generic
        self._writers: dict[str, PredictionWriter] = {}
        self._predictions: list[Prediction] = []

    def record(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> None:
        """Score and write one batch.

        Args:
            rows: of the test set, with `index`, `task`, `instruction` and `answer`.
            completions: the model's texts.

        Raises:
            ValueError: if a task is not known, or a gold answer is none that its task can have.
        """
        for row, completion in zip(rows, completions, strict=True):
            task = get_task(row["task"], generic=self._generic)
            prediction = Prediction.scored(
                task, index=row["index"], instruction=row["instruction"], prediction=completion, gold=row["answer"]
            )
            if task.name not in self._writers:
                file = re.sub(r"[^\w.-]", "_", task.name) + ".jsonl"  # a user's own task may be called anything
                self._writers[task.name] = PredictionWriter(self.folder / file)
            self._writers[task.name].write(prediction)
            self._predictions.append(prediction)

    def finish(self) -> dict[str, Summary]:
        """Close the files and count the right answers of each task."""
        for writer in self._writers.values():
            writer.close()
        return summarise(self._predictions)


def summary_table(summaries: Mapping[str, Summary], folder: Path) -> Table:
    """Accuracies by both rules, one row for each task."""
    table = Table(title="Test accuracy", caption=f"predictions in {folder}")
    table.add_column("task")
    for heading in ("samples", "paper rule", "strict rule", "no answer"):
        table.add_column(heading, justify="right")
    for task, found in summaries.items():
        row = (str(found.n), f"{found.accuracy_paper:.1%}", f"{found.accuracy_strict:.1%}", str(found.unanswered))
        table.add_row(task, *row)
    return table
