"""Tokenise training examples once, and keep the result on disk."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lift_lightning.prompts import PROMPT_VERSION, encode_example, tokenizer_hash

if TYPE_CHECKING:
    import datasets


def encode_cached(
    examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: str | None = None
) -> datasets.Dataset:
    """Tokenise prompts and targets, or read the result of an earlier run from the cache.

    The name of the cache file is a hash of all that the ids depend on: the texts, the tokenizer's content,
    `max_length`, and the version of the encoding. Nothing else has to be invalidated.
    """
    import datasets  # slow to import, and not every command needs it

    content = json.dumps([PROMPT_VERSION, max_length, tokenizer_hash(tokenizer), examples])
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = Path(cache_dir).expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "lift_lightning"
    folder.mkdir(parents=True, exist_ok=True)
    number = datasets.Value("int32")
    schema = {"input_ids": datasets.List(number), "labels": datasets.List(number), "truncated": datasets.Value("bool")}
    schema |= {"prompt_length": number, "full_length": number}
    return datasets.Dataset.from_dict({"prompt": [p for p, _ in examples], "target": [t for _, t in examples]}).map(
        partial(_encode_row, tokenizer=tokenizer, max_length=max_length),
        remove_columns=["prompt", "target"],
        features=datasets.Features(schema),
        cache_file_name=str(folder / f"tokenised-{key}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=key,
        desc="Tokenising",
    )


def _encode_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    return vars(encode_example(tokenizer, row["prompt"], row["target"], max_length))
