"""Prediction files and the accuracies that follow from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lift_lightning.evaluation.predictions import Prediction, PredictionWriter, read_predictions, summarise
from lift_lightning.evaluation.tasks import get_task


def prediction(index: int, text: str, gold: str = "4", task: str = "addsub") -> Prediction:
    return Prediction.scored(get_task(task), index=index, instruction="2 + 2 ?", prediction=text, gold=gold)


def test_one_object_per_sample(tmp_path: Path) -> None:
    path = tmp_path / "new" / "addsub.jsonl"
    with PredictionWriter(path) as writer:
        writer.write(prediction(0, "The answer is 4.\nCafé"))
        writer.write(prediction(1, "no idea"))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "index": 0,
        "task": "addsub",
        "task_version": 1,
        "instruction": "2 + 2 ?",
        "prediction": "The answer is 4.\nCafé",
        "gold": "4",
        "paper_answer": 4.0,
        "strict_answer": 4.0,
        "paper": True,
        "strict": True,
    }
    assert json.loads(lines[1])["strict_answer"] is None
    assert read_predictions(path) == [prediction(0, "The answer is 4.\nCafé"), prediction(1, "no idea")]


def test_a_file_under_its_final_name_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "addsub.jsonl"
    path.write_text("the results of an earlier run\n")

    def fail() -> None:
        with PredictionWriter(path) as writer:
            writer.write(prediction(0, "4"))
            # Flushed line by line: a run that is killed here has lost nothing.
            assert read_predictions(writer.partial) == [prediction(0, "4")]
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert path.read_text() == "the results of an earlier run\n"
    assert len(read_predictions(tmp_path / "addsub.jsonl.partial")) == 1

    writer = PredictionWriter(path)
    writer.write(prediction(3, "4"))
    writer.close()
    writer.close()
    assert [p.index for p in read_predictions(path)] == [3]
    assert [p.name for p in tmp_path.iterdir()] == ["addsub.jsonl"]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "addsub.jsonl"
    with PredictionWriter(path) as writer:
        writer.write(prediction(0, "4"))
    good = path.read_text()
    path.write_text(good + good[:20])
    with pytest.raises(ValueError, match=r"addsub.jsonl, line 2: not JSON"):
        read_predictions(path)
    path.write_text(good + '{"index": 1}\n')
    with pytest.raises(ValueError, match=r"addsub.jsonl, line 2: must be an object with the keys gold, index"):
        read_predictions(path)


def test_a_faulty_gold_answer_names_the_sample() -> None:
    with pytest.raises(ValueError, match="sample 7: task addsub: the gold answer must be a number, got 'many'"):
        prediction(7, "4", gold="many")


def test_summary_counts_each_task_by_both_rules() -> None:
    summary = summarise(
        [
            prediction(0, "The answer is 4."),
            prediction(1, "The answer is 4. Checked 2 times."),  # strict only
            prediction(2, "The answer is 9-4", gold="-4"),  # paper only, and strict finds nothing
            prediction(0, "The Answer is B", gold="B", task="aqua"),
        ]
    )
    assert list(summary) == ["addsub", "aqua"]
    addsub = summary["addsub"]
    assert (addsub.n, addsub.correct_paper, addsub.correct_strict, addsub.unanswered) == (3, 2, 2, 1)
    assert addsub.accuracy_paper == pytest.approx(2 / 3)
    assert summary["aqua"].accuracy_paper == 0.0
    assert summary["aqua"].accuracy_strict == 1.0


def test_nothing_to_summarise_raises() -> None:
    with pytest.raises(ValueError, match="there are no predictions"):
        summarise([])


def test_a_sample_counts_once() -> None:
    with pytest.raises(ValueError, match="task addsub: sample 0 was predicted twice"):
        summarise([prediction(0, "4"), prediction(0, "4")])
