"""Generate completions of a batch of prompts.

Letters: B prompts in a batch; P tokens of the longest prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are decoded. The defaults are those of the paper's evaluation.

    Args:
        num_beams: width of the beam search; 1 is greedy.
        max_new_tokens: where a completion ends that has not ended by itself.
        do_sample: draw from the model's distribution, with torch's global generator.
        temperature: of drawing, above 0: below 1 likely tokens are drawn more often than the model says.

    Raises:
        ValueError: if a number is out of its range.
    """

    num_beams: int = 4
    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for field in ("num_beams", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationSettings | None = None,
    *,
    in_step: bool = False,
) -> list[str]:
    """Complete each prompt of a left-padded batch.

    Only `settings` decide how: sampling values and penalties stored with the checkpoint have no effect. A completion
    ends at the tokenizer's EOS or at any of those that the checkpoint names. The model comes back as it was: training
    flags and generation config; its `config.use_cache` is neither read nor changed.

    Args:
        model: a causal language model; generation runs in evaluation mode with the cache on.
        tokenizer: the model's own.
        input_ids: (B, P) int64, padded on the left.
        attention_mask: (B, P), 1 where there is a token.
        settings: None means the paper's.
        in_step: other ranks share the weights, as under FSDP2, and generate at the same time: go on until all are done.

    Returns:
        B texts, without the prompt, without special tokens.

    Raises:
        ValueError: if a row is padded on the right or empty, there is neither a padding nor an end token, or the
            prompts leave none of the model's positions.
    """
    if attention_mask.shape != input_ids.shape or not bool((attention_mask[:, -1] == 1).all()):
        raise ValueError(
            "prompts must be padded on the left and must not be empty: the last column of attention_mask is all 1"
        )
    config = _generation_config(model, tokenizer, settings or GenerationSettings(), input_ids.shape[1])
    with _ready_to_generate(model, config):
        # Causal models inherit `generate` from a mixin that their base class does not declare.
        output = cast(Any, model).generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, synced_gpus=in_step
        )
    ends = set(config.eos_token_id)
    completions = (_until_end(row, ends) for row in output[:, input_ids.shape[1] :].tolist())
    return [
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for ids in completions
    ]


def generate_within_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationSettings | None = None,
    *,
    in_step: bool = False,
) -> list[str]:
    """`generate`, which halves a batch that runs out of memory and goes on; arguments and result as there.

    Raises:
        torch.OutOfMemoryError: of a single prompt, or where other ranks generate in step.
    """
    try:
        return generate(model, tokenizer, input_ids, attention_mask, settings, in_step=in_step)
    except torch.OutOfMemoryError:
        rows = input_ids.shape[0]
        if rows == 1 or in_step:
            raise
    # Not in the handler: the exception would keep the tensors of the failed attempt alive.
    half = -(-rows // 2)
    _log.warning("out of memory with %d prompts of %d tokens: going on with %d", rows, input_ids.shape[1], half)
    if input_ids.is_cuda:
        torch.cuda.empty_cache()
    texts = []
    for part in (slice(half), slice(half, None)):
        texts += generate_within_memory(model, tokenizer, input_ids[part], attention_mask[part], settings)
    return texts


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings, prompt_length: int
) -> GenerationConfig:
    stored = model.generation_config.eos_token_id if model.generation_config is not None else None
    stored = stored if isinstance(stored, list) else [stored]
    # Training ends a target with the tokenizer's EOS; chat models name further ends of turn in their checkpoint.
    ends = sorted({end for end in [tokenizer.eos_token_id, *stored] if end is not None})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not ends or pad is None:
        raise ValueError(
            "cannot generate: the tokenizer has no eos_token that ends a completion; set tokenizer.eos_token"
        )
    return GenerationConfig(
        num_beams=settings.num_beams,
        max_new_tokens=_within_positions(model, settings.max_new_tokens, prompt_length),
        do_sample=settings.do_sample,
        # 50 by default in transformers, which would make sampling something else than the model's distribution.
        top_k=0 if settings.do_sample else None,
        temperature=settings.temperature if settings.do_sample else None,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
    )


def _within_positions(model: PreTrainedModel, max_new_tokens: int, prompt_length: int) -> int:
    """How many tokens may follow: beyond the positions that it was trained with, a model writes noise, or fails."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if prompt_length >= positions:
        raise ValueError(f"a prompt of {prompt_length} tokens leaves none of the model's {positions} positions")
    if prompt_length + max_new_tokens > positions:
        _tell_once(
            f"completions may not take {max_new_tokens} tokens: prompt and completion together have the model's "
            f"{positions} positions"
        )
    return min(max_new_tokens, positions - prompt_length)


@cache
def _tell_once(message: str) -> None:
    _log.warning(message)


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Cut at the first end token by id: the padding behind it need not be a special token for the tokenizer."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


@contextmanager
def _ready_to_generate(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, which also turns gradient checkpointing off, and `config` in place of the stored one.

    transformers fills every value left open in the config of a call from the model's stored config, so a checkpoint's
    repetition penalty would leak into a greedy search.
    """
    training: list[nn.Module] = [module for module in model.modules() if module.training]
    stored = model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = stored
        for module in training:
            module.training = True
