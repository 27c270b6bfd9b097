"""A model without weights that reads its own part of them is the model that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_llama, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lift_lightning.models import load_empty_model, load_model
from lift_lightning.sharding import allocate
from lift_lightning.weight_files import WeightFiles, WeightLayoutError


def tiny_gpt2() -> PreTrainedModel:
    """Conv1D layers, position embeddings and causal masks in buffers."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2))


def tiny_mixtral() -> PreTrainedModel:
    """Experts, which transformers fuses when it loads them."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=4, **sizes))


MODELS = {
    "tied": tiny_llama,
    "untied": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": tiny_gpt2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_a_normal_start(kind: str, dtype: torch.dtype, tmp_path: Path):
    MODELS[kind]().save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, files = load_empty_model(tmp_path, dtype=dtype)
    assert all(parameter.is_meta and parameter.dtype == dtype for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    allocate(model, torch.device("cpu"))
    files.fill(model)
    files.close()
    expected, _ = load_model(tmp_path, dtype=dtype)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, buffer), (_, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert buffer.dtype == other.dtype, name
        assert torch.equal(buffer, other), name
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(model.eval()(ids).logits, expected.eval()(ids).logits)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_modules_made_later_have_their_parameters(tmp_path: Path):
    load_empty_model(save_tiny_llama(tmp_path))[1].close()
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_weights_that_transformers_converts_are_left_to_it(tmp_path: Path):
    tiny_mixtral().save_pretrained(tmp_path)
    with pytest.raises(WeightLayoutError, match="the files have no model.layers.0.mlp"):
        load_empty_model(tmp_path)


def test_weights_in_another_format_or_shape_are_told_apart(tmp_path: Path):
    with pytest.raises(WeightLayoutError, match="has no model.safetensors"):
        WeightFiles(tmp_path)
    files = WeightFiles(save_tiny_llama(tmp_path))
    with pytest.raises(WeightLayoutError, match="another shape"):
        files.match(tiny_llama(hidden_size=16))
