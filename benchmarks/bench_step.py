"""Time of what follows the backward pass: gather, clip, update, scatter. Some minutes on two cores.

    LIFT_SMOLLM2_DIR=path/to/SmolLM2-135M python benchmarks/bench_step.py [--quick] [--out PATH]

LIFT at r = 32 on the matrices of SmolLM2-135M, with dense gradients that are there already: it picks the selected
entries out of them, clips, and steps. The rival is `clip_grad_norm_` and fused AdamW on the same matrices with the same
gradients. In training the picking happens during the backward pass; here it is counted with the step.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from harness import SEED, Options, alternate, compare, options, report, single
from methods import ADAMW, CLIP, Method, lift
from smollm2 import load_model
from torch import Tensor, nn

RANK, QUICK_RANK = 32, 4
REPEATS = 15
GOAL = 0.7


class SparseSide:
    """What LIFT does between two backward passes, and the seconds of its parts."""

    def __init__(self, method: Method, gradients: list[Tensor]) -> None:
        self.optimizer = method.sparse_optimizer
        self.gradients = gradients
        self.parts: dict[str, list[float]] = defaultdict(list)

    def put_gradients(self) -> None:
        """The optimizer drops them when it has picked."""
        for (_, parameter, _), gradient in zip(self.optimizer.sparse_parameters(), self.gradients, strict=True):
            parameter.grad = gradient

    def run(self) -> None:
        """One step."""
        self._timed("gather", self.optimizer.gradients)
        self._timed("clip", lambda: self.optimizer.clip_grad_norm_(CLIP))
        self._timed("update and scatter", self.optimizer.step)
        self.optimizer.zero_grad()

    def _timed(self, part: str, run: Callable[[], object]) -> None:
        started = time.perf_counter()
        run()
        self.parts[part].append(time.perf_counter() - started)


class DenseSide:
    """The same in full, on copies of the same matrices and gradients."""

    def __init__(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        self.parameters = [nn.Parameter(weight.detach().clone()) for weight in weights]
        self.gradients = gradients
        self.buffers = [gradient.clone() for gradient in gradients]  # clipping writes to them
        self.optimizer = torch.optim.AdamW(self.parameters, **ADAMW, fused=True)

    def put_gradients(self) -> None:
        """As they were before the last clipping, so that both sides have the same ones in every run."""
        for parameter, buffer, gradient in zip(self.parameters, self.buffers, self.gradients, strict=True):
            parameter.grad = buffer.copy_(gradient)

    def run(self) -> None:
        """One step."""
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(chosen: Options) -> None:
    """Measure and report."""
    rank, repeats = QUICK_RANK if chosen.quick else RANK, chosen.times(REPEATS)
    method, found = lift(load_model(chosen.quick), rank)
    weights = [parameter for _, parameter, _ in method.sparse_optimizer.sparse_parameters()]
    generator = torch.Generator().manual_seed(SEED)
    gradients = [torch.randn(weight.shape, generator=generator) for weight in weights]
    sparse, dense = SparseSide(method, gradients), DenseSide(weights, gradients)
    samples = alternate(
        {"ours": sparse.run, "rival": dense.run},
        repeats,
        "steps",
        before={"ours": sparse.put_gradients, "rival": dense.put_gradients},
    )
    what = "clip and update of all matrices, against fused AdamW on all entries"
    rows = [compare(what, samples["ours"], samples["rival"], better="lower", goal=GOAL)]
    for part, seconds in sparse.parts.items():
        measured = seconds[-repeats:]  # not the warm-up's
        middle = statistics.median(measured)
        rows.append(single(f"of ours: {part}", middle, {"ours": measured}, better="lower", unit="s"))
    settings = {"rank": rank, "repeats": repeats, "clip": CLIP, "adamw": ADAMW, "density": found.density}
    report(chosen, rows, {**settings, "matrices": len(weights), "entries": found.entries})


if __name__ == "__main__":
    main(options("step", __doc__))
