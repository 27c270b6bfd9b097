"""The bundled model: what is shipped is what the script makes, and can what it should; pretraining can be resumed."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lift_lightning.models import BUNDLED, load_model, load_tokenizer
from lift_lightning.quickstart import pretrain
from lift_lightning.quickstart.pretrain import Pretraining, Recipe
from lift_lightning.quickstart.skills import SKILLS, accuracies, answers
from lift_lightning.quickstart.text import Question, questions
from lift_lightning.quickstart.tokenizer import train_tokenizer

NAME = "lift-lightning/quickstart"
MODEL = Path(pretrain.__file__).parent / "model"
SMALL = Recipe(
    steps=6,
    batch_size=4,
    warmup_steps=2,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(scope="module")
def bundled():
    return load_model(NAME).model, load_tokenizer(NAME)


# ---------------------------------------------------------------- shipped


def test_the_name_stands_for_the_folder(bundled, tmp_path, monkeypatch):
    model, tokenizer = bundled
    same = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert tokenizer.eos_token == "<|end|>"
    # A folder of that name, if the user has one, is what is meant.
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    with pytest.raises(OSError, match=r"no config\.json"):
        load_model(NAME)
    assert list(BUNDLED) == [NAME]


def test_it_is_small_and_complete():
    assert (MODEL / "model.safetensors").stat().st_size < 8e6
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"]


def test_the_tokenizer_is_the_one_that_the_generator_gives(bundled, tmp_path):
    train_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((MODEL / "tokenizer.json").read_text())


def test_the_record_is_of_the_recipe_in_the_code():
    record = json.loads((MODEL / "pretraining.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    assert record["held_out_questions"] >= 300
    assert record["accuracy"]["source"] >= 0.9
    assert record["accuracy"]["bridge"] >= 0.9
    assert record["accuracy"]["target"] <= 0.15
    with (MODEL / "pretraining.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    assert int(log[-1]["step"]) == Recipe.steps
    assert float(log[-1]["loss"]) < 0.5 * float(log[0]["loss"])
    assert float(log[-1]["bridge"]) >= 0.9


def test_it_can_do_what_the_record_says(bundled):
    record = json.loads((MODEL / "pretraining.json").read_text())
    found = accuracies(*bundled, 100)
    assert list(found) == list(SKILLS)
    for skill in SKILLS:  # three standard errors of 100 questions
        assert found[skill] == pytest.approx(record["accuracy"][skill], abs=0.09)


def test_answers_come_in_order_and_whatever_the_batch(bundled):
    model, tokenizer = bundled
    asked = [*questions("bridge", 3, split="heldout"), Question("Which month comes after May?", "", "")]
    texts = answers(model, tokenizer, asked)
    assert texts[-1] == "The answer is June."
    assert [text.count("=") for text in texts] == [1, 1, 1, 0]
    assert answers(model, tokenizer, asked, batch_size=1) == texts


# ---------------------------------------------------------------- pretraining


@pytest.fixture
def few_questions(monkeypatch):
    monkeypatch.setattr(pretrain, "WATCHED", 2)
    monkeypatch.setattr(pretrain, "TESTED", 2)


def weights(run: Pretraining) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_pretraining_goes_on_where_it_was_cut_off(tmp_path, few_questions, monkeypatch):
    monkeypatch.setattr(
        pretrain, "BATCHES_A_BLOCK", 4
    )  # so that the cut is inside the first block and the end in the next
    whole = Pretraining(SMALL, tmp_path / "whole")
    whole.run(log_every=2, save_every=100, evaluate_every=100)

    cut = Pretraining(SMALL, tmp_path / "cut")
    real, taken = cut.train_step, []

    def stop_after_three() -> torch.Tensor:
        taken.append(real())
        if len(taken) == 4:
            raise KeyboardInterrupt
        return taken[-1]

    monkeypatch.setattr(cut, "train_step", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        cut.run(log_every=1, save_every=3, evaluate_every=100)
    again = Pretraining(SMALL, tmp_path / "cut")
    assert again.step == 3
    again.run(log_every=1, save_every=100, evaluate_every=100)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())
    assert [row["step"] for row in again.log] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    Pretraining(SMALL, tmp_path).save()
    with pytest.raises(SystemExit, match="of another recipe"):
        Pretraining(Recipe(), tmp_path)


def test_the_finished_folder(tmp_path, few_questions):
    run = Pretraining(SMALL, tmp_path / "run")
    run.run(log_every=3, save_every=100, evaluate_every=3)
    found = run.finish(tmp_path / "model")
    assert found["accuracy"] == {"source": 0.0, "bridge": 0.0, "target": 0.0}
    assert json.loads((tmp_path / "model/pretraining.json").read_text()) == json.loads(json.dumps(found))
    lines = (tmp_path / "model/pretraining.csv").read_text().splitlines()
    assert lines[0] == "step,loss,source,bridge,target"
    assert [line.split(",")[0] for line in lines[1:]] == ["3", "6"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 1
    assert all(
        torch.equal(value, run.model.state_dict()[name].bfloat16()) for name, value in model.state_dict().items()
    )


def test_a_folder_that_is_there_is_not_replaced(tmp_path, capsys):
    """It was, after an hour of training."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        pretrain.main(["--output", str(tmp_path), "--folder", str(tmp_path / "run")])
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_second_stage_begins_at_its_share(monkeypatch):
    asked = []

    def spy(seed: int, count: int, *, stage: int) -> list:
        asked.append((seed, stage))
        return []

    monkeypatch.setattr(pretrain, "documents", spy)
    for block in (0, 140, 141, 374):
        pretrain.block_of_batches(block, Recipe(), None)
    assert asked == [(1_000_000, 1), (1_000_140, 1), (1_000_141, 2), (1_000_374, 2)]
    asked.clear()
    pretrain.block_of_batches(50, Recipe(steps=1000), None)
    assert asked == [(1_000_050, 2)]


def test_batches_are_of_like_length():
    tokenizer = train_tokenizer()
    batches = pretrain.block_of_batches(0, Recipe(batch_size=16), tokenizer)
    assert [len(batch) for batch in batches] == [16] * pretrain.BATCHES_A_BLOCK
    tokens = sum(len(ids) for batch in batches for ids in batch)
    padded = sum(max(map(len, batch)) * len(batch) for batch in batches)
    assert padded < 1.15 * tokens
    assert all(ids[-1] == tokenizer.eos_token_id for batch in batches for ids in batch)
    assert batches == pretrain.block_of_batches(0, Recipe(batch_size=16), tokenizer)
    assert batches != pretrain.block_of_batches(1, Recipe(batch_size=16), tokenizer)
