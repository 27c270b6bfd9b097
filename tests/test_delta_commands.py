"""The delta commands as a user types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, changed, read
from tiny import save_tiny_llama, tiny_llama

from lift_lightning import cli
from lift_lightning.delta import Delta
from lift_lightning.delta_commands import read_recipe
from lift_lightning.errors import ConfigError


@pytest.fixture
def lift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command in a folder of its own, as the console script does; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lift-lightning", *args])
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def failing(lift, capsys: pytest.CaptureFixture[str]):
    """Run a command that ends with one message and exit status 2; the message."""

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            lift(*args)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`base`, and `one` and `two`, which differ from it in different entries."""
    save_tiny_llama(tmp_path / "base")
    for name, positions in (("one", [1, 5]), ("two", [2, 900])):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.copy_(
                changed(model.model.layers[0].self_attn.q_proj.weight, positions)
            )
        model.save_pretrained(tmp_path / name)
    return tmp_path


def test_there_and_back(lift, models: Path):
    (models / "config.yaml").write_text("model:\n  lr: 1.0e-3\nseed_everything: 43\n")
    told = lift("delta", "extract", "--base", "base", "--trained", "one", "--output", "d1", "--recipe", "config.yaml")
    assert f"wrote {models / 'd1'}" in told
    assert "2 of " in told
    assert Delta.from_pretrained("d1").description.recipe == {"model": {"lr": 1e-3}, "seed_everything": 43}
    assert f"wrote {models / 'again'}" in lift("delta", "apply", "--delta", "d1", "--output", "again")
    assert_same_bits(read(models / "again"), read(models / "one"))
    shown = lift("delta", "inspect", "--delta", "d1")
    assert "model.layers.*.self_attn.q_proj.weight" in shown
    assert "sparse" in shown
    assert "recipe: model, seed_everything" in shown
    assert "wrote" not in shown
    different = lift("delta", "diff", "--left", "again", "--right", "one")
    assert "0 of " in different
    assert "changed" in lift("delta", "diff", "--left", "base", "--right", "one")


def test_deltas_are_merged(lift, failing, models: Path):
    for name in ("one", "two"):
        lift("delta", "extract", "--base", "base", "--trained", name, "--output", f"d-{name}")
    lift("delta", "merge", "--inputs", '["d-one", "d-two"]', "--output", "both")
    lift("delta", "apply", "--delta", "both", "--output", "merged", "--base", "base")
    weight = "model.layers.0.self_attn.q_proj.weight"
    merged, base = read(models / "merged")[weight].view(-1), read(models / "base")[weight].view(-1)
    assert (merged != base).nonzero().squeeze(1).tolist() == [1, 2, 5, 900]
    message = failing("delta", "merge", "--inputs", '["d-one", "d-one"]', "--output", "twice")
    assert "2 of the 2 changed entries" in message
    lift("delta", "merge", "--inputs", '["d-one", "d-one"]', "--output", "twice", "--overlap", "mean")
    assert_same_bits(Delta.from_pretrained("twice").tensors, Delta.from_pretrained("d-one").tensors)
    assert "at least 2 deltas, got 0" in failing("delta", "merge", "--inputs", "[]", "--output", "none")


def test_mistakes_end_with_one_message(lift, failing, models: Path):
    extract = ("delta", "extract", "--base", "base", "--output", "d1")
    assert "'nowhere'" in failing(*extract, "--trained", "nowhere")
    assert "recipe 'none.yaml' cannot be read" in failing(*extract, "--trained", "one", "--recipe", "none.yaml")
    lift(*extract, "--trained", "one")
    assert "set overwrite to true" in failing(*extract, "--trained", "two")
    assert "is not that of the base" in failing("delta", "apply", "--delta", "d1", "--base", "two", "--output", "out")
    content = (models / "d1/delta.safetensors").read_bytes()
    (models / "d1/delta.safetensors").write_bytes(content[:-2])
    for command in (["apply", "--output", "out"], ["inspect"], ["push", "--repo_id", "user/delta"]):
        assert "it is cut off" in failing("delta", command[0], "--delta", "d1", *command[1:])
    assert not (models / "out").exists()


def test_a_delta_is_pushed(lift, models: Path, monkeypatch: pytest.MonkeyPatch):
    lift("delta", "extract", "--base", "base", "--trained", "one", "--output", "d1", "--base_name", "user/base")
    asked = {}

    def push_to_hub(self: Delta, repo_id: str, **options) -> str:
        asked.update(options, repo_id=repo_id, base=self.description.base)
        return "https://huggingface.co/user/delta/commit/1"

    monkeypatch.setattr(Delta, "push_to_hub", push_to_hub)
    told = lift("delta", "push", "--delta", "d1", "--repo_id", "user/delta", "--private", "true")
    assert told == "wrote https://huggingface.co/user/delta/commit/1\n"
    assert asked["repo_id"] == "user/delta"
    assert asked["base"] == "user/base"
    assert asked["private"] is True


def test_a_recipe_is_settings(tmp_path: Path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"a": [1, 2]}))
    assert read_recipe(str(file)) == {"a": [1, 2]}
    file.write_text("day: 2020-01-01")
    assert read_recipe(str(file)) == {"day": "2020-01-01"}  # what JSON does not have becomes text
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds a list; a mapping of settings is wanted"):
        read_recipe(str(file))
