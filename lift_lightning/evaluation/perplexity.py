"""How well a model expects a text, per token and per word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.prompts import encode_prompt


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood; of two tokenizers only the one per word can be compared.

    Attributes:
        token: per token that was predicted.
        word: per word of the text, words being what lies between white space.
        tokens: that were predicted: all but the first, which has nothing before it, or all after a BOS.
        words: in the text.
    """

    token: float
    word: float
    tokens: int
    words: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> Perplexity:
    """Over windows that overlap, so that each token but those of the first window has `window - stride` before it.

    Args:
        model: a causal language model; it is put into evaluation mode for the call.
        tokenizer: its own.
        text: as a whole; documents are not told apart.
        window: tokens that the model sees at a time.
        stride: tokens that are new in each window.
        max_tokens: of the text; the rest is left out, of the words too.
        progress: wraps the windows, such as `rich.progress.track`.

    Raises:
        ValueError: if the window or the stride does not fit, or the text has fewer than two tokens.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must be at least 1 and below the window, got {stride} and {window}")
    ids = torch.tensor(encode_prompt(tokenizer, text))
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if len(ids) < 2:
        raise ValueError("the text has fewer than two tokens, so there is nothing to predict")
    training = model.training
    model.eval()
    try:
        total, done = 0.0, 1
        for begin in progress(range(0, max(1, len(ids) - window + stride), stride)):
            end = min(begin + window, len(ids))
            total += _surprise(model, ids[begin:end], end - done)
            done = end
    finally:
        model.train(training)
    tokens, words = len(ids) - 1, len(text.split())
    return Perplexity(math.exp(total / tokens), math.exp(total / max(words, 1)), tokens, words)


def _surprise(model: PreTrainedModel, ids: Tensor, last: int) -> float:
    """Summed negative log-likelihood of the last tokens of a window, given those before each."""
    ids = ids.to(model.device).unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0, -last - 1 : -1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, -last:], reduction="none")
    return float(losses.double().sum())
