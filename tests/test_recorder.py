"""Answers of several tasks go to a file each, and the totals are of the files."""

import json

import pytest

from lift_lightning.evaluation.recorder import AnswerRecorder, summary_table


def row(index: int, task: str, answer: str) -> dict:
    return {"index": index, "task": task, "instruction": f"question {index}", "answer": answer}


def test_each_task_has_its_file_and_its_totals(tmp_path):
    recorder = AnswerRecorder(tmp_path)
    recorder.record([row(0, "AddSub", "7"), row(0, "AQuA", "B")], ["The answer is 7.", "The Answer is B"])
    recorder.record([row(1, "AddSub", "8")], ["no idea"])
    found = recorder.finish()
    assert (found["addsub"].n, found["addsub"].correct_strict, found["addsub"].unanswered) == (2, 1, 1)
    assert (found["aqua"].correct_paper, found["aqua"].correct_strict) == (0, 1)  # the paper's rule reads A of Answer
    lines = [json.loads(line) for line in (tmp_path / "addsub.jsonl").read_text().splitlines()]
    assert [(line["index"], line["prediction"], line["strict"]) for line in lines] == [
        (0, "The answer is 7.", True),
        (1, "no idea", False),
    ]
    assert summary_table(found, tmp_path).row_count == 2


def test_a_task_of_ones_own_stays_inside_the_folder(tmp_path):
    recorder = AnswerRecorder(tmp_path / "predictions", generic="exact")
    recorder.record([row(0, "../mine", "yes")], ["yes"])
    assert recorder.finish()["../mine"].correct_strict == 1
    assert [p.name for p in (tmp_path / "predictions").iterdir()] == [".._mine.jsonl"]


def test_an_unknown_task_is_refused_when_nothing_says_how_to_score_it(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'mine'"):
        AnswerRecorder(tmp_path).record([row(0, "mine", "yes")], ["yes"])
