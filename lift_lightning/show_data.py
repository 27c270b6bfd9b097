"""The `data` command: what a model will see, before it sees it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, cast

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lift_lightning.datamodules import SFTDataModule
from lift_lightning.prompts import IGNORE_INDEX

_SHARES = (0.5, 0.9, 0.99, 1.0)  # of the rows, whose lengths the table tells


def show_data(data: SFTDataModule, console: Console | None = None) -> None:
    """Print sizes, lengths, what is cut, one example with its loss mask, and what a user of the set has to know.

    Args:
        data: is set up for training and its test sets here.
        console: standard output if None.
    """
    data.setup("fit")
    assert data.train_dataset is not None
    console = console or Console()
    console.print(_sizes(data))
    console.print(_example(data, data.train_dataset[0]))
    for notice in data.notices:
        console.print(Panel(notice, title="to know", border_style="yellow"))


def _sizes(data: SFTDataModule) -> Table:
    report = data.report
    assert report is not None
    assert data.train_dataset is not None
    lengths = torch.tensor(data.train_dataset["full_length"], dtype=torch.float64)
    table = Table(title=f"Data of {data.path}", show_header=False)
    rows: list[tuple[str, str]] = [
        ("rows for training", f"{report.train:,} of {report.rows:,}"),
        ("rows for validation", f"{report.val:,}"),
        ("empty rows left out", f"{report.empty:,}"),
        ("tokens", f"{report.tokens:,}, with loss {report.label_tokens / report.tokens:.1%}"),
        *((_share(share), f"{int(torch.quantile(lengths, share)):,} tokens") for share in _SHARES),
        ("targets cut at max_length", f"{report.truncated:,} (max_length {report.max_length:,})"),
        ("rows dropped, no label left", f"{report.dropped:,}"),
        ("padding of the first epoch's batches", f"{_padding(data):.1%} (batch_size {data.batch_size})"),
    ]
    rows += [(f"test: {task}", f"{len(loader.dataset):,} rows") for task, loader in _tests(data)]
    for row in rows:
        table.add_row(*row)
    return table


def _share(share: float) -> str:
    return "longest row" if share == 1 else f"{share:.0%} of the rows are up to"


def _padding(data: SFTDataModule) -> float:
    """Of the training batches as the sampler makes them, by their lengths: nothing is read."""
    assert data.train_dataset is not None
    lengths = [min(n, data.max_length) for n in data.train_dataset["full_length"]]
    batches = list(cast(Iterable[list[int]], data.train_dataloader().batch_sampler))
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / padded


def _tests(data: SFTDataModule) -> list[tuple[str, Any]]:
    return list(zip(data.test_tasks, data.test_dataloader(), strict=True)) if data.test_tasks else []


def _example(data: SFTDataModule, row: dict[str, Any]) -> Panel:
    text = Text()
    for trained, pairs in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda p: p[1] != IGNORE_INDEX):
        part = data.decode([token for token, _ in pairs])
        text.append(part, style="bold green" if trained else "dim")
    legend = Text.assemble(("given", "dim"), "   ", ("learned", "bold green"))
    return Panel(Group(text, Text(), legend), title="the first training row as the model sees it")
