"""Published sets and rows of one's own become the same prompts, targets and answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny import byte_tokenizer

from lift_lightning.datamodules import (
    AlpacaDataModule,
    Commonsense170KDataModule,
    GSM8KDataModule,
    InstructionDataModule,
    Math10KDataModule,
    SFTDataModule,
    StrategyQADataModule,
)
from lift_lightning.datamodules.rows import DataError
from lift_lightning.evaluation.scoring import score
from lift_lightning.evaluation.tasks import get_task
from lift_lightning.prompts import render_prompt

DATA, MODEL = os.environ.get("LIFT_DATA_DIR"), os.environ.get("LIFT_SMOLLM2_DIR")


def made(cls: type[SFTDataModule], rows: list[dict], tmp_path: Path, **options) -> SFTDataModule:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    data = cls(str(path), byte_tokenizer(), **{"val_size": 0, "cache_dir": str(tmp_path / "cache"), **options})
    data.setup("fit")
    return data


def example(data: SFTDataModule, i: int = 0) -> tuple[str, str]:
    """Prompt and target as they were tokenised, without BOS and EOS."""
    row, tokenizer = data.train_dataset[i], byte_tokenizer()
    head = row["prompt_length"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    return tokenizer.decode(row["input_ids"][1:head]), tokenizer.decode(row["labels"][head:-1])


def test_columns_under_other_names(tmp_path: Path):
    rows = [{"question": "Which?", "context": "Two.", "reply": "Both.", "gold": "both"}]
    names = {"instruction_column": "question", "input_column": "context", "output_column": "reply"}
    tests = tmp_path / "mine.json"
    tests.write_text(json.dumps([{**rows[0], "question": "Which of the two?"}]))
    data = made(InstructionDataModule, rows, tmp_path, **names, answer_column="gold", test_path=str(tests))
    assert example(data) == (render_prompt("Which?", "Two."), "Both.")
    (batch,) = data.test_dataloader()[0]
    assert batch["rows"][0] == {
        "index": 0,
        "task": "mine",
        "instruction": "Which of the two?",
        "input": "Two.",
        "answer": "both",
    }


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path):
    with pytest.raises(DataError, match=r"no column 'output' but 'instruction', 'reply': set --data.output_column"):
        made(InstructionDataModule, [{"instruction": "Which?", "reply": "Both."}], tmp_path)


def test_gsm8k_loses_its_calculator(tmp_path: Path):
    answer = "She sold 48/2 = <<48/2=24>>24.\nIn all 1,048+24 = $<<1048+24=1072>>1,072.\n#### 1,072"
    adapted = {"instruction": "How many?", "input": "", "output": "Two. The answer is 2.", "answer": "2"}
    data = made(GSM8KDataModule, [{"question": "How much?", "answer": answer}], tmp_path)
    target = "She sold 48/2 = 24.\nIn all 1,048+24 = $1,072.\n#### 1,072"
    assert example(data) == (render_prompt("How much?"), target)
    assert score(get_task("gsm8k"), target, data.read(data.path, "train").rows[0]["answer"])["strict"]
    assert example(made(GSM8KDataModule, [adapted], tmp_path)) == (render_prompt("How many?"), "Two. The answer is 2.")
    with pytest.raises(DataError, match="row 1, column 'answer' does not end in '#### N'"):
        made(GSM8KDataModule, [{"question": "How much?", "answer": "24"}], tmp_path)


@pytest.mark.parametrize(("answer", "wanted"), [(True, "true"), ("no", "false"), ("Yes", "true"), (False, "false")])
def test_strategyqa_is_asked_as_boolq_is(answer, wanted: str, tmp_path: Path):
    data = made(StrategyQADataModule, [{"question": "Is it?", "answer": answer}], tmp_path)
    asked = "Please answer the following question with true or false, question: Is it?\n\nAnswer format: true/false"
    assert example(data) == (render_prompt(asked), f"the correct answer is {wanted}")
    assert score(get_task("StrategyQA"), f"the correct answer is {wanted}", wanted)["strict"]


def test_strategyqa_needs_a_truth(tmp_path: Path):
    with pytest.raises(DataError, match="column 'answer' is 'maybe'; it must be true or false"):
        made(StrategyQADataModule, [{"question": "Is it?", "answer": "maybe"}], tmp_path)


@pytest.mark.parametrize(
    ("cls", "notice"),
    [
        (AlpacaDataModule, "CC-BY-NC-4.0"),
        (Commonsense170KDataModule, "official validation splits"),
        (Math10KDataModule, "overlap with MAWPS's training set"),
    ],
)
def test_what_has_to_be_told_is_told(cls: type[SFTDataModule], notice: str, tmp_path: Path, caplog):
    rows = [{"instruction": "Say A.", "input": "", "output": "A.", "answer": ""}]
    with caplog.at_level("INFO"):
        made(cls, rows, tmp_path)
    assert notice in caplog.text


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA and MODEL), reason="LIFT_DATA_DIR and LIFT_SMOLLM2_DIR are not both set")
def test_batches_of_like_lengths_have_little_padding(tmp_path: Path):
    path = f"{DATA}/math_gsm8k_train.json"
    data = Math10KDataModule(path, MODEL, batch_size=16, group_by_length=True, cache_dir=str(tmp_path))
    data.setup("fit")
    masks = [batch["attention_mask"] for batch in data.train_dataloader()]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding <= 0.1


def test_gsm8k_of_the_hub_is_its_main_configuration(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load(path, **options):
        asked.append((path, options))
        return [{"question": "How much?", "answer": "One.\n#### 1"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    rows = GSM8KDataModule(revision="abc").read("openai/gsm8k", "train").rows
    assert asked == [("openai/gsm8k", {"split": "train", "revision": "abc", "name": "main"})]
    assert rows == [{"instruction": "How much?", "output": "One.\n#### 1", "answer": "1"}]
