"""A small network with two sparse layers and a dense head, and what the tests of the optimizer do with it."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from lift_lightning import SparseAdamW

SPARSE = ["0.weight", "2.weight"]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Two sparse layers of 12 x 6 = 72 and 10 x 12 = 120 entries, and a dense head of 3 x 10 + 3."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 12, bias=False), nn.Tanh(), nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 3)]
    return nn.Sequential(*layers).to(dtype)


def optimizer_of(model: nn.Module, **settings) -> SparseAdamW:
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if n in SPARSE], "sparse": True},
        {"params": [(n, p) for n, p in named.items() if n not in SPARSE]},
    ]
    return SparseAdamW(groups, **{**HYPER, **settings})


def random_matrix(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_indices(numel: int, k: int, seed: int) -> Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def select_at_random(optimizer: SparseAdamW, share: float, seed: int) -> dict[str, Tensor]:
    chosen = {}
    for i, (name, parameter, _) in enumerate(optimizer.sparse_parameters()):
        chosen[name] = random_indices(parameter.numel(), round(share * parameter.numel()), seed + 100 * i)
        optimizer.set_indices(parameter, chosen[name])
    return chosen


def micro_batch(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1000 + number)
    inputs, targets = torch.randn(4, 6, generator=rng), torch.randn(4, 3, generator=rng)
    return inputs.to(dtype), targets.to(dtype)


def loss_of(model: nn.Module, number: int) -> Tensor:
    inputs, targets = micro_batch(number, next(model.parameters()).dtype)
    return (model(inputs) - targets).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def sole(weight: Tensor, indices: list[int] | None = None, **settings) -> tuple[nn.Parameter, SparseAdamW]:
    """One sparse parameter called `w` and its optimizer."""
    parameter = nn.Parameter(weight.clone())
    optimizer = SparseAdamW([{"params": [("w", parameter)], "sparse": True}], **{"lr": 1e-2, **settings})
    if indices is not None:
        optimizer.set_indices(parameter, torch.tensor(indices, dtype=torch.int64))
    return parameter, optimizer


def give(parameter: nn.Parameter, gradient: Tensor | float) -> None:
    """Back-propagate exactly this gradient, through the hooks."""
    (parameter * torch.as_tensor(gradient, dtype=parameter.dtype)).sum().backward()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name


def saved_and_loaded(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
