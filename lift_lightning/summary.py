"""The table of what is trained sparsely, what densely, and what is frozen."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import clean_name
from lift_lightning.sharding import owned
from lift_lightning.shares import Shares


@dataclass(frozen=True)
class SummaryRow:
    """One kind of parameter.

    Attributes:
        name: with layer numbers starred.
        kind: `sparse`, `dense` or `frozen`.
        tensors: how many parameters.
        entries: how many numbers they hold.
        trained: how many of those are trained.
    """

    name: str
    kind: str
    tensors: int
    entries: int
    trained: int


def parameter_summary(model: nn.Module, optimizer: SparseAdamW) -> list[SummaryRow]:
    """Rows for every kind of parameter of the model, sparse ones first.

    To be called after the first selection, where parameters are split over ranks by each of them.
    """
    sparse = [parameter for _, parameter, _ in optimizer.sparse_parameters()]
    counts = torch.tensor([optimizer.indices(p).numel() for p in sparse], device=optimizer.skipped_steps.device)
    if optimizer.split_over is not None:
        optimizer.split_over.sum_(counts)
    trained = {id(p): ("sparse", count) for p, count in zip(sparse, counts.tolist(), strict=True)}
    trained |= {id(p): ("dense", owned(p).numel) for p in optimizer.dense_parameters()}
    rows: dict[tuple[str, str], SummaryRow] = {}
    for name, parameter in model.named_parameters():
        kind, count = trained.get(id(parameter), ("frozen", 0))
        starred = re.sub(r"(?<=\.)\d+(?=\.)", "*", clean_name(name))
        row = rows.get((kind, starred), SummaryRow(starred, kind, 0, 0, 0))
        rows[kind, starred] = SummaryRow(
            starred, kind, row.tensors + 1, row.entries + owned(parameter).numel, row.trained + count
        )
    return sorted(rows.values(), key=lambda row: ("sparse", "dense", "frozen").index(row.kind))


def summary_table(rows: list[SummaryRow], optimizer: SparseAdamW) -> Table:
    """The rows as a table with totals, and the size of the optimizer's state beside that of a full AdamW."""
    entries, trained = sum(row.entries for row in rows), sum(row.trained for row in rows)
    state = optimizer.state_bytes() / 2**20
    on_each = "" if optimizer.split_over is None else " on this rank"
    table = Table(
        title="What is trained",
        caption=f"{trained:,} of {entries:,} parameters trained ({trained / entries:.2%}); optimizer state "
        f"{state:,.1f} MiB{on_each}, float32 AdamW on all of them would hold {entries * 8 / 2**20:,.1f} MiB",
    )
    table.add_column("parameter", overflow="fold")
    table.add_column("kind")
    for heading in ("tensors", "entries", "trained", "share"):
        table.add_column(heading, justify="right")
    previous = None
    for row in rows:
        if previous not in (None, row.kind):
            table.add_section()
        previous = row.kind
        share = f"{row.trained / row.entries:.2%}" if row.trained else "-"
        table.add_row(row.name, row.kind, str(row.tensors), f"{row.entries:,}", f"{row.trained:,}", share)
    return table


def shares_table(shares: Shares, optimizer: SparseAdamW) -> Table:
    """What each matrix got of a budget that was divided: R where it has one of its own, K, and its share."""
    table = Table(title="How the budget is divided")
    table.add_column("parameter", overflow="fold")
    for heading in ("shape", "rank of the approximation", "entries", "share"):
        table.add_column(heading, justify="right")
    total = 0
    for name, parameter, _ in optimizer.sparse_parameters():
        shape, theirs = owned(parameter).shape, shares[name]
        each = shape.numel() // len(theirs)
        for i, one in enumerate(theirs):
            label = name if len(theirs) == 1 else f"{name}[{i}]"
            rank = "" if one.lra_rank is None else str(one.lra_rank)
            table.add_row(label, "x".join(map(str, shape)), rank, f"{one.entries:,}", f"{one.entries / each:.2%}")
            total += one.entries
    table.caption = f"{total:,} entries in all"
    return table
