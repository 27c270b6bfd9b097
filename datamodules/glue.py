"""GLUE: sentences and pairs of sentences with a label, from the hub or as they were first distributed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lift_lightning.collate import collate_sentences
from lift_lightning.datamodules.finetuning import FineTuningDataModule
from lift_lightning.datamodules.rows import (
    DataError,
    Row,
    Rows,
    converted,
    describe,
    get_text,
    split_rows,
)
from lift_lightning.datamodules.shards import without_label
from lift_lightning.datamodules.sources import looks_local, read_rows, read_text
from lift_lightning.datamodules.tokenise import encode_cached
from lift_lightning.evaluation.classification import Classification
from lift_lightning.evaluation.glue import GLUE, GlueTask

if TYPE_CHECKING:
    import datasets

_NO_TEST = "the labels of GLUE's test sets are not public (-1 on the hub): use validate, which measures on the dev set"
_ENTAILED = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Layout:
    """Where a task's rows have what.

    Attributes:
        folder: Name in the original distribution.
        text: Columns with sentences, on the hub.
        tsv_text: The same in the original TSVs: by name, or by number where the file has no header.
        tsv_label: Likewise.
        names: Of the labels, in the order of their numbers, where files have names.
        skips_broken: Whether lines of the original file are broken by line ends inside a sentence; the hub lacks them.
    """

    folder: str
    text: tuple[str, ...]
    tsv_text: tuple[str, ...] | tuple[int, ...]
    tsv_label: str | int
    names: tuple[str, ...] = ()
    skips_broken: bool = False


_PAIR = ("sentence1", "sentence2")
_ASKED = ("question1", "question2")
LAYOUTS: dict[GlueTask, Layout] = {
    "cola": Layout("CoLA", ("sentence",), (3,), 1),
    "sst2": Layout("SST-2", ("sentence",), ("sentence",), "label"),
    "mrpc": Layout("MRPC", _PAIR, ("#1 String", "#2 String"), "Quality"),
    "stsb": Layout("STS-B", _PAIR, _PAIR, "score"),
    "qqp": Layout("QQP", _ASKED, _ASKED, "is_duplicate", skips_broken=True),
    "mnli": Layout("MNLI", ("premise", "hypothesis"), _PAIR, "gold_label", ("entailment", "neutral", "contradiction")),
    "qnli": Layout("QNLI", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILED),
    "rte": Layout("RTE", _PAIR, _PAIR, "label", _ENTAILED),
}


@dataclass(frozen=True)
class EncodedSentences:
    """Token ids of a sentence or a pair.

    Attributes:
        input_ids: At most `max_length` ids.
        token_type_ids: Which of the two each is of; empty where the tokenizer does not say.
        full_length: Tokens before any cut.
        label: A class number, or a score.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    full_length: int
    label: float


class GLUEDataModule(FineTuningDataModule):
    """One task of GLUE, with the classes of the hub; trained on its training set, validated on its dev set.

    MNLI has two dev sets, matched and mismatched; STS-B is a regression from 0 to 5. The labels of the test sets are
    not public, so there is no `test`. The parts of GLUE come from other sets, whose licences differ.

    Args:
        task: `cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `qnli` or `rte`.
        path: A Hugging Face hub id, or a folder: of the task or with one of the task in it, with the original TSVs
            (train.tsv, dev.tsv), or with train and validation as .parquet, .jsonl or .json in the columns of the hub.
        tokenizer: A tokenizer, or the folder or hub id of one; in the CLI it follows model.model_name_or_path.
        batch_size: Examples per batch and device (paper: 32).
        max_length: Most tokens per example; what is longer is cut at its end, counted and reported.
        **kwargs: As for `FineTuningDataModule`.
    """

    path: str
    classification: Classification

    def __init__(
        self,
        task: GlueTask,
        path: str = "nyu-mll/glue",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 32,
        max_length: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, batch_size=batch_size, max_length=max_length, **kwargs)
        if task not in get_args(GlueTask):
            raise DataError(f"task must be one of {', '.join(get_args(GlueTask))}, got {task!r}: set --data.task")
        self.task = task
        self.layout = LAYOUTS[task]
        self.classification = GLUE[task]
        self.val_datasets: list[datasets.Dataset] | None = None

    @property
    def splits(self) -> list[str]:
        """The hub's names of the dev sets, in the order of the validation loaders."""
        return [f"validation_{part}" for part in self.classification.parts] or ["validation"]

    @property
    def test_tasks(self) -> list[str]:
        """Raises DataError: there are no labels to test on."""
        raise DataError(_NO_TEST)

    def test_dataloader(self) -> DataLoader:
        """Raises DataError: there are no labels to test on."""
        raise DataError(_NO_TEST)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the training set, of which a validation needs nothing, and the dev sets."""
        if stage in ("test", "predict"):
            return
        if self.val_datasets is None:
            self.val_datasets = [self._encode(split, self.read(split)) for split in self.splits]
        if self.train_dataset is None and stage != "validate":
            rows = self.read("train")
            train, _ = split_rows(len(rows), 0, self.seed, self.max_samples)
            self.train_dataset = self._encode("train", rows.subset(train))

    def val_dataloader(self) -> list[DataLoader]:
        """One loader for each of `splits`. On several devices, a row that fills up the last turn has no label."""
        collate = self.collate_training()
        return [self._eval_loader(rows, collate, without_label) for rows in self._ready(self.val_datasets, "validate")]

    def collate_training(self) -> Callable[..., Any]:
        """Padding on the right, and one label for each row."""
        return partial(
            collate_sentences,
            pad_token_id=self.pad_token_id,
            regression=self.classification.num_labels == 1,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Make a tensor of real targets, after Lightning has rounded the tensors of a batch for bf16-true."""
        labels = batch["labels"]
        return (
            batch
            if isinstance(labels, torch.Tensor)
            else {**batch, "labels": torch.tensor(labels, dtype=torch.float32)}
        )

    def read(self, split: str) -> Rows:
        """The rows of one split, in the columns of the hub, with labels as numbers.

        Raises:
            DataError: There is no such data, or a row lacks something.
        """
        local = Path(self.path).expanduser()
        if not local.exists() and not looks_local(self.path):
            rows = read_rows(self.path, split, revision=self.revision, subset=self.task)
        else:
            rows = self._read_folder(local, split)
        return converted(rows, self._checked)

    def _read_folder(self, root: Path, split: str) -> Rows:
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise DataError(f"{root} {what}: set --data.path to a folder with the data of {self.task}, or to a hub id")
        folders = [root / name for name in (self.task, self.layout.folder)]
        folder = next((found for found in folders if found.is_dir()), root)
        tsv = folder / f"{split.replace('validation', 'dev')}.tsv"
        if tsv.is_file():
            return self._read_tsv(tsv)
        if any(folder.glob(f"{split}.*")) or any(folder.glob(f"**/{split}-*.parquet")):
            return read_rows(str(folder), split)
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise DataError(
            f"{folder} has neither {tsv.name} nor {split}.parquet, .jsonl or .json, but {there}: set --data.path to a "
            f"folder with the data of {self.task}"
        )

    def _read_tsv(self, file: Path) -> Rows:
        """The rows of a TSV under the names of the hub's columns."""
        wanted = dict(zip(self.layout.text, self.layout.tsv_text, strict=True)) | {"label": self.layout.tsv_label}
        rows, broken = Rows(str(file)), 0
        for number, cells in _read_cells(file, header=isinstance(self.layout.tsv_label, str)):
            if missing := [column for column in wanted.values() if column not in cells]:
                if not self.layout.skips_broken:
                    raise DataError(
                        f"{file}, line {number} has no column {missing[0]!r}: it must have those of {self.task}"
                    )
                broken += 1
                continue
            rows.rows.append({name: cells[column] for name, column in wanted.items()})
            rows.places.append((f"{file}, line", number))
        if broken:
            rank_zero_info(f"{file}: {broken} lines left out that are parts of a broken one; the hub lacks them too")
        if not rows.rows:
            raise DataError(f"{file} has no rows")
        return rows

    def _checked(self, row: Row, where: str) -> Row:
        texts = {name: get_text(row, name, where) for name in self.layout.text}
        if not any(text.strip() for text in texts.values()):
            raise DataError(f"{where} has no text: fill it in, or remove the row")
        return {**texts, "label": self._label(row.get("label"), where)}

    def _label(self, value: Any, where: str) -> float:
        if value in self.layout.names:
            return float(self.layout.names.index(value))
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        labels = self.classification.num_labels
        if not (0 <= number <= 5 if labels == 1 else number in range(labels)):
            allowed = "a number from 0 to 5" if labels == 1 else f"one of {', '.join(map(str, range(labels)))}"
            names = f" or {', '.join(self.layout.names)}" if self.layout.names else ""
            raise DataError(
                f"{where}, column 'label' is {describe(value)}; it must be {allowed}{names} (test sets have no labels)"
            )
        return number

    def _encode(self, split: str, rows: Rows) -> datasets.Dataset:
        examples = [([row[name] for name in self.layout.text], row["label"]) for row in rows.rows]
        tokenizer = self._ready_tokenizer()
        found = encode_cached(
            examples, encode_sentences, tokenizer, self.max_length, self.cache_dir, kind=EncodedSentences
        )
        lengths = list(found["full_length"])
        rank_zero_info(
            f"{self.path}, {self.task}, {split}: {len(rows)} rows, longest {max(lengths)} tokens, "
            f"{sum(length > self.max_length for length in lengths)} cut at max_length {self.max_length}"
        )
        return found


def encode_sentences(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], label: float, max_length: int
) -> EncodedSentences:
    """Ids of a sentence or a pair, with the tokenizer's own marks.

    A tokenizer without a separator, as of a decoder, would run the second sentence into the first: a line break stands
    between them.

    Args:
        tokenizer: Of the model.
        texts: One or two.
        label: Carried along.
        max_length: Most ids to keep; of a pair the longer sentence is cut first.
    """
    if tokenizer.sep_token is None:
        texts = ["\n".join(texts)]
    whole = tokenizer(*texts, verbose=False)
    kept = whole
    if len(whole.input_ids) > max_length:
        kept = tokenizer(*texts, truncation="longest_first", max_length=max_length, verbose=False)
    return EncodedSentences(kept.input_ids, kept.get("token_type_ids", []), len(whole.input_ids), label)


def _read_cells(file: Path, header: bool) -> Iterator[tuple[int, dict[Any, str]]]:
    """Each row's cells by the names in the first line, or by number; a row of another length has none.

    Quotes are part of the text: with csv's own rules STS-B would lose 38 rows.
    """
    reader = csv.reader(io.StringIO(read_text(file)), delimiter="\t", quoting=csv.QUOTE_NONE)
    names: list[str] = next(reader, []) if header else []
    for cells in filter(None, reader):
        if header:
            yield reader.line_num, dict(zip(names, cells, strict=True)) if len(cells) == len(names) else {}
        else:
            yield reader.line_num, dict(enumerate(cells))
