"""A base and a delta become the model folder that the delta was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, changed, delta_of, read, write
from tiny import save_tiny_llama, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from lift_lightning.delta import Delta, open_folder, write_model
from lift_lightning.errors import DeltaError


def written(base: Path, delta: Delta, output: Path, **options) -> Path:
    with open_folder(str(base)) as source:
        return write_model(source, delta, output, **options)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "base")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A few entries changed, in bfloat16, as training in bf16-true leaves it."""
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(changed(parameter, [1, 8, 30]))
    model.save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    return tmp_path / "trained"


def test_the_folder_is_the_trained_model(base: Path, trained: Path, tmp_path: Path):
    output = written(base, delta_of(base, trained), tmp_path / "out")
    assert_same_bits(read(output), read(trained))
    expected, model = AutoModelForCausalLM.from_pretrained(trained), AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16  # by the trained config; the base is in float32
    ids = torch.arange(3, 50).unsqueeze(0)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert AutoTokenizer.from_pretrained(output).eos_token_id == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_large_models_are_written_in_shards(base: Path, trained: Path, tmp_path: Path):
    output = written(base, delta_of(base, trained), tmp_path / "out", shard_bytes=20_000)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((output / file).stat().st_size < 22_000 for file in files)
    assert sorted(path.name for path in output.glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read(trained).values())
    assert_same_bits(read(output), read(trained))
    AutoModelForCausalLM.from_pretrained(output)


def test_another_base_leaves_nothing_behind(base: Path, trained: Path, tmp_path: Path):
    delta = delta_of(base, trained, base_name="user/base", revision="abc")
    other = tmp_path / "other"
    tiny_llama(seed=2).save_pretrained(other)
    with pytest.raises(DeltaError, match="is not that of the base .* load 'user/base' at revision abc"):
        written(other, delta, tmp_path / "out")
    tiny_llama(num_hidden_layers=1).save_pretrained(other)
    with pytest.raises(DeltaError, match=r"is not the base of the delta: it has no model.layers.1"):
        written(other, delta, tmp_path / "out")
    tiny_llama(num_hidden_layers=3).save_pretrained(other)
    with pytest.raises(DeltaError, match=r"has a tensor that it should not have, model.layers.2"):
        written(other, delta, tmp_path / "out")
    tiny_llama(hidden_size=40).save_pretrained(other)
    with pytest.raises(DeltaError, match=r"is \(.*40.*\) in .*other' and \(.*\) in the base of the delta"):
        written(other, delta, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other", "trained"]


def test_a_broken_code_leaves_nothing_behind(base: Path, trained: Path, tmp_path: Path):
    delta = delta_of(base, trained)
    name = "model.layers.1.mlp.up_proj.weight.indices"
    delta.tensors[name] = torch.zeros_like(delta.tensors[name])
    with pytest.raises(DeltaError, match="broken at"):
        written(base, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_replaced_on_request_only(base: Path, trained: Path, tmp_path: Path):
    delta = delta_of(base, trained)
    output = written(base, delta, tmp_path / "out")
    with pytest.raises(FileExistsError, match="set overwrite to true"):
        written(base, delta, output)
    written(base, delta, output, overwrite=True)


def test_a_delta_may_be_of_a_few_tensors_only(tmp_path: Path):
    base = write(tmp_path / "base", {"a": torch.zeros(30), "b": torch.ones(2)})
    trained = write(tmp_path / "trained", {"a": changed(torch.zeros(30), [3]), "c": torch.ones(3)})
    output = written(base, delta_of(base, trained), tmp_path / "out")
    assert_same_bits(read(output), read(trained))
