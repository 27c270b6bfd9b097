"""Published test sets: which there are, where they lie, what their rows ask, and what is never written down."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_llama

from lift_lightning.datamodules import SFTDataModule
from lift_lightning.datamodules.layouts import from_gpqa
from lift_lightning.datamodules.rows import DataError, Rows
from lift_lightning.datamodules.sources import REVISIONS
from lift_lightning.datamodules.suites import as_questions, source_of, suite_files
from lift_lightning.evaluate import evaluate
from lift_lightning.evaluation import answering
from lift_lightning.evaluation.predictions import read_predictions
from lift_lightning.evaluation.scoring import extract
from lift_lightning.evaluation.tasks import COMMONSENSE, GPQA_DIAMOND, TASKS, get_suite, get_task

GPQA = {
    "Question": "Which hue has SECRET?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "one",
    "Incorrect Answer 2": "two",
    "Incorrect Answer 3": "three",
    "Record ID": "rec1",
}


def test_suites_and_single_tasks():
    assert [task.name for task in get_suite("arithmetic")] == [
        "multiarith",
        "gsm8k",
        "addsub",
        "aqua",
        "singleeq",
        "svamp",
        "mawps",
    ]
    assert get_suite(["AddSub", "arithmetic", "GPQA_Diamond"])[0].name == "addsub"
    assert len(get_suite(["AddSub", "arithmetic", "GPQA_Diamond"])) == 8
    with pytest.raises(ValueError, match="unknown test suite 'maths'; known are arithmetic, commonsense and the tasks"):
        get_suite("maths")
    with pytest.raises(ValueError, match="unknown test suite 'quickstart-source'"):
        get_suite("quickstart-source")  # which is made, not published


def test_every_published_set_has_its_source():
    published = [task for task in TASKS.values() if task.source is not None]
    assert len(published) == 7 + 8 + 2
    for task in published:
        assert task.source.licence
        assert task.source.path.startswith("https://") or task.source.path in {"ChilleD/StrategyQA", *REVISIONS}
    assert sum(task.samples for task in COMMONSENSE) == 3270 + 1838 + 1954 + 10042 + 1267 + 2376 + 1172 + 500
    assert (source_of("Idavidrein/gpqa").split, source_of("Idavidrein/gpqa").subset) == ("train", "gpqa_diamond")
    assert (source_of("x.json").split, source_of("x.json").subset) == ("test", None)


def test_where_a_suite_lies(tmp_path: Path):
    published = suite_files("addsub", None)
    assert published == {"addsub": get_task("addsub").source.path}
    assert published["addsub"].endswith("/dataset/AddSub/test.json")
    assert suite_files("commonsense", "https://host/dataset/")["arc-easy"] == "https://host/dataset/ARC-Easy/test.json"
    file = tmp_path / "gpqa_diamond.csv"
    file.touch()
    assert suite_files("gpqa-diamond", str(file)) == {"gpqa-diamond": str(file)}
    for name in ("AddSub", "gsm8k"):
        (tmp_path / name).mkdir()
    assert suite_files(["gsm8k", "addsub"], str(tmp_path)) == {
        "gsm8k": str(tmp_path / "gsm8k"),
        "addsub": str(tmp_path / "AddSub"),
    }
    with pytest.raises(DataError, match=r"with test_suite, test_path is the folder of the test sets, got \['a.json'\]"):
        suite_files("arithmetic", ["a.json"])
    with pytest.raises(DataError, match=r"unknown test suite 'maths'.*set --data.test_suite"):
        SFTDataModule(test_suite="maths")


def test_data_only_to_test_on(tmp_path: Path):
    (tmp_path / "AddSub").mkdir()
    (tmp_path / "AddSub/test.json").write_text(json.dumps([{"instruction": "2+2?", "answer": 4}]))
    (tmp_path / "AddSub/train.json").write_text("[]")
    data = SFTDataModule(tokenizer=byte_tokenizer(), test_suite="addsub", test_path=str(tmp_path))
    data.setup("test")
    (loader,) = data.test_dataloader()
    assert [row["answer"] for batch in loader for row in batch["rows"]] == ["4"]
    with pytest.raises(DataError, match="nothing to train on: set --data.path"):
        data.setup("fit")
    data = SFTDataModule(tokenizer=byte_tokenizer(), test_suite=["addsub", "svamp"], test_path=str(tmp_path))
    with pytest.raises(DataError, match=r"SVAMP looks like a local path and does not exist: correct --data.test_path"):
        data.setup("test")


def test_another_number_of_rows_is_told(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        as_questions("svamp", Rows("some/svamp", [{"instruction": "a", "answer": 1}], [("x", 1)]), 43)
    assert "some/svamp has 1 rows, the published test set of svamp 1,000" in caplog.text


def test_choices_of_gpqa_have_an_order_that_seed_and_question_decide():
    found = from_gpqa(GPQA, "row 1", seed=43)
    assert found == from_gpqa({**GPQA, "Record ID": "rec9"}, "row 7", seed=43)
    letter = found["answer"]
    assert f"\n{letter}) right\n" in found["instruction"]
    assert all(f") {wrong}\n" in found["instruction"] for wrong in ("one", "two", "three"))
    others = [from_gpqa(GPQA, "row 1", seed=seed)["answer"] for seed in range(40)]
    assert set(others) == set("ABCD")
    questions = [from_gpqa({**GPQA, "Question": f"{i}?"}, "row 1", seed=43)["answer"] for i in range(400)]
    assert all(70 <= questions.count(letter) <= 130 for letter in "ABCD")
    with pytest.raises(DataError, match="row 3 has no column 'Incorrect Answer 2'"):
        from_gpqa({key: GPQA[key] for key in GPQA if key != "Incorrect Answer 2"}, "row 3", seed=43)


@pytest.mark.parametrize(
    ("text", "paper", "strict"),
    [
        ("So it must be B.\n\nAnswer: B", "B", "B"),
        ("Answer: A would be wrong.\nAnswer: C", "C", "C"),
        ("**Answer:** $D$", "D", "D"),
        ("Answer: (b)", None, "B"),
        ("A long train of thought that is cut off", None, None),
        ("", None, None),
        ("\\boxed{C}", None, "C"),
    ],
)
def test_answers_of_gpqa(text: str, paper: str | None, strict: str | None):
    assert (extract(GPQA_DIAMOND, text, "paper"), extract(GPQA_DIAMOND, text, "strict")) == (paper, strict)


def test_nothing_of_gpqa_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, capsys):
    """Neither questions nor what a model says, which may repeat them; the run goes on without them all the same."""
    file = tmp_path / "gpqa_diamond.csv"
    with file.open("w", newline="") as out:
        rows = csv.DictWriter(out, list(GPQA))
        rows.writeheader()
        rows.writerows({**GPQA, "Question": f"SECRET {i}?"} for i in range(4))

    def said(model, tokenizer, input_ids, attention_mask, settings, *, in_step=False):
        assert settings.max_new_tokens == 32768
        asked.extend(tokenizer.decode(ids) for ids in input_ids)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return ["SECRET is what they ask. Answer: A"] * len(input_ids)

    asked: list[str] = []
    monkeypatch.setattr(answering, "generate_within_memory", said)
    arguments = (tiny_llama(), byte_tokenizer(), str(file), tmp_path / "out")
    with caplog.at_level("DEBUG"), pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, suite="gpqa-diamond", num_beams=1, batch_size=2)
    asked.clear()

    def said_at_last(model, tokenizer, input_ids, *rest, in_step=False):
        asked.extend(input_ids)
        return ["Answer: A"] * len(input_ids)

    monkeypatch.setattr(answering, "generate_within_memory", said_at_last)
    with caplog.at_level("DEBUG"):
        found = evaluate(*arguments, suite="gpqa-diamond", num_beams=1, batch_size=2)["gpqa-diamond"]
    assert (found.n, len(asked)) == (4, 2)
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "SECRET" not in written + caplog.text + "".join(capsys.readouterr())
    predictions = read_predictions(tmp_path / "out/gpqa-diamond.jsonl")
    assert all(p.prediction == "" and p.strict_answer == "A" for p in predictions)
    assert len({p.instruction for p in predictions}) == 4
    assert all(p.instruction.startswith("sha256:") for p in predictions)
