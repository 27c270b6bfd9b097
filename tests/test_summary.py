"""The table of what is trained: exact counts, and no parameter left out."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lift_lightning import SparseAdamW, build_param_groups
from lift_lightning.summary import SummaryRow, parameter_summary, summary_table


def model_and_optimizer() -> tuple[nn.Module, SparseAdamW]:
    layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 6), "norm": nn.LayerNorm(6)}) for _ in range(2)])
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(6, 2)})
    return model, SparseAdamW(build_param_groups(model, r"\.up\.", modules_to_train="head"))


def test_rows():
    model, optimizer = model_and_optimizer()
    for i, layer in enumerate(model["layers"]):
        optimizer.set_indices(layer["up"].weight, torch.arange(5 + i))
    rows = parameter_summary(model, optimizer)
    assert rows == [
        SummaryRow("layers.*.up.weight", "sparse", 2, 48, 11),  # 2 * 4 * 6 entries, 5 + 6 selected
        SummaryRow("head.weight", "dense", 1, 12, 12),
        SummaryRow("head.bias", "dense", 1, 2, 2),
        SummaryRow("layers.*.up.bias", "frozen", 2, 12, 0),
        SummaryRow("layers.*.norm.weight", "frozen", 2, 12, 0),
        SummaryRow("layers.*.norm.bias", "frozen", 2, 12, 0),
    ]
    assert sum(row.entries for row in rows) == sum(p.numel() for p in model.parameters()) == 98
    assert sum(row.tensors for row in rows) == len(list(model.parameters()))


def test_the_same_kind_can_be_sparse_here_and_frozen_there():
    model, _ = model_and_optimizer()
    optimizer = SparseAdamW(build_param_groups(model, r"layers\.0\.up"))
    optimizer.set_indices(model["layers"][0]["up"].weight, torch.arange(3))
    rows = {(row.name, row.kind): row for row in parameter_summary(model, optimizer)}
    assert rows["layers.*.up.weight", "sparse"].trained == 3
    assert rows["layers.*.up.weight", "frozen"].entries == 24


def test_table():
    """11 + 14 of 98 entries are 25.51%."""
    model, optimizer = model_and_optimizer()
    for i, layer in enumerate(model["layers"]):
        optimizer.set_indices(layer["up"].weight, torch.arange(5 + i))
    console = Console(file=io.StringIO(), width=160)
    console.print(summary_table(parameter_summary(model, optimizer), optimizer))
    text = console.file.getvalue()
    assert "25 of 98 parameters trained (25.51%)" in text
    (line,) = [line for line in text.splitlines() if "layers.*.up.weight" in line]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        "layers.*.up.weight",
        "sparse",
        "2",
        "48",
        "11",
        "22.92%",
    ]
    (frozen,) = [line for line in text.splitlines() if "norm.bias" in line]
    assert [cell.strip() for cell in frozen.strip("│ ").split("│")][-3:] == ["12", "0", "-"]


def test_before_the_first_selection():
    model, optimizer = model_and_optimizer()
    with pytest.raises(RuntimeError, match="'layers.0.up.weight' has no selected entries yet"):
        parameter_summary(model, optimizer)
