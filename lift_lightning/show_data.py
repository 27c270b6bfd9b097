"""The `data` command: what a model will see, before it sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any, cast

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lift_lightning.datamodules import FineTuningDataModule, GLUEDataModule, SFTDataModule
from lift_lightning.prompts import IGNORE_INDEX

_SHARES = (0.5, 0.9, 0.99, 1.0)  # of the rows, whose lengths the table tells


def show_data(data: FineTuningDataModule, console: Console | None = None) -> None:
    """Print sizes, lengths, what is cut, one example with its loss mask or label, and what a user has to know.

    Args:
        data: is set up for training and its test sets here.
        console: standard output if None.
    """
    data.setup("fit")
    assert data.train_dataset is not None
    console = console or Console()
    first = data.train_dataset[0]
    table = Table(title=f"Data of {data.path}", show_header=False)
    if isinstance(data, SFTDataModule):
        own, after, example = _text_sizes(data), _text_cuts(data), _masked(data, first)
    else:
        own, after, example = _label_sizes(data), _label_cuts(data), _labelled(data, first)
    for row in (*own, *_lengths(data), *after):
        table.add_row(*row)
    console.print(table)
    console.print(Panel(example, title="the first training row as the model sees it"))
    for notice in getattr(data, "notices", ()):
        console.print(Panel(notice, title="to know", border_style="yellow"))


def _text_sizes(data: SFTDataModule) -> list[tuple[str, str]]:
    report = data.report
    assert report is not None
    return [
        ("rows for training", f"{report.train:,} of {report.rows:,}"),
        ("rows for validation", f"{report.val:,}"),
        ("empty rows left out", f"{report.empty:,}"),
        ("tokens", f"{report.tokens:,}, with loss {report.label_tokens / report.tokens:.1%}"),
    ]


def _text_cuts(data: SFTDataModule) -> list[tuple[str, str]]:
    report = data.report
    assert report is not None
    rows = [
        ("targets cut at max_length", f"{report.truncated:,} (max_length {report.max_length:,})"),
        ("rows dropped, no label left", f"{report.dropped:,}"),
        _padding(data),
    ]
    tests = list(zip(data.test_tasks, data.test_dataloader(), strict=True)) if data.test_tasks else []
    return rows + [(f"test: {task}", f"{len(cast(Any, loader.dataset)):,} rows") for task, loader in tests]


def _label_sizes(data: FineTuningDataModule) -> list[tuple[str, str]]:
    assert data.train_dataset is not None
    rows = [("rows for training", f"{len(data.train_dataset):,}")]
    if isinstance(data, GLUEDataModule):
        parts = zip(data.splits, data.val_datasets or (), strict=True)
        rows += [(f"rows for {split}", f"{len(part):,}") for split, part in parts]
    labels = list(data.train_dataset["label"])
    if data.classification is not None and data.classification.num_labels > 1:
        counts = sorted(Counter(labels).items())
        return [*rows, ("labels", ", ".join(f"{label:g}: {count / len(labels):.1%}" for label, count in counts))]
    return [*rows, ("labels", f"{min(labels):g} to {max(labels):g}, mean {sum(labels) / len(labels):.2f}")]


def _label_cuts(data: FineTuningDataModule) -> list[tuple[str, str]]:
    assert data.train_dataset is not None
    cut = sum(length > data.max_length for length in data.train_dataset["full_length"])
    return [("rows cut at max_length", f"{cut:,} (max_length {data.max_length:,})"), _padding(data)]


def _lengths(data: FineTuningDataModule) -> list[tuple[str, str]]:
    assert data.train_dataset is not None
    lengths = torch.tensor(data.train_dataset["full_length"], dtype=torch.float64)
    return [(_share(share), f"{int(torch.quantile(lengths, share)):,} tokens") for share in _SHARES]


def _share(share: float) -> str:
    return "longest row" if share == 1 else f"{share:.0%} of the rows are up to"


def _padding(data: FineTuningDataModule) -> tuple[str, str]:
    """Of the training batches as the sampler makes them, by their lengths: nothing is read."""
    assert data.train_dataset is not None
    lengths = [min(n, data.max_length) for n in data.train_dataset["full_length"]]
    batches = list(cast(Iterable[list[int]], data.train_dataloader().batch_sampler))
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    share = 1 - sum(lengths[i] for batch in batches for i in batch) / padded
    return "padding of the first epoch's batches", f"{share:.1%} (batch_size {data.batch_size})"


def _masked(data: SFTDataModule, row: dict[str, Any]) -> Group:
    text = Text()
    for trained, pairs in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda p: p[1] != IGNORE_INDEX):
        part = data.decode([token for token, _ in pairs])
        text.append(part, style="bold green" if trained else "dim")
    return Group(text, Text(), Text.assemble(("given", "dim"), "   ", ("learned", "bold green")))


def _labelled(data: FineTuningDataModule, row: dict[str, Any]) -> Group:
    return Group(Text(data.decode(row["input_ids"])), Text(), Text(f"label: {row['label']:g}", style="bold green"))
