"""Tokenise training examples once, and keep the result on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from transformers import PreTrainedTokenizerBase

from lift_lightning.prompts import PROMPT_VERSION, EncodedExample, tokenizer_hash

if TYPE_CHECKING:
    import datasets


def encode_cached(
    examples: Sequence[Sequence[Any]],
    encode: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache_dir: str | None = None,
    kind: type = EncodedExample,
) -> datasets.Dataset:
    """Tokenise examples, or read the result of an earlier run from the cache.

    The name of the cache file is a hash of all that the ids depend on: the texts, the tokenizer's content,
    `max_length`, the encoding and its version. Nothing else has to be invalidated.

    Args:
        examples: For each the arguments of `encode` between the tokenizer and `max_length`; as JSON has them.
        encode: `encode_example`, `encode_turns`, or another function whose result depends on its arguments alone.
        tokenizer: Of the model.
        max_length: Most ids of an example.
        cache_dir: Default: a folder in the cache of Hugging Face datasets.
        kind: The dataclass that `encode` returns; its fields are the columns.
    """
    import datasets  # slow to import, and not every command needs it

    number = datasets.Value("int32")
    columns = {list[int]: datasets.List(number), int: number, bool: datasets.Value("bool")}
    columns[float] = datasets.Value("float64")
    schema = {name: columns[hint] for name, hint in get_type_hints(kind).items()}
    texts = [json.dumps(example) for example in examples]
    what = [PROMPT_VERSION, encode.__name__, list(schema), max_length, tokenizer_hash(tokenizer), texts]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    folder = Path(cache_dir).expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "lift_lightning"
    folder.mkdir(parents=True, exist_ok=True)
    return datasets.Dataset.from_dict({"example": texts}).map(
        partial(_encode_row, encode=encode, tokenizer=tokenizer, max_length=max_length),
        remove_columns=["example"],
        features=datasets.Features(schema),
        cache_file_name=str(folder / f"tokenised-{key}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=key,
        desc="Tokenising",
    )


def _encode_row(
    row: dict[str, Any], encode: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    return vars(encode(tokenizer, *json.loads(row["example"]), max_length))
