"""The language model that the benchmarks work on, text for it, and some real training.

The model is SmolLM2-135M in float32, from the folder that LIFT_SMOLLM2_DIR names; with `--quick` a random LLaMA that
is made here. The text is the documentation of this repository.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from environment import ROOT
from harness import SEED, progress
from methods import Method, Step, lift
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lift_lightning import build_param_groups
from lift_lightning.refresh import Bases

VARIABLE = "LIFT_SMOLLM2_DIR"


def folder() -> str:
    """Where SmolLM2 lies.

    Raises:
        SystemExit: if the variable is not set.
    """
    if not os.environ.get(VARIABLE):
        raise SystemExit(
            f"This benchmark needs SmolLM2-135M: set {VARIABLE} to a folder with the model, or try it with --quick."
        )
    return os.environ[VARIABLE]


def load_model(quick: bool) -> PreTrainedModel:
    """A new copy in float32, in training mode."""
    if quick:
        return _small_llama().train()
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32, local_files_only=True).train()


def load_tokens(quick: bool) -> Tensor:
    """The documentation as one vector of token ids."""
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    if quick:
        return torch.tensor(list(text.encode()))
    tokenizer = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    # In pieces: the tokenizer warns of texts beyond the model's context.
    pieces = tokenizer(text.split("\n\n"), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for piece in pieces for token in piece])


def batches(tokens: Tensor, rows: int, length: int) -> Iterator[Tensor]:
    """(rows, length) token ids, one stretch of the text after the other, from the beginning again at its end."""
    start = 0
    while True:
        positions = torch.arange(start, start + rows * length) % tokens.numel()
        yield tokens[positions].view(rows, length)
        start += rows * length


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that LIFT trains by default, by name: all linear layers but the head."""
    return dict(named for group in build_param_groups(model) for named in group["params"])


class Trained(NamedTuple):
    """A model after some training with LIFT, and the bases of the refresh that it began with."""

    method: Method
    bases: Bases


def train_a_while(model: PreTrainedModel, tokens: Tensor, *, steps: int, tokens_per_step: int, rank: int) -> Trained:
    """Train with LIFT at r = R = `rank`, so that the weights move as they do between two refreshes."""
    torch.manual_seed(SEED)
    method, first = lift(model, rank)
    step = Step(method)
    source = batches(tokens, 1, tokens_per_step)
    for _ in progress(range(steps), "training"):
        step(next(source))
    return Trained(method, first.bases)


def _small_llama() -> PreTrainedModel:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    # The spectrum of a random matrix has no leading directions to find; a trained one's decays.
    with torch.no_grad():
        for weight in matrices(model).values():
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            decay = torch.arange(1, values.numel() + 1) ** -1.0
            weight.copy_(left * (values[0] * decay) @ right)
    return model.requires_grad_(True)
