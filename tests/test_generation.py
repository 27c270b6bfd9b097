"""Completions of left-padded batches against a loop without cache and without padding."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from lift_lightning.collate import pad_prompts
from lift_lightning.evaluation.generation import GenerationSettings, generate
from lift_lightning.models import load_model, load_tokenizer
from lift_lightning.prompts import choose_pad_id, encode_prompt, render_prompt

PROMPTS = ["Two and two", "One crayon and seven more crayons", "x"]
GREEDY = GenerationSettings(num_beams=1, max_new_tokens=8)


def varied_model() -> LlamaForCausalLM:
    """Random weights large enough that greedy texts do not repeat one token: 143 64 29 ... and 254 42 129 ..."""
    return tiny_llama(seed=1, tie_word_embeddings=False, initializer_range=0.5)


def left_padded(texts: list[str], pad: int = 0) -> tuple[Tensor, Tensor]:
    rows = [byte_tokenizer()(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def greedy(model: LlamaForCausalLM, text: str, steps: int) -> list[int]:
    """The oracle: one prompt, no padding, no cache."""
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    start = ids.shape[1]
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


def test_greedy_equals_a_loop_without_cache_and_padding() -> None:
    model, tokenizer = varied_model(), byte_tokenizer()
    expected = [tokenizer.decode(greedy(model, text, 8), skip_special_tokens=True) for text in PROMPTS]
    assert generate(model, tokenizer, *left_padded(PROMPTS), GREEDY) == expected
    assert len(set(expected)) == 3


def test_a_completion_ends_at_each_end_token_and_alone() -> None:
    """The first row stops early; the second has no end token and goes on to the limit."""
    model, tokenizer = varied_model(), byte_tokenizer()
    first, second = (greedy(model, text, 8) for text in PROMPTS[:2])
    end = next(i for i in range(1, 8) if first[i] not in first[:i] and first[i] not in second)
    model.generation_config.eos_token_id = [2, first[end]]
    texts = generate(model, tokenizer, *left_padded(PROMPTS[:2]), GREEDY)
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in (first[:end], second)]


def test_the_end_token_of_the_tokenizer_counts_without_one_in_the_checkpoint() -> None:
    model, tokenizer = varied_model(), byte_tokenizer(pad=False)  # padded with EOS, then
    first = greedy(model, PROMPTS[0], 8)
    end = next(i for i in range(1, 8) if first[i] not in first[:i])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[end])
    model.generation_config.eos_token_id = None
    assert generate(model, tokenizer, *left_padded(PROMPTS[:1]), GREEDY) == [tokenizer.decode(first[:end])]


def test_beams_find_a_likelier_text_than_greedy() -> None:
    model, tokenizer = varied_model(), byte_tokenizer()
    ids, mask = left_padded(PROMPTS[:1])
    found: list[Tensor] = []
    inner = model.generate
    model.generate = lambda **kwargs: found.append(inner(**kwargs)) or found[-1]  # type: ignore[method-assign]
    for beams in (1, 4):
        generate(model, tokenizer, ids, mask, GenerationSettings(num_beams=beams, max_new_tokens=8))

    @torch.no_grad()
    def log_likelihood(row: Tensor) -> float:
        logits = model(input_ids=row).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
        return float(logits.gather(2, row[:, ids.shape[1] :, None]).sum())

    one, four = found
    assert log_likelihood(four) > log_likelihood(one)


def test_the_checkpoints_own_decoding_has_no_effect() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    expected = generate(model, tokenizer, *left_padded(PROMPTS), GREEDY)
    for key, value in {"do_sample": True, "temperature": 9.0, "repetition_penalty": 50.0, "max_length": 3}.items():
        setattr(model.generation_config, key, value)
    assert generate(model, tokenizer, *left_padded(PROMPTS), GREEDY) == expected


def test_sampling_draws_from_the_whole_distribution() -> None:
    """transformers keeps the 50 likeliest tokens unless told otherwise; 259 near-uniform ones give more than that."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ids, mask = left_padded(PROMPTS[:1] * 256)
    settings = GenerationSettings(num_beams=1, max_new_tokens=1, do_sample=True)
    torch.manual_seed(0)
    drawn: list[Tensor] = []
    inner = model.generate
    model.generate = lambda **kwargs: drawn.append(inner(**kwargs)) or drawn[-1]  # type: ignore[method-assign]
    texts = generate(model, tokenizer, ids, mask, settings)
    assert len(drawn[0][:, -1].unique()) > 100
    torch.manual_seed(0)
    assert generate(model, tokenizer, ids, mask, settings) == texts


def test_completions_end_where_the_positions_do(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.generation_config.eos_token_id = None
    ids, mask = left_padded(PROMPTS)
    model.config.max_position_embeddings = ids.shape[1] + 3
    lengths: list[int] = []
    inner = model.generate
    model.generate = lambda **kwargs: lengths.append(kwargs["generation_config"].max_new_tokens) or inner(**kwargs)
    for _ in range(2):
        generate(model, tokenizer, ids, mask, GenerationSettings(num_beams=1, max_new_tokens=9))
    assert lengths == [3, 3]
    told = [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]
    positions = ids.shape[1] + 3
    assert told == [
        f"completions may not take 9 tokens: prompt and completion together have the model's {positions} positions"
    ]
    model.config.max_position_embeddings = ids.shape[1]
    with pytest.raises(ValueError, match=f"a prompt of {ids.shape[1]} tokens leaves none of the model's"):
        generate(model, tokenizer, ids, mask, GREEDY)


def test_defaults_are_the_papers() -> None:
    assert GenerationSettings() == GenerationSettings(num_beams=4, max_new_tokens=256, do_sample=False)


@pytest.mark.parametrize("field", ["num_beams", "max_new_tokens"])
def test_settings_below_one_raise(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        GenerationSettings(**{field: 0})


def test_the_model_comes_back_as_it_was() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    expected = generate(model, tokenizer, *left_padded(PROMPTS), GREEDY)
    model.train()
    model.model.layers[1].eval()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    model.config.use_cache = False
    stored, training = model.generation_config, [module.training for module in model.modules()]
    caches: list[object] = []
    hook = model.register_forward_hook(lambda _, args, output: caches.append(output.past_key_values))
    assert generate(model, tokenizer, *left_padded(PROMPTS), GREEDY) == expected
    hook.remove()
    assert all(cache is not None for cache in caches)  # on, although config.use_cache is off
    assert [module.training for module in model.modules()] == training
    assert model.generation_config is stored
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert model.config.use_cache is False


def test_an_exception_while_generating_is_an_error_and_leaves_the_model_as_it_was() -> None:
    model = tiny_llama().train()
    stored = model.generation_config

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        generate(model, byte_tokenizer(), *left_padded(PROMPTS), GREEDY)
    assert model.training
    assert model.generation_config is stored


def test_padding_on_the_right_raises() -> None:
    ids, mask = left_padded(PROMPTS)
    with pytest.raises(ValueError, match="prompts must be padded on the left"):
        generate(tiny_llama(), byte_tokenizer(), ids.flip(1), mask.flip(1), GREEDY)


def test_no_end_token_raises() -> None:
    tokenizer = byte_tokenizer(pad=False)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        generate(tiny_llama(), tokenizer, *left_padded(PROMPTS), GREEDY)


@pytest.mark.realdata
@pytest.mark.slow
def test_a_real_model_gives_the_same_texts_in_a_padded_batch_and_alone() -> None:
    data, folder = os.environ.get("LIFT_DATA_DIR"), os.environ.get("LIFT_SMOLLM2_DIR")
    if not data or not folder:
        pytest.skip("needs LIFT_DATA_DIR and LIFT_SMOLLM2_DIR")
    rows = json.loads((Path(data) / "llm_adapters" / "AddSub" / "test.json").read_text())[:3]
    model, tokenizer = load_model(folder).model, load_tokenizer(folder)
    prompts = [encode_prompt(tokenizer, render_prompt(row["instruction"])) for row in rows]
    assert len({len(prompt) for prompt in prompts}) > 1

    def complete(some: list[list[int]]) -> list[str]:
        batch = pad_prompts(some, choose_pad_id(tokenizer))
        settings = GenerationSettings(num_beams=1, max_new_tokens=12)
        return generate(model, tokenizer, batch["input_ids"], batch["attention_mask"], settings)

    texts = complete(prompts)
    assert texts == [complete([prompt])[0] for prompt in prompts]
    assert all(text and "### Instruction" not in text for text in texts)
