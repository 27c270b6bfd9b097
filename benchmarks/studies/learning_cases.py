"""What study 4 runs: methods, learning rates, seeds, and LIFT's settings one by one.

Every case has a name that its settings give, so that a run which several questions need is run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.studies.records import Run, Store

# What LIFT trains at rank 8. The others train as many numbers, or fewer where a rank's step does not allow more.
BUDGET = 143_360
METHODS: dict[str, tuple[str, str, dict[str, object]]] = {
    # name: label, file of configs/methods/, settings
    "full": ("full fine-tuning", "full", {}),
    # AdamW on every entry of the matrices that the others train; "full" has embeddings and norms besides.
    "full-matrices": (
        "full, matrices only",
        "magnitude",
        {"lift.rank": "null", "lift.density": 1.0, "lift.interval": "null"},
    ),
    "lora": ("LoRA", "lora", {}),
    "dora": ("DoRA", "dora", {}),
    "pissa": ("PiSSA", "pissa", {}),
    "spectral": ("Spectral Adapter", "spectral", {}),
    "lift": ("LIFT", "lift", {}),
    "lift-smallest": ("LIFT smallest", "lift-smallest", {}),
    "lift-mlp": ("LIFT_MLP", "lift-mlp", {"lift.rank": "null", "lift.count": BUDGET}),
    "lift-structured": ("LIFT_Structured", "lift-structured", {}),
    "lift-adaptive": ("adaptive LIFT", "lift-adaptive", {}),
    "magnitude": ("magnitude", "magnitude", {}),
    "gradient": ("gradient", "gradient", {}),
    "random": ("random", "random", {}),
}
# The first grid was every second one of these. Its end was then the best rate of most that train entries, and its steps
# so wide that the best rate had lost the source already, so it was made twice as fine and longer, for all alike.
RATES = (3e-4, 5.5e-4, 1e-3, 1.7e-3, 3e-3, 5.5e-3, 1e-2, 1.8e-2)
# At the rate that is best for the target alone nearly all of the source is lost. So the methods are also compared where
# they have learned this much of it: on both sides, at two neighbours of the grid. Decided after the first grid was run.
LEARNED = 0.85
# LIFT's settings are varied at this rate and not at the best one, where nothing of the source is left to be compared.
VARIANT_RATE = 3e-3
# What changes the number of entries, or where they all lie, wants other rates: one seed at some.
SIZE_RATES = {"component": (1e-2, 1.8e-2), "density": (1.7e-3, 3e-3, 1e-2)}
SIZE_SEED = 1
# What most people ask for: more seeds around the level, and README's table.
HEADLINE = ("full", "lora", "dora", "pissa", "lift", "magnitude", "random")
TUNING_SEED, SEEDS, FEWER_SEEDS = 0, (1, 2, 3, 4, 5), (1, 2, 3)

COMPONENTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COMPONENT_BUDGET = 65_536  # in each; half of k_proj's entries, a tenth of up_proj's
INTERVALS = (5, 20, 100)
DIRECTIONS = ("smallest", "random", "hybrid")
LRA_RANKS = (2, 4, 8, 32, 64, 128, 256)  # 16 as it is; k_proj and v_proj have 128 rows, all others 256
DENSITIES = (0.01, 0.02, 0.1, 0.2)
HEAT_RANKS, HEAT_LRA_RANKS, HEAT_SEEDS = (2, 8, 32), (4, 16, 64), (1,)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        method: key of `METHODS`.
        lr: peak learning rate.
        seed: of everything random.
        variant: what differs from the method, in a word or two; empty for the method itself.
        options: that make it so.
        tuning: whether it serves to choose the rate, and is tested on validation questions.
    """

    method: str
    lr: float
    seed: int
    variant: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    tuning: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        parts = [self.method, self.variant, f"lr{self.lr:g}", "tuning" if self.tuning else f"seed{self.seed}"]
        return "-".join(part for part in parts if part)


def tuning_cases(methods: Iterable[str] = METHODS, rates: Iterable[float] = RATES) -> list[Case]:
    """Every method at every rate."""
    return [Case(method, lr, TUNING_SEED, tuning=True) for method in methods for lr in rates]


def main_cases(rates: Mapping[str, float], seeds: Iterable[int] = SEEDS) -> list[Case]:
    """Every method at its own rate, seed after seed."""
    return [Case(method, rates[method], seed) for seed in seeds for method in METHODS if method in rates]


def lift_variants() -> dict[str, list[tuple[str, dict[str, object]]]]:
    """LIFT's settings, one changed at a time: question, and for each value its name and options."""
    return {
        "interval": [("fixed", {"lift.interval": "null"})]
        + [(f"interval{n}", {"lift.interval": n}) for n in INTERVALS],
        "directions": [(f"directions-{name}", {"lift.directions": name}) for name in DIRECTIONS],
        "lra_rank": [(f"lra{r}", {"lift.lra_rank": r}) for r in LRA_RANKS],
    }


def size_variants() -> dict[str, list[tuple[str, dict[str, object]]]]:
    """Where the entries lie, and how many they are."""
    return {
        "component": [
            (name, {"model.target_modules": name, "lift.rank": "null", "lift.count": COMPONENT_BUDGET})
            for name in COMPONENTS
        ],
        "density": [(f"density{d:g}", {"lift.rank": "null", "lift.density": d}) for d in DENSITIES],
    }


def heat_variants() -> list[tuple[str, dict[str, object]]]:
    """Rank of the approximation against rank of the budget; the middle row is among the LRA ranks already."""
    return [
        (f"rank{r}-lra{lra}", {"lift.rank": r, "lift.lra_rank": lra})
        for r in HEAT_RANKS
        for lra in HEAT_LRA_RANKS
        if r != 8
    ]


def variant_cases(lr: float = VARIANT_RATE, seeds: Iterable[int] = FEWER_SEEDS) -> list[Case]:
    """What is varied at one rate, and LIFT as it is, seed after seed."""
    variants = [("", {}), *(variant for values in lift_variants().values() for variant in values)]
    found = []
    for seed in seeds:
        found += [Case("lift", lr, seed, name, options) for name, options in variants]
        if seed in HEAT_SEEDS:
            found += [Case("lift", lr, seed, name, options) for name, options in heat_variants()]
    return found


def size_cases() -> list[Case]:
    """What is varied at two or three rates."""
    return [
        Case("lift", lr, SIZE_SEED, name, options)
        for question, values in size_variants().items()
        for name, options in values
        for lr in SIZE_RATES[question]
    ]


def all_cases(store: Store) -> list[Case]:
    """What is known to be run so far, in order: rates first, since the rest needs them; one seed of a setting first."""
    found = tuning_cases()
    if all(store.has(case.name) for case in found):
        rates = chosen_rates(store)
        found += main_cases(rates, FEWER_SEEDS)
        found += [case for seed in FEWER_SEEDS for method in METHODS for case in bracket_cases(store, method, seed)]
        found += main_cases(rates) + variant_cases(seeds=FEWER_SEEDS[:1])
        found += [
            case for method in METHODS for seed in level_seeds(method) for case in bracket_cases(store, method, seed)
        ]
        found += size_cases() + variant_cases()
    return list({case.name: case for case in found}.values())


def chosen_rates(store: Store) -> dict[str, float]:
    """Of each method whose grid is done: the rate with the best validation accuracy, then with the lowest loss."""
    found: dict[str, float] = {}
    for method in METHODS:
        cases = tuning_cases([method])
        if all(store.has(case.name) for case in cases):
            found[method] = min((store.load(case.name) for case in cases), key=_rating)["lr"]
    return found


def brackets(store: Store, level: float = LEARNED) -> dict[str, tuple[float, float]]:
    """Of each method whose grid is done and reaches a level of the target: the rate below, and the lowest that does.

    Of a method that does at the lowest rate already, that and the next.
    """
    found: dict[str, tuple[float, float]] = {}
    for method in chosen_rates(store):
        reached = [store.load(case.name)["accuracy"]["target"] >= level for case in tuning_cases([method])]
        if any(reached):
            first = max(reached.index(True), 1)
            found[method] = (RATES[first - 1], RATES[first])
    return found


def level_seeds(method: str) -> tuple[int, ...]:
    """What a method is run with around the level: five for those that are asked for most, three for the others."""
    return SEEDS if method in HEADLINE else FEWER_SEEDS


def bracket_cases(store: Store, method: str, seed: int, level: float = LEARNED) -> list[Case]:
    """A fresh seed on both sides of a level of the target, by rising rate.

    At the two rates that the run for tuning says; then one step up the grid as long as this seed has not reached it,
    one step down as long as it has, so that it lies between neighbours of the grid for each seed.
    """
    around = brackets(store, level).get(method)
    if around is None:
        return []
    low, high = (RATES.index(lr) for lr in around)
    while high + 1 < len(RATES) and _reached(store, Case(method, RATES[high], seed), level) is False:
        high += 1
    while low > 0 and _reached(store, Case(method, RATES[low], seed), level):
        low -= 1
    return [Case(method, lr, seed) for lr in RATES[low : high + 1]]


def _reached(store: Store, case: Case, level: float) -> bool | None:
    """None of what has not been run."""
    return store.load(case.name)["accuracy"]["target"] >= level if store.has(case.name) else None


def _rating(run: Run) -> tuple[float, float]:
    loss = run["loss"]["target"]
    return -run["accuracy"]["target"], float("inf") if loss is None else loss
