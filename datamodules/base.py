"""Supervised fine-tuning on prompt and answer: reading, seeded split, cached tokenisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lift_lightning.collate import collate_test, pad_batch
from lift_lightning.datamodules.finetuning import FineTuningDataModule, at_least_one
from lift_lightning.datamodules.rows import (
    Columns,
    DataError,
    Row,
    Rows,
    check_rows,
    drop_empty,
    question_key,
    split_rows,
)
from lift_lightning.datamodules.shards import without_answer, without_labels
from lift_lightning.datamodules.sources import read_rows
from lift_lightning.datamodules.suites import as_questions, name_tasks, source_of, suite_files
from lift_lightning.datamodules.tokenise import encode_cached
from lift_lightning.prompts import encode_example, encode_prompt, render_prompt

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class DataReport:
    """What became of the training file. `longest` is before any cut, `tokens` and `label_tokens` are as trained on."""

    rows: int
    empty: int
    train: int
    val: int
    truncated: int
    dropped: int
    max_length: int
    tokens: int
    longest: int
    label_tokens: int

    def __str__(self) -> str:
        mean = self.tokens / max(self.train + self.val, 1)
        return (
            f"{self.rows} rows: {self.train} train, {self.val} val; {self.truncated} targets cut at max_length "
            f"{self.max_length}, {self.dropped} rows dropped with no label left, {self.empty} empty rows skipped; "
            f"{self.tokens:,} tokens ({self.label_tokens:,} with loss), mean {mean:.0f}, longest example {self.longest}"
        )


class SFTDataModule(FineTuningDataModule):
    """Rows of a file or a hub dataset as training examples: the loss is on the answer only.

    A dataset of another shape overrides `columns`, `test_columns` and `to_example`; one from elsewhere, `read`.

    Args:
        path: Training rows: a .json, .jsonl, .parquet or .csv file, a folder with one, the address of one, or a Hugging
            Face hub id; null where there is nothing to train on.
        tokenizer: A tokenizer, or the folder or hub id of one; on the command line model.model_name_or_path if not
            given.
        batch_size: Examples per batch and device.
        max_length: Most tokens per training example; the tail of a longer answer is cut, counted and reported.
        val_size: Rows held out for validation, drawn by the seed; 0 for none.
        test_path: Test rows in the same format with an `answer` column: a file, a list of files, or a mapping of task
            names to files. One loader each. With test_suite, the folder that has its test sets.
        test_suite: Published test sets: `arithmetic`, `commonsense`, the name of a task, or several of these. They are
            downloaded unless test_path says where they are.
        test_limit: Take at most so many rows from the start of each test file.
        skip_empty: Leave out rows with an empty instruction or output instead of raising an error.
        subset: Configuration of a hub dataset that has several.
        **kwargs: As for `FineTuningDataModule`.
    """

    notices: tuple[str, ...] = ()  # what a user of the set has to be told: licences, tests that are not clean
    columns = Columns()
    test_columns = Columns(text=("instruction",), optional=("input", "output"), needs_answer=True)

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        max_length: int = 2048,
        val_size: int = 100,
        test_path: str | list[str] | dict[str, str] | None = None,
        *,
        test_suite: str | list[str] | None = None,
        test_limit: int | None = None,
        skip_empty: bool = False,
        subset: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, batch_size=batch_size, max_length=max_length, **kwargs)
        at_least_one(test_limit=test_limit)
        if val_size < 0:
            raise DataError(f"val_size must not be negative, got {val_size}: set --data.val_size (0 for no validation)")
        self.val_size = val_size
        self.test_files = name_tasks(test_path) if test_suite is None else suite_files(test_suite, test_path)
        self.test_limit = test_limit
        self.skip_empty = skip_empty
        self.subset = subset
        self.val_dataset: datasets.Dataset | None = None
        self.report: DataReport | None = None
        self._test_rows: dict[str, Rows] | None = None

    def read(self, path: str, split: Literal["train", "test"]) -> Rows:
        """The raw rows of the training data or of one test set."""
        if split == "test":
            source = source_of(path)
            same = path == self.path  # the other split of what is trained on
            return read_rows(
                path,
                source.split,
                revision=self.revision if same else None,
                subset=self.subset if same else source.subset,
                option="--data.test_path",
            )
        return read_rows(path, split, revision=self.revision, subset=self.subset)

    def to_example(self, row: Row) -> tuple[str, str]:
        """Prompt and target of a checked row. Of a test row only the prompt is used."""
        return render_prompt(row["instruction"], row["input"]), row["output"]

    def check(self, rows: Rows) -> Rows:
        """The training rows, if every one has what `columns` asks for."""
        return check_rows(rows, self.columns)

    def encode(self, rows: list[Row]) -> datasets.Dataset:
        """Ids and labels of checked rows, in their order."""
        examples = [self.to_example(row) for row in rows]
        return encode_cached(examples, encode_example, self._ready_tokenizer(), self.max_length, self.cache_dir)

    def question(self, row: Row) -> str:
        """The part of a row by which a copy of it is recognised in another file."""
        return row["instruction"]

    def check_source(self, rows: Rows) -> None:
        """Refuse training rows that must not be trained on. The base takes everything."""

    def setup(self, stage: str | None = None) -> None:
        # Test files are read for fit too: a bad one should not be found out after the training, and leaks are counted.
        self._setup_test()
        if stage != "test" and stage != "predict":
            self._setup_training()

    def collate_training(self) -> Callable[..., Any]:
        """Padding on the right, with labels."""
        return partial(pad_batch, pad_token_id=self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """In file order. On several devices the ranks take turns; a row that fills up the last turn has no labels."""
        dataset = self._ready(self.val_dataset, "validate")
        return self._eval_loader(dataset, self.collate_training(), without_labels) if len(dataset) else []

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per task, in the order of `test_tasks`, each with the longest prompts first.

        On several devices the ranks take turns here too; what fills up the last turn has None for its `index`.
        """
        if not self.test_files:
            raise DataError(
                "there is nothing to test on: set --data.test_suite, or --data.test_path to a file with instruction, "
                "input and answer"
            )
        tasks = self._ready(self._test_rows, "test")
        collate = partial(collate_test, pad_token_id=self.pad_token_id)
        return [
            self._eval_loader(self._encode_test(task, rows), collate, without_answer) for task, rows in tasks.items()
        ]

    @property
    def test_tasks(self) -> list[str]:
        """Task names in the order of the test loaders."""
        return list(self.test_files)

    def _setup_training(self) -> None:
        if self.train_dataset is not None:
            return
        tokenizer = self._ready_tokenizer()
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so no answer can be ended: set its eos_token")
        if self.path is None:
            raise DataError("there is nothing to train on: set --data.path")
        read = self.read(self.path, "train")
        self.check_source(read)
        rows = self.check(drop_empty(read, self.columns) if self.skip_empty else read)
        train, val = split_rows(len(rows), self.val_size, self.seed, self.max_samples)
        used = sorted(train + val)
        encoded = self.encode([rows.rows[i] for i in used])
        position = {row: i for i, row in enumerate(used)}
        parts = ([position[row] for row in train], [position[row] for row in val])
        self._keep_labelled(encoded, parts, rows=len(rows), empty=len(read) - len(rows))
        for task, tests in (self._test_rows or {}).items():
            self._warn_of_overlap(task, tests, [rows.rows[i] for i in train])

    def _keep_labelled(
        self, encoded: datasets.Dataset, parts: tuple[list[int], list[int]], rows: int, empty: int
    ) -> None:
        """Of the training and validation part select the rows with a label left, and report."""
        heads, lengths = list(encoded["prompt_length"]), list(encoded["full_length"])
        cut, trained = list(encoded["truncated"]), list(encoded["label_length"])
        kept = [[i for i in part if trained[i]] for part in parts]
        everything = kept[0] + kept[1]
        if not kept[0]:
            raise DataError(
                f"max_length {self.max_length} cuts every target away: the shortest prompt alone takes {min(heads)} "
                f"tokens: set --data.max_length to at least {min(heads) + 1} (the longest example takes {max(lengths)})"
            )
        self.report = DataReport(
            rows=rows,
            empty=empty,
            train=len(kept[0]),
            val=len(kept[1]),
            truncated=sum(cut[i] for i in everything),
            dropped=len(heads) - len(everything),
            max_length=self.max_length,
            tokens=sum(min(lengths[i], self.max_length) for i in everything),
            longest=max(lengths),
            label_tokens=sum(trained[i] for i in everything),
        )
        for told in (self.report, *self.notices):
            rank_zero_info(f"{self.path}: {told}")
        self.train_dataset, self.val_dataset = (encoded.select(part) for part in kept)

    def _setup_test(self) -> None:
        if self._test_rows is not None or not self.test_files:
            return
        self._ready_tokenizer()
        self._test_rows = {}
        for task, path in self.test_files.items():
            rows = check_rows(as_questions(task, self.read(path, "test"), self.seed), self.test_columns)
            self._test_rows[task] = rows.subset(range(len(rows))[: self.test_limit])

    def _warn_of_overlap(self, task: str, tests: Rows, train: list[Row]) -> None:
        questions = {question_key(self.question(row)) for row in tests.rows}
        seen = [key for key in (question_key(self.question(row)) for row in train) if key in questions]
        if seen:
            rank_zero_warn(
                f"leak: {len(set(seen))} of the {len(questions)} questions of the test set {task} ({tests.source}) "
                f"are in the training rows of {self.path} ({len(seen)} rows): accuracy on it does not measure "
                "generalisation"
            )

    def _encode_test(self, task: str, rows: Rows) -> list[Row]:
        tokenizer = self._ready_tokenizer()
        shown = ("instruction", "input", "answer")
        encoded = [
            {
                "input_ids": encode_prompt(tokenizer, self.to_example(row)[0]),
                "row": {"index": i, "task": task, **{name: row[name] for name in shown if name in row}},
            }
            for i, row in enumerate(rows.rows)
        ]
        # Little padding, and if the memory is too small it shows at once.
        return sorted(encoded, key=lambda example: -len(example["input_ids"]))
