"""Intervals, means and the file of results."""

from __future__ import annotations

import json

import pytest

from lift_lightning.evaluation.predictions import Summary
from lift_lightning.evaluation.recorder import AnswerRecorder, summary_table
from lift_lightning.evaluation.results import MEANS, means, results, wilson_interval, write_json


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and the ends of the range
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
    ],
)
def test_wilson_interval(correct: int, n: int, interval: tuple[float, float]):
    assert wilson_interval(correct, n) == pytest.approx(interval, abs=5e-5)


def test_means_are_of_complete_groups():
    summaries = {task: Summary(10, i, i + 1, 0) for i, task in enumerate(MEANS["arithmetic"])}
    found = means(summaries)
    assert set(found) == {"arithmetic", "arithmetic, easy", "arithmetic, hard and clean"}
    assert found["arithmetic"] == pytest.approx({"paper": 0.3, "strict": 0.4})
    assert set(MEANS["arithmetic, easy"]) | set(MEANS["arithmetic, hard and clean"]) == set(MEANS["arithmetic"])
    del summaries["svamp"]
    assert set(means(summaries)) == {"arithmetic, easy"}
    assert summary_table(summaries, "folder").row_count == 7


def test_results_say_what_was_found_and_how(tmp_path):
    found = results({"addsub": Summary(20, 19, 20, 0)}, {"model": "m", "seed": 1})
    task = found["tasks"]["addsub"]
    assert (task["version"], task["samples"], task["unanswered"]) == (1, 20, 0)
    assert task["paper"]["accuracy"] == 0.95
    assert task["strict"]["interval_95"] == pytest.approx([0.8389, 1.0], abs=5e-5)
    assert found["run"] == {"model": "m", "seed": 1}
    write_json(tmp_path / "results.json", found)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_recorder_writes_them(tmp_path):
    recorder = AnswerRecorder(tmp_path, run={"model": "m"})
    recorder.record([{"index": 0, "task": "AddSub", "instruction": "?", "answer": "4"}], ["4"])
    recorder.finish()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["tasks"]["addsub"]["strict"]["correct"] == 1
    assert found["run"] == {"model": "m"}
