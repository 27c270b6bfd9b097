"""MATH-10K of LLM-Adapters: arithmetic questions with worked answers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lift_lightning.datamodules.base import SFTDataModule
from lift_lightning.datamodules.rows import DataError, Rows, question_key
from lift_lightning.evaluation.tasks import LLM_ADAPTERS

# sha256 (16 hex digits) of `question_key` of 16 GSM8K and 8 AQuA *test* questions in LLM-Adapters' math_data.json.
# MATH-10K itself has none: it is made of training sets (it meets AddSub, MultiArith and SingleEq in MAWPS's).
LEAKED_QUESTIONS = {
    "bd20f782d6c525f9",
    "a526988c17ee7c12",
    "c29b4127d22676ff",
    "aa40d8aa87dc6697",
    "a9b51666839bc77c",
    "fda0275cfc7713fe",
    "6cc196f39a1f7bf2",
    "8bf11753ed312644",
    "9796f4bf28117ab5",
    "39f2790d0f285c4f",
    "76b81757e43ac5fe",
    "5eedcd7eccf9a089",
    "9351b8890e3e3e5e",
    "9e5a328d20cfc429",
    "9f76a7fb5f83df87",
    "2014bc69977e9620",
    "3d40184b0ecba0f4",
    "b31896254bd0b577",
    "5555f6ed53f97872",
    "ddfdeec325deb44f",
    "ba7c7085b974eef5",
    "1ff1be2005821261",
    "7547a6724801fa62",
    "5440947a28742c3e",
}
LEAKED_ENOUGH = 3  # of the 24: a chance duplicate is no leak, a third of the leaked file is


class Math10KDataModule(SFTDataModule):
    """MATH-10K: columns instruction, input, output, answer; the target is `output`.

    The rows are made from the training sets of GSM8K, MAWPS and AQuA; the answers were written by ChatGPT, whose
    provider's terms apply. LLM-Adapters' other file, math_data.json, is about 80% of six test sets and is refused,
    under any name.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        allow_leaked: Train on rows that hold test questions all the same.
        **kwargs: As for `SFTDataModule`.
    """

    notices = (
        "made from the training sets of GSM8K, MAWPS and AQuA, its answers written by ChatGPT, whose provider's terms "
        "apply; AddSub, MultiArith and SingleEq overlap with MAWPS's training set: report the mean of gsm8k, AQuA and "
        "SVAMP beside the mean of all seven tests",
    )

    def __init__(
        self,
        path: str = f"{LLM_ADAPTERS}/ft-training_set/math_10k.json",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        allow_leaked: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, **kwargs)
        self.allow_leaked = allow_leaked

    def check_source(self, rows: Rows) -> None:
        """Refuse test questions as training rows.

        Raises:
            DataError: The file is math_data.json, by name or by content, and `allow_leaked` is off.
        """
        if self.allow_leaked:
            return
        if Path(rows.source).name == "math_data.json":
            reason = "has the name of LLM-Adapters' math_data.json, about 80% of the test sets of six arithmetic tasks"
        elif (found := count_leaked(rows)) >= LEAKED_ENOUGH:
            reason = f"holds {found} of {len(LEAKED_QUESTIONS)} known test questions of GSM8K and AQuA"
        else:
            return
        raise DataError(
            f"{rows.source} {reason}: a model trained on it is tested on its own training data. Use math_10k.json "
            "(hub: lmms-lab/Math10K); to train on this file all the same, set --data.allow_leaked true"
        )


def count_leaked(rows: Rows) -> int:
    """How many of the known test questions are among the rows."""
    keys = (question_key(text) for row in rows.rows if isinstance(text := row.get("instruction"), str))
    return len(LEAKED_QUESTIONS & {hashlib.sha256(key.encode()).hexdigest()[:16] for key in keys})
