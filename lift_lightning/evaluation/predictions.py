"""Prediction files: one JSON object per line and sample, and the accuracies that follow from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

from lift_lightning.evaluation.scoring import Answer, Rule, score
from lift_lightning.evaluation.tasks import Task


@dataclass(frozen=True)
class Prediction:
    """One answered sample; the fields are the keys of a line in the file.

    Attributes:
        index: the sample's place in its test set, from 0.
        task: the task's name.
        task_version: of its extraction and scoring.
        instruction: the question; its fingerprint for a confidential task.
        prediction: the model's text; empty for a confidential task, whose questions it may repeat.
        gold: the right answer as the test set states it.
        paper_answer: read by rule `paper`; None where it finds none.
        strict_answer: read by rule `strict`; None where it finds none.
        paper: right by rule `paper`.
        strict: right by rule `strict`.
    """

    index: int
    task: str
    task_version: int
    instruction: str
    prediction: str
    gold: str
    paper_answer: Answer
    strict_answer: Answer
    paper: bool
    strict: bool

    @classmethod
    def scored(cls, task: Task, *, index: int, instruction: str, prediction: str, gold: str | float) -> Prediction:
        """Score a model's text and put everything in one record.

        Raises:
            ValueError: if the gold answer is none that the task can have; names the sample.
        """
        try:
            result = score(task, prediction, gold)
        except ValueError as error:
            raise ValueError(f"sample {index}: {error}") from error
        shown = "" if task.confidential else prediction
        return cls(index, task.name, task.version, question_on_record(task, instruction), shown, str(gold), **result)


def question_on_record(task: Task, instruction: str) -> str:
    """The question as it may be written down: of a confidential task only what tells it from others."""
    if not task.confidential:
        return instruction
    return "sha256:" + hashlib.sha256(instruction.encode()).hexdigest()[:16]


class PredictionWriter:
    """Writes predictions as they come and gives the file its name when all are there.

    Lines go to `<path>.partial`, each flushed, so that a run that dies leaves what it had; a file under its final name
    is complete, and in the order of the test set. As a context manager it is closed with `complete` on success only.

    Args:
        path: of the complete file.
        resume: go on with what is there of a run that died.

    Attributes:
        resumed: the predictions that were there.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.resumed: list[Prediction] = []
        if resume and self.partial.is_file():
            self.resumed = read_unfinished(self.partial)
        self._file = self.partial.open("a" if self.resumed else "w", encoding="utf-8")

    def write(self, prediction: Prediction) -> None:
        """Append one line."""
        self._file.write(json.dumps(asdict(prediction), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self, *, complete: bool = True) -> None:
        """Close the file; `complete` moves it to its final name, over an older one. A second call does nothing."""
        if self._file.closed:
            return
        self._file.close()
        if complete:
            # Not splitlines, which also breaks at characters that a text may hold.
            lines = [line for line in self.partial.read_text(encoding="utf-8").split("\n") if line]
            lines.sort(key=lambda line: json.loads(line)["index"])
            in_order = self.partial.with_name(self.partial.name + ".sorted")
            in_order.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            in_order.replace(self.path)
            self.partial.unlink()

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(complete=kind is None)


def read_unfinished(path: Path) -> list[Prediction]:
    """Of a file whose writer may have been killed; half a line at its end is cut away."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return read_predictions(path)


def read_predictions(path: str | os.PathLike[str]) -> list[Prediction]:
    """Read a file that `PredictionWriter` wrote.

    Raises:
        ValueError: if a line is not such an object; names file and line.
    """
    names = {field.name for field in fields(Prediction)}
    predictions = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict) or set(record) != names:
                raise ValueError(f"{path}, line {number}: must be an object with the keys {', '.join(sorted(names))}")
            predictions.append(Prediction(**record))
    return predictions


@dataclass(frozen=True)
class Summary:
    """Results of one task.

    Attributes:
        n: samples.
        correct_paper: samples that are right by rule `paper`.
        correct_strict: samples that are right by rule `strict`.
        unanswered: samples in which rule `strict` finds no answer; they count as wrong.
    """

    n: int
    correct_paper: int
    correct_strict: int
    unanswered: int

    def correct(self, rule: Rule) -> int:
        """Samples that are right by a rule."""
        return self.correct_paper if rule == "paper" else self.correct_strict

    def accuracy(self, rule: Rule) -> float:
        """Share of right answers by a rule, 0 to 1."""
        return self.correct(rule) / self.n

    @property
    def accuracy_paper(self) -> float:
        """Share of right answers by rule `paper`, 0 to 1."""
        return self.accuracy("paper")

    @property
    def accuracy_strict(self) -> float:
        """Share of right answers by rule `strict`, 0 to 1."""
        return self.accuracy("strict")


def summarise(predictions: Iterable[Prediction]) -> dict[str, Summary]:
    """Count the right answers of each task; tasks in the order in which they first appear.

    Raises:
        ValueError: if there is no prediction, or a sample of a task is there twice.
    """
    by_task: dict[str, dict[int, Prediction]] = {}
    for prediction in predictions:
        samples = by_task.setdefault(prediction.task, {})
        if prediction.index in samples:
            raise ValueError(f"task {prediction.task}: sample {prediction.index} was predicted twice")
        samples[prediction.index] = prediction
    if not by_task:
        raise ValueError("there are no predictions to summarise: the test set is empty")
    return {
        task: Summary(
            n=len(samples),
            correct_paper=sum(sample.paper for sample in samples.values()),
            correct_strict=sum(sample.strict for sample in samples.values()),
            unanswered=sum(sample.strict_answer is None for sample in samples.values()),
        )
        for task, samples in by_task.items()
    }
