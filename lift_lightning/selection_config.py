"""What is to be selected: the settings of a selection, and how many entries they ask for.

Letters: M, N rows and columns of one matrix; K selected entries of it; R rank of the low-rank approximation; r budget
rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lift_lightning.errors import ConfigError
from lift_lightning.lowrank import DEFAULT_TOLERANCE, Directions, Solver

Criterion = Literal["lift", "magnitude", "gradient", "movement", "random"]
Keep = Literal["largest", "smallest"]
DensityOf = Literal["targets", "model"]
Allocation = Literal["each", "global", "energy", "effective_rank", "hard_threshold"]

DEFAULT_RANK = 128  # the paper's budget for most of its experiments


@dataclass(frozen=True)
class SelectionConfig:
    """How the entries of each targeted matrix are chosen and how many there are.

    Args:
        criterion: `lift` scores an entry by its magnitude after the rank-R approximation (paper, Algorithm 1),
            `magnitude` by its own magnitude, `gradient` by its gradient, `movement` by -w * gradient, which is large
            where training would carry the entry away from zero (arXiv 2005.07683), `random` by chance. Gradients are
            those of `gradient_batches` batches, taken before the selection.
        rank: r, the budget of each matrix as a LoRA rank: K = min(r * (M + N), M * N). 128 if neither this nor
            `density` or `count` is given.
        density: the budget as a share of the entries instead, above 0 and up to 1.
        density_of: whose entries `density` is a share of: the targeted matrices', or the whole model's.
        count: the budget as a number of entries instead, over all targeted matrices together; each has its share by
            its size, unless `allocation` says otherwise. For `select`, of the one weight.
        allocation: how the budget is divided among the matrices, once, before the first selection. `each` gives every
            matrix what `rank` or `density` says. `global` takes the best scores of all matrices together. The others
            let each matrix have an R of its own, found from its singular values, and K in proportion to R * (M + N):
            `energy` the smallest R that holds a share `energy` of their squares, `effective_rank` the exponential of
            their entropy (Roy & Vetterli 2007), `hard_threshold` those above the optimal threshold for noise of
            unknown strength (Gavish & Donoho 2014). The sum is that of `each`, to the entry.
        floor: share of what it would have by its size alone that every matrix keeps, of 0 to 1; not for `each`.
        energy: of the allocation `energy`.
        lra_rank: R, the rank of the approximation. The same as `rank` if not given (paper, App. G.8: R near r works
            best), 128 with `density` or `count`. R of min(M, N) or more means the matrix itself, so plain magnitude.
        directions: which of the singular directions make the approximation: the R `largest` (the paper's method), the R
            `smallest`, R at `random`, or `hybrid`, half of them the largest and half the smallest (paper, App. B.2).
            Others than the largest need the exact solver.
        keep: `largest` is the paper's method; `smallest` reproduces the entries that the released code picks.
        solver: how the approximation is computed: `exact`, `subspace`, or `auto`, which chooses by size; see
            `low_rank_factors`.
        tolerance: of the subspace solver, about the share of the mask that may differ from the exact one.
        block: (b, c) selects whole blocks of b rows and c columns (LIFT_Structured, App. G.7: 4, 4); -1 stands for the
            whole side, so that (1, -1) are rows and (-1, 1) columns. A block's score is the sum of squares, and the
            plain sum of scores that are squares or have a sign. K is rounded down to whole blocks, at least one.
        gradient_power: 1 scores by the magnitude of the summed gradient (SIFT, arXiv 2312.11875), 2 by the sum of the
            batches' squared gradients (empirical Fisher information, FISH, arXiv 2111.09839).
        gradient_batches: n, over which `gradient` and `movement` accumulate; the Trainer's batches, drawn anew for each
            selection.
        seed: of the `random` criterion, of `random` directions, and of the batches.

    Raises:
        ConfigError: if a value is out of its range, or more than one of `rank`, `density` and `count` is given, or two
            settings contradict each other.
    """

    criterion: Criterion = "lift"
    rank: int | None = None
    density: float | None = None
    density_of: DensityOf = "targets"
    count: int | None = None
    allocation: Allocation = "each"
    floor: float = 0.1
    energy: float = 0.9
    lra_rank: int | None = None
    directions: Directions = "largest"
    keep: Keep = "largest"
    solver: Solver = "auto"
    tolerance: float = DEFAULT_TOLERANCE
    block: tuple[int, int] | None = None
    gradient_power: Literal[1, 2] = 1
    gradient_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("rank", "density", "count")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            values = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ConfigError(f"{values} both set the budget: give one and leave the other null")
        for name in ("rank", "lra_rank", "count", "gradient_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("density", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, got {value}")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor must be between 0 and 1, got {self.floor}")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance must be above 0 and below 1, got {self.tolerance}")
        if self.density_of == "model" and self.density is None:
            raise ConfigError("density_of='model' needs a density")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                named = ", ".join(str(choice) for choice in get_args(choices))
                raise ConfigError(f"{name} must be one of {named}, got {getattr(self, name)!r}")
        if self.block is not None and (len(self.block) != 2 or any(size < 1 and size != -1 for size in self.block)):
            raise ConfigError(
                f"block must be two positive sizes, rows and columns, or -1 for a whole side, got {self.block}"
            )
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.directions != "largest" and self.criterion != "lift":
            raise ConfigError(f"directions={self.directions} is of the criterion lift, not of {self.criterion}")
        if self.directions != "largest" and self.solver == "subspace":
            raise ConfigError(
                f"the subspace solver finds the largest directions only, not directions={self.directions}: set solver "
                "to auto or exact"
            )
        if self.allocation in ADAPTIVE and self.criterion != "lift":
            raise ConfigError(
                f"allocation={self.allocation} divides by the ranks of the criterion lift, not of {self.criterion}: "
                "set allocation to each or global"
            )
        if self.allocation in ADAPTIVE and self.lra_rank is not None:
            raise ConfigError(
                f"lra_rank={self.lra_rank} and allocation={self.allocation} both set the rank of the approximation: "
                "leave lra_rank null"
            )
        if self.allocation == "global" and self.block is not None:
            raise ConfigError(f"allocation=global ranks single entries, not blocks: leave block={self.block} null")

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion looks at gradients."""
        return self.criterion in ("gradient", "movement")

    @property
    def divides(self) -> bool:
        """Whether each matrix has a budget of its own that must be found first (see `allocation`)."""
        return self.count is not None or self.allocation != "each"

    @property
    def approximation_rank(self) -> int:
        """R, with its default filled in."""
        return self.lra_rank or self.rank or DEFAULT_RANK

    def budget(self, rows: int, columns: int) -> int:
        """K for an M x N matrix, before it is rounded to blocks.

        Raises:
            ValueError: if the density is still a share of the whole model; see `of_targets`.
        """
        if self.count is not None:
            return min(self.count, rows * columns)
        if self.density is None:
            return min((self.rank or DEFAULT_RANK) * (rows + columns), rows * columns)
        if self.density_of == "model":
            raise ValueError(
                "a density of the model's entries must be turned into one of the targets': call of_targets"
            )
        return max(1, min(round(self.density * rows * columns), rows * columns))

    def of_targets(self, target_entries: int, model_entries: int) -> SelectionConfig:
        """The same budget with `density` counted over the targeted matrices, as `select` needs it.

        Raises:
            ConfigError: if that is more than the targeted matrices hold.
        """
        if self.count is not None and self.count > target_entries:
            raise ConfigError(f"count={self.count} is more than the {target_entries} entries of the targeted matrices")
        if self.density is None or self.density_of == "targets":
            return self
        density = self.density * model_entries / target_entries
        if density > 1:
            raise ConfigError(
                f"density={self.density} of the model's {model_entries} entries is more than the {target_entries} that "
                f"the targeted matrices hold; the most is {target_entries / model_entries:.4f}"
            )
        return replace(self, density=density, density_of="targets")


ADAPTIVE = ("energy", "effective_rank", "hard_threshold")
CHOICES = {
    "criterion": Criterion,
    "directions": Directions,
    "keep": Keep,
    "solver": Solver,
    "density_of": DensityOf,
    "allocation": Allocation,
    "gradient_power": Literal[1, 2],
}
