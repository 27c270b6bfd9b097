"""One instruction prompt and its token ids, the same for training and for evaluation.

The format is that of Alpaca as LLM-Adapters and LIFT use it. Prompt and target are tokenised apart and their ids
joined: the ids of a prompt are then the same whether a target follows (training) or the model goes on by itself
(generation).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORE_INDEX = -100  # what torch's cross entropy leaves out
PROMPT_VERSION = 1  # raise it when the ids of the same text change: cached tokenisations are keyed by it

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of prompt and target with their loss mask.

    Attributes:
        input_ids: At most `max_length` ids.
        labels: As long as `input_ids`; -100 on the prompt. All -100 when the prompt alone fills `max_length`.
        truncated: The tail of the target, its EOS included, was cut away.
        prompt_length: Tokens of the prompt, BOS included, before any cut.
        full_length: Tokens of prompt, target and EOS, before any cut.
        label_length: Ids with a label.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    prompt_length: int
    full_length: int
    label_length: int


def render_prompt(instruction: str, input: str = "") -> str:
    """The text in front of the answer. It ends with a line break; the answer follows on its own line.

    Args:
        instruction: The task.
        input: Material the task is about; its section is left out when this is empty or blank.
    """
    # No literal BOS here, as the released code has one: it is junk for LLaMA-3 and Qwen, and doubles LLaMA-2's own.
    sections = [PREAMBLE, f"### Instruction:\n{instruction}"]
    if input.strip():
        sections.append(f"### Input:\n{input}")
    return "\n\n".join([*sections, "### Response:\n"])


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS in front of a text by itself (LLaMA does, Qwen and SmolLM2 do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt as training and generation see it: BOS once if the tokenizer adds one by itself, never an EOS."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    # A prompt whose text opens with the BOS token has it already.
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id, *ids]
    return list(ids)


def encode_example(tokenizer: Any, prompt: str, target: str, max_length: int) -> EncodedExample:
    """Ids and labels of one training example; the loss is on the target and its EOS only.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: Text before the answer, as `render_prompt` makes it.
        target: The answer.
        max_length: Most ids to keep. The tail of a longer target is cut, and no EOS put after the cut: the model
            would learn to stop in the middle.

    Raises:
        ValueError: The tokenizer has no EOS token, or `max_length` is below 1.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no example can be ended: set tokenizer.eos_token")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    head = encode_prompt(tokenizer, prompt)
    # The EOS is a label like any other token; nothing is masked by comparing ids with pad, which may be the EOS itself.
    tail = [*tokenizer(target, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
    return _cut([(head, False), (tail, True)], max_length)


def encode_turns(tokenizer: Any, turns: Sequence[tuple[str, bool]], max_length: int) -> EncodedExample:
    """Ids and labels of a conversation that was rendered with all its marks, beginnings and ends; nothing is added.

    Args:
        tokenizer: A transformers tokenizer.
        turns: Texts one after the other, each with whether the loss is on it.
        max_length: Most ids to keep.

    Raises:
        ValueError: If `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    parts = [(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, trained) for text, trained in turns]
    return _cut(parts, max_length)


def _cut(parts: Sequence[tuple[list[int], bool]], max_length: int) -> EncodedExample:
    """The ids of all parts, as many as there may be, with labels on those that are trained."""
    ids = [i for part, _ in parts for i in part]
    labels = [i if trained else IGNORE_INDEX for part, trained in parts for i in part]
    before = next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    kept = labels[:max_length]
    with_loss = sum(label != IGNORE_INDEX for label in kept)
    return EncodedExample(ids[:max_length], kept, len(ids) > max_length, before, len(ids), with_loss)


def choose_pad_id(tokenizer: Any, pad_token: str | None = None) -> int:
    """Id to pad with: of the token asked for, else the tokenizer's own, else its EOS. The tokenizer is left as it is.

    Raises:
        ValueError: The token asked for is not in the vocabulary, or there is none.
    """
    if pad_token is not None:
        token_id = tokenizer.get_vocab().get(pad_token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {pad_token!r}: set --data.pad_token to one of its vocabulary")
        return token_id
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has neither a pad token nor an EOS: set --data.pad_token to a token of its vocabulary"
        )
    return tokenizer.eos_token_id


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a tokenizer does, not of its name: two folders with the same files agree, an edited one does not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Left over from the last call with padding or truncation; no part of the tokenizer.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer("Aa 1.\n").input_ids]
    content = [content, tokenizer.eos_token_id, adds_bos(tokenizer), tokenizer.bos_token_id]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
