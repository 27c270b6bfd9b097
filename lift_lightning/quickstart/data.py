"""The quickstart's questions as a DataModule: generated, where others read a file."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lift_lightning.datamodules import SFTDataModule
from lift_lightning.datamodules.rows import DataError, Rows
from lift_lightning.quickstart.skills import SKILLS, task_name
from lift_lightning.quickstart.text import Skill, questions


class QuickstartDataModule(SFTDataModule):
    """Questions of one skill to train on, held-out ones of each to test.

    Args:
        path: The skill to train: `target`, `bridge` or `source`.
        tokenizer: As for `SFTDataModule`.
        train_size: Questions drawn by the seed, those of `val_size` among them.
        test_size: Held-out questions of each skill; they are the same whatever the seed.
        **kwargs: As for `SFTDataModule`; `test_path` maps names of tasks to skills, by default all three.
    """

    def __init__(
        self,
        path: Skill = "target",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        train_size: int = 6464,
        test_size: int = 300,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("test_path") is None:
            kwargs["test_path"] = {task_name(skill): skill for skill in SKILLS}
        super().__init__(path, tokenizer, **kwargs)
        self.train_size = train_size
        self.test_size = test_size

    def read(self, path: str, split: Literal["train", "test"]) -> Rows:
        """Draw the questions.

        Raises:
            DataError: There is no such skill, or it has fewer questions.
        """
        try:
            if split == "test":
                found = questions(path, self.test_size, split="heldout")  # type: ignore[arg-type]
            else:
                found = questions(path, self.train_size, split="train", seed=self.seed)  # type: ignore[arg-type]
        except ValueError as error:
            raise DataError(f"{error}: set --data.path, --data.train_size or --data.test_size") from error
        return Rows(path, [question._asdict() for question in found], [("question", i + 1) for i in range(len(found))])
