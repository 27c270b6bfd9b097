"""How far the masks of both solvers agree with a float64 singular value decomposition. Some minutes on two cores.

    LIFT_SMOLLM2_DIR=path/to/SmolLM2-135M python benchmarks/bench_masks.py [--quick] [--out PATH]

Every targeted matrix of SmolLM2-135M, R from 16 to 128, K = 5% of the entries. The reference takes the best rank-R
approximation from a full decomposition in float64 and sorts all magnitudes, stably. Agreement is the share of its
entries that a mask has. "Cold" starts from nothing on the model as it was downloaded; "warm" starts from the basis of
that, on the model after some training with LIFT.

The subspace solver is forced, also where `auto` would take the exact one. Matrices on which it says that it did not
converge are counted, and are left out of the agreement. The disagreement is also given in units of the error that the
solver itself estimates. No rival here: the goals are for agreement itself.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from harness import Options, Row, options, progress, report, single
from smollm2 import load_model, load_tokens, matrices, train_a_while
from torch import Tensor

from lift_lightning import DecompositionError, Selection, SelectionConfig, select

DENSITY = 0.05
RANKS, QUICK_RANKS = (16, 32, 64, 128), (4, 8)
TRAINING = {"steps": 100, "tokens_per_step": 256, "rank": 32}
QUICK_TRAINING = {"steps": 2, "tokens_per_step": 16, "rank": 4}
# Lowest mean and lowest single agreement.
GOALS = {"exact": (0.9999, None), "subspace cold": (0.995, 0.98), "subspace warm": (0.998, 0.99)}
# An entry that the exact solver decides otherwise must lie this close to the threshold, relative to it.
THRESHOLD_GOAL = 1e-6


class Reference(NamedTuple):
    """The mask of the full decomposition: what it takes, all scores, and the lowest one that it takes."""

    chosen: Tensor
    scores: Tensor
    threshold: float


class Decomposition(NamedTuple):
    """All of a matrix in float64, so that every R comes from one decomposition."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Decomposition:
        """By LAPACK."""
        return cls(*torch.linalg.svd(weight.detach().double(), full_matrices=False))

    def reference(self, rank: int, k: int) -> Reference:
        """The k largest magnitudes of the rank-R approximation, of equal ones the first."""
        scores = ((self.left[:, :rank] * self.values[:rank]) @ self.right[:rank]).abs().flatten()
        order = scores.sort(descending=True, stable=True).indices[:k]
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[order] = True
        return Reference(chosen, scores, float(scores[order[-1]]))


@dataclass
class Tally:
    """One solver at one R: a number for each matrix, None where it did not converge."""

    agreement: list[float | None] = field(default_factory=list)
    error: list[float | None] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)

    def count(self, reference: Reference, selection: Selection | None) -> None:
        """Add a matrix."""
        if selection is None:
            self.agreement.append(None)
            self.error.append(None)
            return
        ours = torch.zeros_like(reference.chosen)
        ours[selection.indices] = True
        self.agreement.append(int((ours & reference.chosen).sum()) / int(reference.chosen.sum()))
        self.error.append(selection.solved[0].error)
        differing = reference.scores[ours != reference.chosen]
        away = (differing - reference.threshold).abs().max() / reference.threshold if differing.numel() else 0.0
        self.distance.append(float(away))

    def rows(self, solver: str, rank: int) -> list[Row]:
        """Mean and worst; for the exact solver also how far from the threshold it differs."""
        converged = [a for a in self.agreement if a is not None]
        mean_goal, worst_goal = GOALS[solver]
        samples: dict[str, list[Any]] = {"ours": self.agreement}
        extra: dict[str, Any] = {}
        if solver != "exact":
            samples["error"] = self.error
            per_error = [
                (1 - a) / e for a, e in zip(self.agreement, self.error, strict=True) if a is not None and e is not None
            ]
            extra = {"not converged": len(self.agreement) - len(converged)}
            if per_error:
                extra["disagreement / estimated error: mean"] = statistics.mean(per_error)
                extra["the same: max"] = max(per_error)
        what = f"R = {rank}, {solver}"
        mean = statistics.mean(converged) if converged else None
        worst = min(converged, default=None)
        rows = [
            single(f"{what}: mean agreement", mean, samples, better="higher", goal=mean_goal, extra=extra),
            single(f"{what}: worst agreement", worst, samples, better="higher", goal=worst_goal),
        ]
        if solver == "exact":
            distances = {"ours": self.distance}
            what = f"{what}: farthest differing entry from the threshold, relative"
            rows.append(single(what, max(self.distance), distances, better="lower", goal=THRESHOLD_GOAL))
        return rows


def try_select(weight: Tensor, rank: int, basis: Tensor | None = None) -> Selection | None:
    """By the subspace solver; None where it does not converge."""
    try:
        return select(weight, SelectionConfig(density=DENSITY, lra_rank=rank, solver="subspace"), basis=basis)
    except DecompositionError:
        return None


def main(chosen: Options) -> None:
    """Measure and report."""
    ranks = QUICK_RANKS if chosen.quick else RANKS
    training = QUICK_TRAINING if chosen.quick else TRAINING
    model = load_model(chosen.quick)
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    bases: dict[tuple[str, int], Tensor | None] = {}
    for name, weight in progress(matrices(model).items(), "before training"):
        decomposition = Decomposition.of(weight)
        for rank in ranks:
            exact = SelectionConfig(density=DENSITY, lra_rank=rank, solver="exact")
            reference = decomposition.reference(rank, exact.budget(*weight.shape))
            tallies["exact", rank].count(reference, select(weight, exact))
            cold = try_select(weight, rank)
            tallies["subspace cold", rank].count(reference, cold)
            bases[name, rank] = cold.basis if cold else None
    train_a_while(model, load_tokens(chosen.quick), **training)
    for name, weight in progress(matrices(model).items(), "after training"):
        decomposition = Decomposition.of(weight)
        for rank in ranks:
            k = SelectionConfig(density=DENSITY).budget(*weight.shape)
            warm = None if bases[name, rank] is None else try_select(weight, rank, bases[name, rank])
            tallies["subspace warm", rank].count(decomposition.reference(rank, k), warm)
    rows = [row for rank in ranks for solver in GOALS for row in tallies[solver, rank].rows(solver, rank)]
    shapes = {name: list(weight.shape) for name, weight in matrices(model).items()}
    report(chosen, rows, {"density": DENSITY, "ranks": ranks, "training": training, "matrices": shapes})


if __name__ == "__main__":
    main(options("masks", __doc__))
