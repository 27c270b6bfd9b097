"""s1K: questions with long trains of thought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lift_lightning.datamodules.base import SFTDataModule
from lift_lightning.datamodules.rows import Columns, DataError, Row, Rows, converted, get_text
from lift_lightning.datamodules.tokenise import encode_cached
from lift_lightning.prompts import encode_turns

if TYPE_CHECKING:
    import datasets

# Of s1's data (arXiv 2501.19393): Qwen2.5's marks, and its system prompt.
_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_START, _END, _PAD = "<|im_start|>", "<|im_end|>", "<|fim_pad|>"


class S1KDataModule(SFTDataModule):
    """s1K and s1K-1.1: a thousand questions with a long train of thought, as turns of Qwen2.5.

    The answer is thinking and answer, each behind its mark, as s1 (arXiv 2501.19393) trains them.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id, such as
            `simplescaling/s1K-1.1`.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        thinker: Whose thoughts of s1K-1.1, `deepseek` or `gemini`; s1K has one.
        drop_gpqa: Leave out the rows that come from GPQA, which can be close to GPQA-Diamond.
        max_length: Most tokens per training example (s1: 32,768).
        val_size: Rows held out for validation (s1: none).
        **kwargs: As for `SFTDataModule`.
    """

    columns = Columns(text=("instruction", "thinking", "output"), optional=(), answer=None)
    notices = (
        "written by Gemini (s1K) or DeepSeek (s1K-1.1), whose provider's terms apply; rows from GPQA can be close to "
        "GPQA-Diamond: leave them out with --data.drop_gpqa true before a test on it",
    )

    def __init__(
        self,
        path: str = "simplescaling/s1K",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        thinker: Literal["deepseek", "gemini"] = "deepseek",
        drop_gpqa: bool = False,
        max_length: int = 32768,
        val_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, max_length=max_length, val_size=val_size, **kwargs)
        self.thinker = thinker
        self.drop_gpqa = drop_gpqa

    def read(self, path: str, split: Literal["train", "test"]) -> Rows:
        """Question, thinking and attempt of each row."""
        rows = super().read(path, split)
        if split == "test":
            return rows
        if self.drop_gpqa:
            kept = [i for i, row in enumerate(rows.rows) if "gpqa" not in str(row.get("source_type", "")).lower()]
            rank_zero_info(f"{path}: {len(rows) - len(kept)} rows from GPQA left out")
            rows = rows.subset(kept)
        return converted(rows, self._from_s1k)

    def encode(self, rows: list[Row]) -> datasets.Dataset:
        """Ids and labels; the end of the turn is in the text."""
        examples = [(list(zip(self.to_example(row), (False, True), strict=True)),) for row in rows]
        return encode_cached(examples, encode_turns, self._ready_tokenizer(), self.max_length, self.cache_dir)

    def to_example(self, row: Row) -> tuple[str, str]:
        """The user's turn and the assistant's, which begins with its thoughts."""
        asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
        head = f"{_START}system\n{_SYSTEM}{_END}\n{_START}user\n{asked}{_END}\n{_START}assistant\n"
        if "thinking" not in row:
            return head, ""
        attempt = row["output"].strip()
        answer = attempt if "Answer:" in attempt else f"Answer: {attempt}"
        return head, f"{_START}think\n{row['thinking'].strip()}\n{_START}answer\n{answer}{_END}\n"

    def _from_s1k(self, row: Row, where: str) -> Row:
        first = "" if "thinking_trajectories" in row else f"{self.thinker}_"
        thinking = row.get("thinking_trajectories") or get_text(row, f"{first}thinking_trajectory", where)
        return {
            "instruction": get_text(row, "question", where),
            "thinking": thinking if isinstance(thinking, str) else "\n".join(thinking),
            "output": get_text(row, f"{first}attempt", where),
        }

    def _choose_pad_token(self, tokenizer: PreTrainedTokenizerBase) -> int:
        vocabulary = tokenizer.get_vocab()
        missing = [mark for mark in (_START, _END) if mark not in vocabulary]
        if missing:
            raise DataError(
                f"the tokenizer has no token {' and no '.join(missing)}, which mark the turns of s1K: use a model of "
                "the Qwen2.5 family"
            )
        if self.pad_token is None and _PAD in vocabulary:
            return int(vocabulary[_PAD])
        return super()._choose_pad_token(tokenizer)
