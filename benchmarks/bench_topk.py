"""Time to find the K largest of many scores, against torch.topk and against a kthvalue. Some minutes on two cores.

    python benchmarks/bench_topk.py [--quick] [--out PATH]

`lift_lightning.indices.top_k_indices` against `torch.topk` with its default of a sorted result, which is what the
released code calls, and against the k-th value and all that lies above it. Scores are half-normal, the magnitudes of
normal weights; the worst case has sixteen different values only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from harness import SEED, Options, Row, alternate, compare, options, report
from torch import Tensor

from lift_lightning.indices import top_k_indices

REPEATS = 7
GOAL = 5.0


class Case(NamedTuple):
    """Scores of one shape, of which `k` are looked for."""

    what: str
    shape: tuple[int, int]
    k: int
    ties: bool = False
    goal: float | None = None

    def scores(self) -> Tensor:
        """The same at every call."""
        generator = torch.Generator().manual_seed(SEED)
        if self.ties:
            return torch.randint(0, 16, self.shape, generator=generator).float()
        return torch.randn(self.shape, generator=generator).abs_()


FULL_SIZE = (
    Case("16.7M scores, K = 1M", (4096, 4096), 1_000_000, goal=GOAL),
    Case("4096 x 11008, K = 5%", (4096, 11008), round(0.05 * 4096 * 11008)),
    Case("1536 x 576, K = 5%", (1536, 576), round(0.05 * 1536 * 576)),
    Case("16.7M scores of 16 values, K = 1M", (4096, 4096), 1_000_000, ties=True),
)
QUICK = (
    Case("65,536 scores, K = 4,000", (256, 256), 4_000, goal=GOAL),
    Case("65,536 scores of 16 values, K = 4,000", (256, 256), 4_000, ties=True),
)


def by_kthvalue(scores: Tensor, k: int) -> Tensor:
    """Ascending flat indices of the k largest, of equal ones the lower."""
    flat = scores.flatten()
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    chosen = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().squeeze(1)


def measure(case: Case, repeats: int) -> list[Row]:
    """One row for each rival."""
    scores = case.scores()
    finders: dict[str, Any] = {
        "ours": lambda: top_k_indices(scores, case.k),
        "torch.topk": lambda: torch.topk(scores.flatten(), case.k).indices,
        "kthvalue": lambda: by_kthvalue(scores, case.k),
    }
    found = [scores.flatten()[find()].sort().values for find in finders.values()]
    if not all(torch.equal(found[0], other) for other in found[1:]):
        raise RuntimeError(f"{case.what}: the ways differ in what they find, so their times cannot be compared")
    samples = alternate(finders, repeats, case.what)
    ours, goals = samples.pop("ours"), {"torch.topk": case.goal}
    return [
        compare(f"{case.what}, against {rival}", ours, theirs, better="higher", goal=goals.get(rival))
        for rival, theirs in samples.items()
    ]


def main(chosen: Options) -> None:
    """Measure and report."""
    cases, repeats = QUICK if chosen.quick else FULL_SIZE, chosen.times(REPEATS)
    rows = [row for case in cases for row in measure(case, repeats)]
    report(chosen, rows, {"repeats": repeats, "cases": [case._asdict() for case in cases]})


if __name__ == "__main__":
    main(options("topk", __doc__))
