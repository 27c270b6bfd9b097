"""A model that is there is tested in Python, and completes a file of instructions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, save_tiny_llama, tiny_llama, write_sums

from lift_lightning import cli
from lift_lightning.datamodules.rows import DataError
from lift_lightning.errors import ConfigError
from lift_lightning.evaluate import evaluate
from lift_lightning.evaluation import answering, generation
from lift_lightning.evaluation.predictions import read_predictions
from lift_lightning.predict import predict


def write_task(folder: Path, name: str, rows: list[dict]) -> str:
    (folder / name).mkdir()
    (folder / name / "test.json").write_text(json.dumps(rows))
    return str(folder / name / "test.json")


def test_several_tasks_each_with_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limits = []

    def said(model, tokenizer, input_ids, attention_mask, settings, *, in_step=False):
        limits.append((settings.num_beams, settings.max_new_tokens))
        return ["the correct answer is true, or 4"] * len(input_ids)

    monkeypatch.setattr(answering, "generate_within_memory", said)
    boolq = write_task(tmp_path, "boolq", [{"instruction": f"Is {i}?", "answer": "true"} for i in range(5)])
    addsub = write_task(
        tmp_path, "AddSub", [{"instruction": "2+2?", "answer": 4}, {"instruction": "2+3?", "answer": 5}]
    )
    found = evaluate(
        tiny_llama(), byte_tokenizer(), [boolq, addsub], tmp_path / "out", batch_size=3, limit=4, run={"model": "mine"}
    )
    assert {task: (one.n, one.correct_strict) for task, one in found.items()} == {"boolq": (4, 4), "addsub": (2, 1)}
    assert limits == [(4, 32), (4, 32), (4, 256)]
    run = json.loads((tmp_path / "out/results.json").read_text())["run"]
    decoding = {"num_beams": 4, "max_new_tokens": None, "temperature": None, "seed": 43}
    assert run == {**decoding, "limit": 4, "model": "mine"}
    assert [p.index for p in read_predictions(tmp_path / "out/boolq.jsonl")] == [0, 1, 2, 3]


def test_drawn_answers_follow_from_the_seed(tmp_path: Path):
    sums = write_sums(tmp_path / "sums.json", rows=6)

    def drawn(folder: str, **settings) -> str:
        decoding = {"num_beams": 1, "max_new_tokens": 6, "batch_size": 4, "temperature": 0.9, **settings}
        before = torch.get_rng_state()
        evaluate(tiny_llama(), byte_tokenizer(), str(sums), tmp_path / folder, unknown_tasks="number", **decoding)
        assert torch.equal(torch.get_rng_state(), before)  # of the caller's generator nothing is used
        return (tmp_path / folder / "sums.jsonl").read_text()

    first = drawn("first")
    assert drawn("again") == first
    assert len({drawn("seed", seed=44), drawn("greedy", temperature=None), first}) == 3
    with pytest.raises(ConfigError, match="temperature 0.9 draws a text, of which there is one: set num_beams to 1"):
        drawn("beams", num_beams=4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"instruction": "2+2?"}], "has no column 'answer'"),
        ([{"instruction": "2+2?", "answer": ""}], "a test row needs its answer"),
        ([{"instruction": 4, "answer": 4}], r"column 'instruction' is a number \(4\); it must be text"),
        ([{"instruction": "2+2?", "answer": ["4"]}], "it must be text or a number"),
    ],
)
def test_a_faulty_test_set_is_named_before_anything_is_generated(rows: list[dict], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        evaluate(tiny_llama(), byte_tokenizer(), write_task(tmp_path, "AddSub", rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_completions_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model, rows = save_tiny_llama(tmp_path / "model"), write_sums(tmp_path / "rows.json", rows=5)
    arguments = ["--model_name_or_path", str(model), "--path", str(rows), "--max_new_tokens", "4", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["lift-lightning"])
    cli.main(["predict", *arguments, "--output", str(tmp_path / "out/all.jsonl"), "--batch_size", "2"])
    assert f"wrote {tmp_path / 'out/all.jsonl'}" in capsys.readouterr().out
    whole = (tmp_path / "out/all.jsonl").read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    asked = [row["instruction"] for row in json.loads(rows.read_text())]
    assert [line["instruction"] for line in lines] == asked
    assert all(set(line) == {"instruction", "input", "completion"} for line in lines)
    # A run that died in the third line.
    half = "".join(f"{line}\n" for line in whole.split("\n")[:2]) + '{"instruction": "'
    (tmp_path / "again.jsonl.partial").write_text(half)
    counted = []
    original = generation.generate
    monkeypatch.setattr(
        generation, "generate", lambda *args, **kwargs: counted.append(len(args[2])) or original(*args, **kwargs)
    )
    settings = {"max_new_tokens": 4, "batch_size": 2, "device": "cpu"}
    assert predict(str(model), str(rows), str(tmp_path / "again.jsonl"), **settings).read_text() == whole
    assert counted == [2, 1]
    with pytest.raises(FileExistsError, match="is there already"):
        predict(str(model), str(rows), str(tmp_path / "again.jsonl"))
    (tmp_path / "other.jsonl.partial").write_text(json.dumps({**lines[1]}) + "\n")
    with pytest.raises(DataError, match="has completions of other instructions"):
        predict(str(model), str(rows), str(tmp_path / "other.jsonl"), device="cpu")
