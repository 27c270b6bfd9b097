"""Answers of several tasks go to a file each, and the totals are of the files."""

import json

import pytest

from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.recorder import AnswerRecorder, is_answered, summary_table


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
    names = sorted(p.name for p in (tmp_path / "predictions").iterdir())
    assert names == [".._mine.jsonl", "results.json", "run.json"]


def test_an_unknown_task_is_refused_when_nothing_says_how_to_score_it(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'mine'"):
        AnswerRecorder(tmp_path).record([row(0, "mine", "yes")], ["yes"])


def test_a_run_that_was_cut_off_goes_on_without_a_lost_or_doubled_sample(tmp_path):
    run = {"model": "m", "num_beams": 4, "command": "first"}
    rows = [row(i, "AddSub", str(i)) for i in range(6)]
    before = AnswerRecorder(tmp_path, run=run)
    assert before.answered == {}
    before.record([rows[3], rows[1]], ["The answer is 3.", "The answer is 1.\u2028"])
    before.leave()
    partial = tmp_path / "addsub.jsonl.partial"
    with partial.open("a") as file:
        file.write('{"index": 5, "task": "add')  # killed here

    after = AnswerRecorder(tmp_path, run={**run, "command": "second"})
    left = [r for r in rows if not is_answered(r, after.answered)]
    assert [r["index"] for r in left] == [0, 2, 4, 5]
    after.record(left[::-1], ["The answer is 5.", "no idea", "The answer is 2.", "The answer is 0."])
    found = after.finish()["addsub"]
    assert (found.n, found.correct_strict, found.unanswered) == (6, 5, 1)
    lines = [json.loads(line) for line in (tmp_path / "addsub.jsonl").read_text().split("\n") if line]
    assert [line["index"] for line in lines] == list(range(6))  # in the order of the test set
    assert not partial.exists()
    assert AnswerRecorder(tmp_path, run=run).answered == {}  # what is done is done: a new test begins anew


def test_a_task_that_was_done_counts_though_nothing_is_left_of_it(tmp_path):
    before = AnswerRecorder(tmp_path)
    before.record([row(0, "AddSub", "7"), row(0, "AQuA", "B")], ["7", "B"])
    before.leave()
    after = AnswerRecorder(tmp_path)
    after.record([row(1, "AQuA", "B")], ["B"])
    assert {task: found.n for task, found in after.finish().items()} == {"aqua": 2, "addsub": 1}


def test_another_run_or_test_set_is_not_mixed_in(tmp_path):
    before = AnswerRecorder(tmp_path, run={"num_beams": 4})
    before.record([row(0, "AddSub", "7")], ["7"])
    before.leave()
    with pytest.raises(ConfigError, match=r"another run \(num_beams: 4 or 1\): choose another folder"):
        AnswerRecorder(tmp_path, run={"num_beams": 1})
    answered = AnswerRecorder(tmp_path, run={"num_beams": 4}).answered
    with pytest.raises(ConfigError, match="sample 0 of addsub was another question"):
        is_answered({**row(0, "AddSub", "7"), "instruction": "something else"}, answered)
