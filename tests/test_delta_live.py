"""A delta on a model in memory: what came of training to the last bit, and the base again to the last bit."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, changed
from tiny import tiny_llama
from torch import nn

from lift_lightning.delta import Delta, ModelSource, apply, attach, extract, revert
from lift_lightning.delta.bits import bits
from lift_lightning.delta.live import _APPLIED
from lift_lightning.delta.sources import DictSource
from lift_lightning.errors import DeltaError

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model: nn.Module, seed: int = 1, positions: tuple[int, ...] = (0, 5, 77, 1023)) -> nn.Module:
    """A copy with a few entries of some matrices changed, and a whole norm."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "proj" in name:
                parameter.copy_(changed(parameter, [p for p in positions if p < parameter.numel()], seed))
        other.model.norm.weight.mul_(-1.5)
    return other


def delta_between(model: nn.Module, other: nn.Module, label: str = "the delta", **options) -> Delta:
    names = [name for name, _ in model.named_parameters()]
    base = DictSource({name: p.clone() for name, p in model.named_parameters()}, "user/base")
    found = extract(base, ModelSource(other, names), **options)
    found.label = label
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_revert_are_equal_to_the_last_bit(dtype: torch.dtype):
    model = tiny_llama().to(dtype)
    other = trained(model)
    before, ids = state(model), torch.arange(3, 40).unsqueeze(0)
    logits = model(ids).logits
    applied = apply(model, delta_between(model, other))
    assert applied.applied
    assert_same_bits(state(model), state(other))
    assert torch.equal(model(ids).logits, other(ids).logits)
    applied.revert()
    assert not applied.applied
    assert_same_bits(state(model), before)
    assert torch.equal(model(ids).logits, logits)


def test_zeros_and_nans_keep_their_bits():
    model = tiny_llama()
    other = copy.deepcopy(model)
    with torch.no_grad():
        flat = model.model.layers[0].self_attn.q_proj.weight.view(-1)
        flat[:3] = torch.tensor([0.0, float("nan"), 1.0])
        target = other.model.layers[0].self_attn.q_proj.weight.view(-1)
        target[:3] = torch.tensor([-0.0, float("nan"), float("nan")])
        bits(target)[1] += 5
    before = state(model)
    delta = delta_between(model, other)
    assert delta.description.tensors[Q_PROJ].changed == 3
    applied = apply(model, delta)
    assert_same_bits(state(model), state(other))
    applied.revert()
    assert_same_bits(state(model), before)


def test_two_deltas_are_switched():
    model = tiny_llama()
    before, one, two = state(model), trained(model, 1), trained(model, 2, (5, 6, 900))
    first = attach(model, delta_between(model, one, "first"))
    second = attach(model, delta_between(model, two, "second"))
    for _ in range(3):
        first.apply()
        assert_same_bits(state(model), state(one))
        with pytest.raises(DeltaError, match="first is on this model already: revert it first"):
            second.apply()
        first.revert()
        second.apply()
        assert_same_bits(state(model), state(two))
        second.revert()
        assert_same_bits(state(model), before)
    with pytest.raises(DeltaError, match="second is not on this model: there is nothing to revert"):
        second.revert()


def test_a_model_with_a_delta_takes_no_other():
    model = tiny_llama()
    delta = delta_between(model, trained(model), "first")
    applied = apply(model, delta)
    with pytest.raises(DeltaError, match="first is on this model: revert it before another one is attached"):
        attach(model, delta)
    with pytest.raises(DeltaError, match="is not that of the base of first"):
        attach(copy.deepcopy(model), delta)  # a copy, which is not known to have it
    applied.revert()
    attach(model, delta)


def test_what_was_trained_since_is_not_reverted():
    model = tiny_llama()
    applied = apply(model, delta_between(model, trained(model)))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.view(-1)[5] += 1
    now = state(model)
    with pytest.raises(DeltaError, match="q_proj.weight has not the values of the delta at all of its entries"):
        applied.revert()
    assert_same_bits(state(model), now)


def test_another_base_is_refused_before_anything_changes():
    delta = delta_between(tiny_llama(), trained(tiny_llama()), revision="abc")
    other = tiny_llama(seed=3)
    before = state(other)
    message = r"its checksum is [0-9a-f]{64}, that of the base [0-9a-f]{64}; load 'user/base' at revision abc"
    with pytest.raises(DeltaError, match=message):
        apply(other, delta)
    # One entry of a tensor that the delta does not change.
    almost = tiny_llama()
    with torch.no_grad():
        almost.model.embed_tokens.weight[7, 7] += 1e-6
    with pytest.raises(DeltaError, match="embed_tokens.weight is not that of the base"):
        apply(almost, delta)
    assert_same_bits(state(other), before)
    apply(almost, delta, check=False).revert()  # at the user's risk


def test_a_model_that_does_not_fit_is_refused():
    model = tiny_llama()
    delta = delta_between(model, trained(model), model_config={"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(
        DeltaError, match=r"bfloat16 in the model and float32 .* load the model with dtype=torch.float32"
    ):
        attach(tiny_llama().bfloat16(), delta)
    with pytest.raises(DeltaError, match="model has lm_head.weight, .* the class that was trained, LlamaForCausalLM"):
        attach(tiny_llama(tie_word_embeddings=False), delta)
    with pytest.raises(DeltaError, match="the model has embed_tokens.weight, "):
        attach(model.model, delta)
    with pytest.raises(DeltaError, match=r"is \(48, 32\) in the model and \(32, 32\) in the delta|is \(259, 48\)"):
        attach(tiny_llama(hidden_size=48), delta)
    with pytest.raises(DeltaError, match=r"the model has no model.layers.1"):
        attach(tiny_llama(num_hidden_layers=1), delta)


def test_a_broken_code_is_refused_before_anything_changes():
    model = tiny_llama()
    delta = delta_between(model, trained(model))
    before = state(model)
    name = "model.layers.1.mlp.down_proj.weight.indices"
    delta.tensors[name] = torch.zeros_like(delta.tensors[name])
    with pytest.raises(DeltaError, match="broken at model.layers.1.mlp.down_proj.weight"):
        apply(model, delta)
    assert_same_bits(state(model), before)


# ---------------------------------------------------------------- tied, added, reshaped


def tied_and_untied(head: torch.Tensor) -> tuple[Delta, nn.Module]:
    """A delta between checkpoints that hold the head as well, and a model that ties it to the embedding."""
    model = tiny_llama()
    base = {name: p.clone() for name, p in model.named_parameters()}
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    other = {**base, "model.embed_tokens.weight": changed(base["model.embed_tokens.weight"], [4])}
    other["lm_head.weight"] = head if head.numel() else other["model.embed_tokens.weight"].clone()
    return extract(DictSource(base, "base"), DictSource(other, "trained")), model


def test_a_tied_tensor_is_changed_once():
    delta, model = tied_and_untied(torch.empty(0))
    before = state(model)
    applied = apply(model, delta)
    assert bits(model.lm_head.weight)[4] != bits(before["lm_head.weight"])[4]
    applied.revert()
    assert_same_bits(state(model), before)


def test_tied_tensors_that_came_apart_are_refused():
    delta, model = tied_and_untied(changed(tiny_llama().lm_head.weight, [9]))
    with pytest.raises(
        DeltaError, match="are one tensor in this model, .* load the model with tie_word_embeddings=False"
    ):
        apply(model, delta)
    untied = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        untied.load_state_dict(state(model))
    apply(untied, delta)
    assert bits(untied.lm_head.weight)[9] != bits(model.lm_head.weight)[9]


def test_a_head_that_only_the_trained_checkpoint_has():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with torch.no_grad():
        other = {name: tensor + 1 for name, tensor in state(model).items()}
    base = {name: tensor for name, tensor in state(model).items() if name.startswith("0")}
    before = state(model)
    delta = extract(DictSource(base, "base"), DictSource(other, "trained"), store_base_values=True)
    applied = apply(model, delta)
    assert_same_bits(state(model), other)
    applied.revert()
    assert_same_bits(state(model), before)  # with the head that it had
    with pytest.raises(DeltaError, match=r"the base of the delta has no 1.weight: load 'base' itself"):
        revert(model, delta)


def test_a_tensor_that_was_reshaped_is_for_folders():
    base, other = {"weight": torch.zeros(4, 3)}, {"weight": torch.zeros(5, 3)}
    delta = extract(DictSource(base, "base"), DictSource(other, "trained"))
    with pytest.raises(DeltaError, match=r"weight is \(4, 3\) in the model and \(5, 3\) in the delta"):
        apply(nn.Linear(3, 4, bias=False), delta)
    with pytest.raises(DeltaError, match=r"another shape in the base, \(4, 3\), .* with delta apply, and load that"):
        apply(nn.Linear(3, 5, bias=False), delta)


# ---------------------------------------------------------------- base values


def test_a_model_that_has_it_for_good_is_reverted_by_stored_values(tmp_path: Path):
    model = tiny_llama()
    other = trained(model)
    delta = delta_between(model, other, store_base_values=True)
    revert(other, Delta.from_pretrained(delta.save_pretrained(tmp_path / "delta")))
    assert_same_bits(state(other), state(model))
    with pytest.raises(DeltaError, match="has not the values of the delta at all of its entries"):
        revert(other, delta)
    with pytest.raises(DeltaError, match="has no values of the base: extract it with store_base_values, or load"):
        revert(trained(model), delta_between(model, trained(model)))
    apply(model, delta)
    with pytest.raises(DeltaError, match=r"is on this model: call revert\(\) of what apply returned"):
        revert(model, delta)


def test_a_model_is_not_kept_alive():
    model = tiny_llama()
    applied = apply(model, delta_between(model, trained(model)))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(_APPLIED) == 0
    with pytest.raises(DeltaError, match="the model that the delta was attached to is gone"):
        applied.revert()
