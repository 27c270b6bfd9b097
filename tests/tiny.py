"""Tiny models and tokenizers made on the spot: the tests need no network and no model hub."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}


def byte_tokenizer(*, bos: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte (256 of them), after the special tokens. `bos`: one is put in front, as LLaMA does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    special = {"eos_token": "</s>"}
    if bos:
        special["bos_token"] = "<s>"
    if pad:
        special["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **special)


def tiny_llama_config(**overrides) -> LlamaConfig:
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**settings, **overrides})


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A LLaMA of about 30 thousand parameters: hidden 32, two layers, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_llama_config(**overrides))


def save_tiny_llama(folder: Path, **overrides) -> Path:
    """A folder that `from_pretrained` loads: weights, config, tokenizer."""
    tiny_llama(**overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_sums(path: Path, rows: int = 24, seed: int = 0) -> Path:
    """A training file in the columns of MATH-10K: sums of two digits, answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for a, b in torch.randint(0, 50, (rows, 2), generator=generator).tolist():
        steps = f"{a} + {b} = {a + b}. " * (1 + (a + b) % 3)
        output = f"{steps}The answer is {a + b}."
        examples.append({"instruction": f"{a}+{b}=? #{len(examples)}", "input": "", "output": output, "answer": a + b})
    path.write_text(json.dumps(examples))
    return path
