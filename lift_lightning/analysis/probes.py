"""Small questions to a model: the probability of an answer, and which of several options it expects most."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.errors import ConfigError
from lift_lightning.prompts import encode_prompt

_OPTION = re.compile(r"\b(?:answer|solution|option|ending)\d+: ", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """A question with options, one of them right.

    Attributes:
        question: as it is asked.
        options: at least two.
        answer: place of the right one, from 0.
    """

    question: str
    options: tuple[str, ...]
    answer: int


def read_choice(row: Mapping[str, object], where: str) -> Choice:
    """A row of LLM-Adapters' commonsense files: `instruction` with "Answer1: ... Answer2: ...", `answer` "answer2".

    Raises:
        ConfigError: if it is none.
    """
    instruction, answer = str(row.get("instruction", "")), str(row.get("answer", ""))
    question, *options = _OPTION.split(instruction.partition("\n\nAnswer format")[0])
    number = re.fullmatch(r"[a-z]+(\d+)", answer)
    if len(options) < 2 or number is None or not 1 <= int(number[1]) <= len(options):
        raise ConfigError(
            f"{where} is no question with options: an instruction with 'Answer1: ... Answer2: ...' and an answer such "
            f"as 'answer2' are wanted, got {instruction[:60]!r} and {answer!r}"
        )
    asked = question.partition("question: ")[2] or question
    return Choice(asked.strip(), tuple(option.strip() for option in options), int(number[1]) - 1)


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    batch_size: int = 32,
) -> list[float]:
    """Summed log-probability of each continuation after its prompt.

    Args:
        model: in evaluation mode.
        tokenizer: its own. Both parts are encoded together, and what of the whole is not in the prompt's own encoding
            is the continuation.
        texts: (prompt, continuation) pairs.
        batch_size: sequences at a time.

    Raises:
        ConfigError: if a continuation adds no token.
    """
    encoded = []
    for prompt, continuation in texts:
        whole = encode_prompt(tokenizer, prompt + continuation)
        own = encode_prompt(tokenizer, prompt)
        shared = next(
            (i for i, (a, b) in enumerate(zip(own, whole, strict=False)) if a != b), min(len(own), len(whole))
        )
        shared = max(1, shared)  # the first token has nothing before it
        if shared >= len(whole):
            raise ConfigError(f"{continuation!r} adds no token to {prompt[-40:]!r}: there is nothing to expect")
        encoded.append((whole, shared))
    found = [0.0] * len(texts)
    # Prompts of one length together: of each batch only what follows the shortest is scored.
    order = sorted(range(len(texts)), key=lambda i: (encoded[i][1], len(encoded[i][0])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(encoded[i][0]) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
            mask[row, : len(encoded[i][0])] = 1
        first = encoded[batch[0]][1]
        scores = _token_scores(model, ids, mask, longest - first)
        for row, i in enumerate(batch):
            whole, shared = encoded[i]
            found[i] = float(scores[row, shared - first : len(whole) - first].sum())
    return found


def _token_scores(model: PreTrainedModel, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """(B, last) float64 log-probability of each of the last tokens, given those before it."""
    ids, mask = ids.to(model.device), mask.to(model.device)
    # Most models can leave out the logits that nobody asks for.
    can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": last + 1} if can_leave_out else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits[:, -last - 1 : -1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -last:].flatten(), reduction="none")
    return -losses.double().view(len(ids), -1).cpu()


def probability(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> float:
    """P(answer | prompt), of all its tokens together."""
    return float(torch.tensor(log_likelihoods(model, tokenizer, [(prompt, answer)])[0]).exp())


def choice_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, choices: Sequence[Choice]) -> float:
    """Share of the questions whose right option is the likeliest, by log-probability per character.

    The prompt is "Question: ...\\nAnswer:", the continuation a space and the option's text.
    """
    texts = [(f"Question: {one.question}\nAnswer:", f" {option}") for one in choices for option in one.options]
    scores = iter(log_likelihoods(model, tokenizer, texts))
    right = 0
    for one in choices:
        each = [next(scores) / max(1, len(option)) for option in one.options]
        right += each.index(max(each)) == one.answer
    return right / len(choices)
