"""Study 1: the paper's toy regression (App. G.5, Fig. 14). `python -m benchmarks.studies.toy`, about five minutes.

y = relu(X W) a with d = 512 inputs and h = 128 hidden units; X is standard normal. Pretraining on 5,000 rows of

    Y_pre = sum of X[:, :32] over columns + 0.1 * sum of sin(X[:, 32:64]),

fine-tuning on 100 rows of Y_ft. The paper prints Y_ft = 0.2 X[:, :64] X[:, :65] X[:, :66] + 0.1 sin(X[:, 67] X[:, 68]);
the shapes of its first term do not agree. It is read as single columns, as the second term has them:

    Y_ft = 0.2 * X[:, 64] X[:, 65] X[:, 66] + 0.1 * sin(X[:, 67] X[:, 68]).

The paper names neither sigma nor what is trained, nor budget and ranks: relu is taken, W is trained and a stays, 5% of
W's entries are selected once before the first step. AdamW on all rows at once, without weight decay; the rate of each
method is the one of four with the lowest validation loss on three seeds of their own. Training stops when 1,000
validation rows have not improved for 100 steps; the loss at the best step is of 1,000 test rows.

What was expected, written before the first run: LIFT's entries carry the pretrained function, which is nearly linear
and of low rank, so that with 100 rows they unlearn it with less overfitting than the others; the spectral norm falls
most under LIFT.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import cache
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.studies.records import Run, Store, significant
from lift_lightning import SelectionConfig, SparseAdamW, build_param_groups
from lift_lightning.selection import select

STUDY = "toy"
INPUTS, HIDDEN = 512, 128
PRETRAINING_ROWS, FINETUNING_ROWS, HELD_OUT_ROWS = 5000, 100, 1000
DENSITY = 0.05
# name: label, settings of the selection; None trains all of W
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "full": ("full fine-tuning", None),
    "magnitude": ("magnitude", {"criterion": "magnitude"}),
    "gradient": ("gradient", {"criterion": "gradient"}),
    "random": ("random", {"criterion": "random"}),
    "lift-2": ("LIFT, R = 2", {"criterion": "lift", "lra_rank": 2}),
    "lift-8": ("LIFT, R = 8", {"criterion": "lift", "lra_rank": 8}),
    "lift-32": ("LIFT, R = 32", {"criterion": "lift", "lra_rank": 32}),
    "lift-8-smallest": ("LIFT smallest, R = 8", {"criterion": "lift", "lra_rank": 8, "keep": "smallest"}),
}
SEEDS = tuple(range(1, 11))
TUNING_SEEDS = (101, 102, 103)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MAX_STEPS, PATIENCE, EVERY = 1000, 100, 5


class Rows:
    """Inputs and both targets of one draw."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.x = torch.randn(count, INPUTS, generator=generator)

    def pretraining(self) -> Tensor:
        """(rows,) Y_pre."""
        return self.x[:, :32].sum(1) + 0.1 * self.x[:, 32:64].sin().sum(1)

    def finetuning(self) -> Tensor:
        """(rows,) Y_ft, as the top of the file reads it."""
        x = self.x
        return 0.2 * x[:, 64] * x[:, 65] * x[:, 66] + 0.1 * (x[:, 67] * x[:, 68]).sin()


class Toy(nn.Module):
    """relu(X W) a; `hidden.weight` is W transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(INPUTS, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows,) predictions."""
        return self.out(self.hidden(x).relu()).squeeze(-1)


@cache
def pretrained(seed: int) -> tuple[Toy, Rows, Rows, Rows]:
    """The model after pretraining, and the rows of fine-tuning, validation and test."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    rows, *others = (Rows(n, generator) for n in (PRETRAINING_ROWS, FINETUNING_ROWS, HELD_OUT_ROWS, HELD_OUT_ROWS))
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    best, state, waited = math.inf, model.state_dict(), 0
    target, validation = rows.pretraining(), others[1]
    for step in range(3000):
        loss = nn.functional.mse_loss(model(rows.x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            found = _loss(model, validation.x, validation.pretraining())
            best, state, waited = (
                (found, copy.deepcopy(model.state_dict()), 0) if found < best else (best, state, waited + 1)
            )
            if waited == 10:
                break
    model.load_state_dict(state)
    return model, *others


def finetune(method: str, lr: float, seed: int) -> Run:
    """One run, with what Fig. 14 shows of it."""
    model, rows, validation, test = pretrained(seed)
    model = copy.deepcopy(model)
    target = rows.finetuning()
    before = {"pretraining": _loss(model, test.x, test.pretraining()), "test": _loss(model, test.x, test.finetuning())}
    optimizer = _optimizer(model, method, lr, seed, rows)
    curves: dict[str, list[float]] = {name: [] for name in ("validation", "gradient_norm", "spectral_norm")}
    losses: list[float] = []
    best, best_step, state = math.inf, 0, model.state_dict()
    for step in range(MAX_STEPS):
        found = _loss(model, validation.x, validation.finetuning())
        if found < best:
            best, best_step, state = found, step, copy.deepcopy(model.state_dict())
        if step - best_step >= PATIENCE:
            break
        loss = nn.functional.mse_loss(model(rows.x), target)
        optimizer.zero_grad()
        loss.backward()
        norm = float(optimizer.clip_grad_norm_(math.inf))
        if step % EVERY == 0:
            curves["validation"].append(found)
            curves["gradient_norm"].append(norm)
            curves["spectral_norm"].append(float(torch.linalg.matrix_norm(model.hidden.weight.detach(), 2)))
        optimizer.step()
        losses.append(float(loss.detach()))
    model.load_state_dict(state)
    return {
        "method": method,
        "lr": lr,
        "before": {name: significant(value) for name, value in before.items()},
        "test": significant(_loss(model, test.x, test.finetuning())),
        "validation": significant(best),
        "pretraining_after": significant(_loss(model, test.x, test.pretraining())),
        "best_step": best_step,
        "losses": [significant(loss, 4) for loss in losses],
        "every": EVERY,
        "curves": {name: [significant(value, 4) for value in values] for name, values in curves.items()},
    }


def _optimizer(model: Toy, method: str, lr: float, seed: int, rows: Rows) -> SparseAdamW:
    weight, settings = model.hidden.weight, METHODS[method][1]
    if settings is None:
        groups = build_param_groups(model, target_modules=[], modules_to_train=["hidden"])
        return SparseAdamW(groups, lr=lr)
    nn.functional.mse_loss(model(rows.x), rows.finetuning()).backward()
    gradient, weight.grad = weight.grad, None
    model.out.weight.grad = None
    optimizer = SparseAdamW(build_param_groups(model, target_modules=["hidden"]), lr=lr)
    config = SelectionConfig(density=DENSITY, seed=seed, **settings)
    statistics = gradient if settings["criterion"] == "gradient" else None
    optimizer.set_indices(weight, select(weight, config, statistics=statistics).indices)
    return optimizer


@torch.no_grad()
def _loss(model: Toy, x: Tensor, y: Tensor) -> float:
    return float(nn.functional.mse_loss(model(x), y))


def cases(store: Store) -> list[tuple[str, str, float, int]]:
    """Name, method, rate and seed: all rates on the seeds of tuning, then the best on ten others."""
    tuning = [(method, lr, seed) for method in METHODS for lr in RATES for seed in TUNING_SEEDS]
    if all(store.has(name_of(*case)) for case in tuning):
        tuning += [(method, lr, seed) for method, lr in chosen_rates(store).items() for seed in SEEDS]
    return [(name_of(*case), *case) for case in tuning]


def name_of(method: str, lr: float, seed: int) -> str:
    """Of a run."""
    return f"{method}-lr{lr:g}-seed{seed}"


def chosen_rates(store: Store) -> dict[str, float]:
    """The rate of each method with the lowest mean validation loss on the seeds of tuning."""

    def mean(method: str, lr: float) -> float:
        return sum(store.load(name_of(method, lr, seed))["validation"] for seed in TUNING_SEEDS) / len(TUNING_SEEDS)

    return {method: min(RATES, key=lambda lr: mean(method, lr)) for method in METHODS}


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    store = Store(STUDY)
    for description in ("Choosing rates", "Ten seeds"):
        for name, method, lr, seed in track(cases(store), description):
            if not store.has(name):
                store.save(name, "python -m benchmarks.studies.toy", seed, finetune(method, lr, seed))


if __name__ == "__main__":
    main()
