"""Supervised fine-tuning on prompt and answer: reading, seeded split, cached tokenisation, loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lift_lightning.collate import collate_test, pad_batch
from lift_lightning.datamodules.resume import ResumableDataLoader, mended_epoch
from lift_lightning.datamodules.rows import (
    Columns,
    DataError,
    Row,
    Rows,
    check_rows,
    drop_empty,
    name_tasks,
    question_key,
    read_rows,
    split_rows,
)
from lift_lightning.datamodules.shards import EvaluationShard, without_answer, without_labels
from lift_lightning.datamodules.tokenise import encode_cached
from lift_lightning.prompts import choose_pad_id, encode_example, encode_prompt, render_prompt

if TYPE_CHECKING:
    import datasets


DEFAULT_SEED = 43  # of the released code


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


class SFTDataModule(LightningDataModule):
    """Rows of a file or a hub dataset as training examples: the loss is on the answer only.

    A dataset of another shape overrides `columns`, `test_columns` and `to_example`; one from elsewhere, `read`.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id.
        tokenizer: A tokenizer, or the folder or hub id of one; on the command line model.model_name_or_path if not
            given.
        batch_size: Examples per batch and device.
        max_length: Most tokens per training example; the tail of a longer answer is cut, counted and reported.
        val_size: Rows held out for validation, drawn by the seed; 0 for none.
        test_path: Test rows in the same format with an `answer` column: a file, a list of files, or a mapping of task
            names to files. One loader each.
        eval_batch_size: Examples per batch in validation and test; default: batch_size.
        num_workers: Worker processes per loader.
        seed: Seed of the held-out rows and of the order of training; on the command line seed_everything if not given,
            else 43.
        revision: Branch, tag or commit of a hub dataset.
        subset: Configuration of a hub dataset that has several.
        group_by_length: Put rows of about the same length into a batch, so that little of it is padding.
        tokenizer_revision: Branch, tag or commit of a hub tokenizer; on the command line model.revision with the
            model's tokenizer.
        pad_token: Token to pad with; default: the tokenizer's, else its EOS.
        cache_dir: Folder for tokenised data; default: a folder in the cache of Hugging Face datasets.
        max_samples: Train on at most so many rows, drawn by the seed; the held-out rows do not depend on it.
        test_limit: Take at most so many rows from the start of each test file.
        skip_empty: Leave out rows with an empty instruction or output instead of raising an error.
        pad_to_multiple_of: Round the length of every training batch up to a multiple of this.
    """

    notices: tuple[str, ...] = ()  # what a user of the set has to be told: licences, tests that are not clean
    columns = Columns()
    test_columns = Columns(text=("instruction",), optional=("input", "output"), needs_answer=True)

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        max_length: int = 2048,
        val_size: int = 100,
        test_path: str | list[str] | dict[str, str] | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        pad_token: str | None = None,
        cache_dir: str | None = None,
        max_samples: int | None = None,
        test_limit: int | None = None,
        skip_empty: bool = False,
        pad_to_multiple_of: int | None = None,
        subset: str | None = None,
        group_by_length: bool = False,
    ) -> None:
        super().__init__()
        at_least_one = {"batch_size": batch_size, "max_length": max_length, "eval_batch_size": eval_batch_size}
        at_least_one |= {"max_samples": max_samples, "test_limit": test_limit, "pad_to_multiple_of": pad_to_multiple_of}
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, got {value}: set --data.{name}")
        if val_size < 0:
            raise DataError(f"val_size must not be negative, got {val_size}: set --data.val_size (0 for no validation)")
        self.path = path
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.val_size = val_size
        self.test_files = name_tasks(test_path)
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = DEFAULT_SEED if seed is None else seed
        self.revision = revision
        self.subset = subset
        self.group_by_length = group_by_length
        self.tokenizer_revision = tokenizer_revision
        self.pad_token = pad_token
        self.cache_dir = cache_dir
        self.max_samples = max_samples
        self.test_limit = test_limit
        self.skip_empty = skip_empty
        self.pad_to_multiple_of = pad_to_multiple_of
        self.train_dataset: datasets.Dataset | None = None
        self.val_dataset: datasets.Dataset | None = None
        self.report: DataReport | None = None
        self._pad_token_id: int | None = None
        self._test_rows: dict[str, Rows] | None = None
        self._train_loader: ResumableDataLoader | None = None
        self._loader_state: dict[str, int] | None = None

    def read(self, path: str, split: Literal["train", "test"]) -> Rows:
        """The raw rows of the training data or of one test set."""
        if split == "test":
            return read_rows(path, split, option="--data.test_path")
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

    def prepare_data(self) -> None:
        """On one process per node: download and tokenise, so that the other ranks find it in the cache."""
        if self.trainer is not None and self.trainer.state.fn in ("fit", "validate"):
            self.setup(self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        # Test files are read for fit too: a bad one should not be found out after the training, and leaks are counted.
        self._setup_test()
        if stage != "test" and stage != "predict":
            self._setup_training()

    def train_dataloader(self) -> ResumableDataLoader:
        trainer, dataset = self.trainer, self._ready(self.train_dataset, "fit")
        lengths = [min(n, self.max_length) for n in dataset["full_length"]] if self.group_by_length else None
        self._train_loader = ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            num_workers=self.num_workers,
            collate_fn=self._collate_training(),
            lengths=lengths,
            current_epoch=partial(mended_epoch, trainer) if trainer is not None else None,
        )
        state, self._loader_state = self._loader_state, None  # a state that is refused must not be met again
        if state is not None:
            self._train_loader.load_state_dict(state)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Position in the training rows.

        Lightning saves it with its loop as well, but restores that too late where `configure_optimizers` has asked for
        the number of batches, which makes the loaders before the loop's state is there.
        """
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the next unseen row; a checkpoint that is only tested moves nothing."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        state = state_dict.get("train_loader")
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self._loader_state = state
        elif state is not None and self._train_loader is not None:
            # FSDP2 reads a checkpoint when optimizers, and with them the loader whose length they ask for, are there.
            self._train_loader.load_state_dict(state)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """In file order. On several devices the ranks take turns; a row that fills up the last turn has no labels."""
        dataset = self._ready(self.val_dataset, "validate")
        return self._eval_loader(dataset, self._collate_training(), without_labels) if len(dataset) else []

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per task, in the order of `test_tasks`, each with the longest prompts first.

        On several devices the ranks take turns here too; what fills up the last turn has None for its `index`.
        """
        if not self.test_files:
            raise DataError(
                "there is nothing to test on: set --data.test_path to a file with instruction, input and answer"
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

    @property
    def pad_token_id(self) -> int:
        """Id that fills batches; known after `setup`."""
        return self._ready(self._pad_token_id, "fit")

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens and all."""
        return str(self._ready_tokenizer().decode(ids))

    def _ready_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DataError("there is no tokenizer: pass tokenizer=..., or set --data.tokenizer to a folder or hub id")
        if isinstance(self.tokenizer, (str, Path)):
            from lift_lightning.models import load_tokenizer

            self.tokenizer = load_tokenizer(str(self.tokenizer), self.tokenizer_revision)
        if self._pad_token_id is None:
            self._pad_token_id = self._choose_pad_token(self.tokenizer)
        return self.tokenizer

    def _choose_pad_token(self, tokenizer: PreTrainedTokenizerBase) -> int:
        try:
            token_id = choose_pad_id(tokenizer, self.pad_token)
        except ValueError as err:
            raise DataError(str(err)) from None
        if self.pad_token is None and tokenizer.pad_token_id is None:
            rank_zero_info(f"the tokenizer has no pad token: padding with its EOS {tokenizer.eos_token!r}")
        return token_id

    def _setup_training(self) -> None:
        if self.train_dataset is not None:
            return
        tokenizer = self._ready_tokenizer()
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so no answer can be ended: set its eos_token")
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
            rows = check_rows(self.read(path, "test"), self.test_columns)
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

    def _collate_training(self) -> Any:
        return partial(pad_batch, pad_token_id=self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)

    def _eval_loader(self, dataset: Any, collate: Any, blank: Callable[..., Any]) -> DataLoader:
        if self.trainer is not None and self.trainer.world_size > 1:
            dataset = EvaluationShard(dataset, self.trainer.world_size, self.trainer.global_rank, blank)
        # A generator of its own: without one, every iterator draws its workers' seed from the global one.
        generator = torch.Generator().manual_seed(self.seed)
        # Of one rank, whatever there are: Lightning would replace any other sampler by one that repeats rows.
        order: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(
            dataset,
            self.eval_batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=generator,
        )

    @staticmethod
    def _ready(value: Any, stage: str) -> Any:
        if value is None:
            raise RuntimeError(f"call setup({stage!r}) first; the Trainer does it by itself")
        return value
