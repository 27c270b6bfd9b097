"""Instructions with answers, under whatever names the columns have; and the published sets of that kind."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lift_lightning.datamodules.base import SFTDataModule
from lift_lightning.datamodules.layouts import from_gsm8k, from_strategyqa
from lift_lightning.datamodules.rows import DataError, Row, Rows, converted
from lift_lightning.evaluation.tasks import LLM_ADAPTERS


class InstructionDataModule(SFTDataModule):
    """Rows of one's own: an instruction, the answer to it, and perhaps material that the instruction is about.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        instruction_column: What is asked.
        input_column: Material, which may be empty or absent.
        output_column: What the model learns to answer.
        answer_column: Of test rows, the short answer that the model's text is scored against.
        **kwargs: As for `SFTDataModule`.
    """

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        instruction_column: str = "instruction",
        input_column: str = "input",
        output_column: str = "output",
        answer_column: str = "answer",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, **kwargs)
        self.names = {
            "instruction": instruction_column,
            "input": input_column,
            "output": output_column,
            "answer": answer_column,
        }

    def read(self, path: str, split: Literal["train", "test"]) -> Rows:
        """The rows with their columns under the names that the rest of the package knows."""
        rows = super().read(path, split)
        if split == "test" and rows.rows[0].keys() >= {"instruction", "answer"}:
            return rows  # a published test set
        for wanted, theirs in self.names.items():
            needed = wanted in (self.columns.text if split == "train" else ("instruction", "answer"))
            if needed and not any(theirs in row for row in rows.rows):
                there = ", ".join(map(repr, rows.rows[0])) or "none"
                raise DataError(
                    f"{path} has no column {theirs!r} but {there}: set --data.{wanted}_column to one of them"
                )
        return converted(rows, self._renamed)

    def _renamed(self, row: Row, where: str) -> Row:
        return {wanted: row[theirs] for wanted, theirs in self.names.items() if theirs in row}


class Commonsense170KDataModule(SFTDataModule):
    """Commonsense-170K of LLM-Adapters: the training sets of eight commonsense tasks, as instructions.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        **kwargs: As for `SFTDataModule`.
    """

    notices = (
        "five of the eight commonsense test files (piqa, social_i_qa, hellaswag, winogrande, boolq) are the official "
        "validation splits: choose no checkpoint and no setting by them",
    )

    def __init__(
        self,
        path: str = f"{LLM_ADAPTERS}/ft-training_set/commonsense_170k.json",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, **kwargs)


class AlpacaDataModule(SFTDataModule):
    """Alpaca: 52 thousand instructions; columns instruction, input, output.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id, such as
            `yahma/alpaca-cleaned`.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        **kwargs: As for `SFTDataModule`.
    """

    notices = (
        "licensed CC-BY-NC-4.0, not for commercial use, and its answers were written by OpenAI's models, whose terms "
        "apply",
    )

    def __init__(
        self,
        path: str = "tatsu-lab/alpaca",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, **kwargs)


class GSM8KDataModule(SFTDataModule):
    """GSM8K: grade school mathematics, with worked answers that end in `#### N`.

    Rows are those of the set itself (question, answer), whose marks for a calculator (`<<48/2=24>>`) are taken out, or
    have the columns of LLM-Adapters (instruction, input, output, answer).

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        subset: Configuration of the dataset on the hub.
        **kwargs: As for `SFTDataModule`.
    """

    def __init__(
        self,
        path: str = "openai/gsm8k",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        subset: str | None = "main",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, subset=subset, **kwargs)

    def read(self, path: str, split: Literal["train", "test"]) -> Rows:
        """Question, worked answer, and the number that it ends in."""
        return converted(super().read(path, split), from_gsm8k)


class StrategyQADataModule(SFTDataModule):
    """StrategyQA: questions whose answer, yes or no, takes several steps; asked and answered as boolq is.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        **kwargs: As for `SFTDataModule`.
    """

    def __init__(
        self,
        path: str = "ChilleD/StrategyQA",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, **kwargs)

    def read(self, path: str, split: Literal["train", "test"]) -> Rows:
        """An instruction that says how to answer, and `true` or `false`."""
        return converted(super().read(path, split), from_strategyqa)
