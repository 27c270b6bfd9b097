"""Collects the answers of one test run: scores them as they come, writes them down, goes on after a break, sums up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.predictions import (
    Prediction,
    PredictionWriter,
    Summary,
    question_on_record,
    read_unfinished,
    summarise,
)
from lift_lightning.evaluation.results import begin_run, means, results, wilson_interval, write_json
from lift_lightning.evaluation.tasks import GenericKind, get_task

# By task: the questions that are answered, by their place in the test set.
Answered = dict[str, dict[int, str]]

RUN_FILE, RESULTS_FILE = "run.json", "results.json"


class AnswerRecorder:
    """Predictions of several tasks, each in `<folder>/<task>.jsonl`, and `<folder>/results.json`.

    A folder with predictions of the same run that did not come to its end is taken up where it was left.

    Args:
        folder: where the files go; made if missing.
        generic: how test sets that are no known task are scored; None refuses them.
        run: what is tested, and how; written to the results. What differs from it but for `command` is another run.

    Attributes:
        answered: what an earlier part of this run has answered.

    Raises:
        ConfigError: if the folder has unfinished predictions of another run.
    """

    def __init__(self, folder: Path, generic: GenericKind | None = None, run: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._generic = generic
        self._run = dict(run or {})
        self._writers: dict[str, PredictionWriter] = {}
        self._predictions: list[Prediction] = []
        self.answered: Answered = {}
        self._resumes = self._take_up()

    def _take_up(self) -> bool:
        left = sorted(self.folder.glob("*.jsonl.partial"))
        resumes = begin_run(self.folder / RUN_FILE, self._run, bool(left))
        for path in left if resumes else ():
            for prediction in read_unfinished(path):
                self.answered.setdefault(prediction.task, {})[prediction.index] = prediction.instruction
        return resumes

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
            self._writer(task.name).write(prediction)
            self._predictions.append(prediction)

    def _writer(self, task: str) -> PredictionWriter:
        if task not in self._writers:
            file = re.sub(r"[^\w.-]", "_", task) + ".jsonl"  # a user's own task may be called anything
            writer = PredictionWriter(self.folder / file, resume=self._resumes)
            self._writers[task] = writer
            self._predictions += writer.resumed
        return self._writers[task]

    def leave(self) -> None:
        """Close the files of a run that does not come to its end, for a later one to go on."""
        for writer in self._writers.values():
            writer.close(complete=False)

    def finish(self) -> dict[str, Summary]:
        """Close the files, count the right answers of each task, and write the results."""
        for task in self.answered:
            self._writer(task)  # one that had nothing left to answer
        for writer in self._writers.values():
            writer.close()
        summaries = summarise(self._predictions)
        write_json(self.folder / RESULTS_FILE, results(summaries, self._run))
        return summaries


def is_answered(row: Mapping[str, Any], answered: Answered, generic: GenericKind | None = None) -> bool:
    """Whether a row of a test set is among what a recorder has answered.

    Raises:
        ConfigError: if another question was answered in its place: the test set has changed.
    """
    task = get_task(row["task"], generic=generic)
    question = answered.get(task.name, {}).get(row["index"])
    if question is not None and question != question_on_record(task, row["instruction"]):
        raise ConfigError(
            f"sample {row['index']} of {task.name} was another question when this test was begun: set "
            "model.predictions_dir to another folder"
        )
    return question is not None


def summary_table(summaries: Mapping[str, Summary], folder: Path) -> Table:
    """Accuracies by both rules, one row for each task, and the means over groups that are complete."""
    table = Table(title="Test accuracy", caption=f"predictions and {RESULTS_FILE} in {folder}")
    table.add_column("task", no_wrap=True)
    for heading in ("samples", "paper rule", "strict rule", "95% interval", "no answer"):
        table.add_column(heading, justify="right")
    for task, found in summaries.items():
        low, high = wilson_interval(found.correct_strict, found.n)
        accuracies = (f"{found.accuracy_paper:.1%}", f"{found.accuracy_strict:.1%}", f"{low:.1%}-{high:.1%}")
        table.add_row(task, str(found.n), *accuracies, str(found.unanswered))
    for i, (name, mean) in enumerate(means(summaries).items()):
        if i == 0:
            table.add_section()
        table.add_row(f"mean: {name}", "", f"{mean['paper']:.1%}", f"{mean['strict']:.1%}", "", "")
    return table
