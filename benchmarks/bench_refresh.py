"""Time and memory of a mask refresh, against the released code's way. Some minutes on two cores.

    LIFT_SMOLLM2_DIR=path/to/SmolLM2-135M python benchmarks/bench_refresh.py [--quick] [--out PATH]

1. All matrices of SmolLM2-135M, at r = R = 32 and 128: the first refresh, and a later one, which starts from the bases
   of the first after some training.
2. One matrix of the size of LLaMA-2-7B's with a power-law spectrum, K = 5%, R = 128: cold, and warm after a change of
   its selected entries.
3. Memory that a warm selection takes beside the weight, in units of the matrix in float32. Linux only.
4. The share of a run's time that refreshing every 200 steps takes.

The rival is a full singular value decomposition in float32, the product of its leading R parts, and torch.topk of the
magnitudes. Where its first run takes more than half a minute, that run is its only one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import SEED, Options, Row, alternate, compare, options, progress, report, single
from methods import ADAMW, Step
from resident_memory import in_fresh_process, peak_above
from smollm2 import batches, load_model, load_tokens, matrices, train_a_while
from torch import Tensor
from transformers import PreTrainedModel

from lift_lightning import RefreshReport, SelectionConfig, SparseAdamW, build_param_groups, refresh_masks, select

REPEATS = 5
FIRST_GOAL, LATER_GOAL = 6.0, 10.0
COLD_GOAL, WARM_GOAL = 10.0, 50.0
MEMORY_GOAL = 2.5
SHARE_GOAL = 0.01
INTERVAL = 200
DENSITY = 0.05
# Standard deviation of the change of a selected entry, in those of the matrix.
CHANGE = 0.005
# Imported before a process is forked, so that no import is counted.
PRELOAD = ("lift_lightning.refresh", "transformers.models.llama.modeling_llama")


class Sizes(NamedTuple):
    """How large everything is."""

    ranks: tuple[int, ...]
    training: dict[str, int]
    square: tuple[int, int]
    wide: tuple[int, int]
    lra_rank: int
    batch: tuple[int, int]


FULL_SIZE = Sizes((32, 128), {"steps": 100, "tokens_per_step": 256}, (4096, 4096), (4096, 11008), 128, (4, 128))
QUICK = Sizes((4, 8), {"steps": 2, "tokens_per_step": 16}, (288, 288), (288, 512), 8, (2, 16))


def released(weight: Tensor, rank: int, k: int) -> Tensor:
    """The entries that are largest after the rank-R approximation, as the released code computes them."""
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    scores = ((left[:, :rank] * values[:rank]) @ right[:rank]).abs()
    return torch.topk(scores.flatten(), k).indices


# ---------------------------------------------------------------- a whole model


def refresh_rows(model: PreTrainedModel, tokens: Tensor, rank: int, sizes: Sizes, repeats: int) -> list[Row]:
    """The first refresh, a later one, and what share of a run refreshing takes."""
    config = SelectionConfig(rank=rank, lra_rank=rank)
    weights = list(matrices(model).values())
    what = f"all matrices, r = R = {rank}"

    def against_released(label: str, refresh: Callable[[], RefreshReport], goal: float) -> Row:
        def rival() -> None:
            for weight in weights:
                released(weight, rank, config.budget(*weight.shape))

        samples = alternate({"ours": refresh, "rival": rival}, repeats, label)
        found = refresh()
        solved = ", ".join(f"{count} {solver}" for solver, count in found.solvers.items())
        extra = {"solved by": solved, "estimated error": found.error}
        return compare(label, samples["ours"], samples["rival"], better="higher", goal=goal, extra=extra)

    untrained = SparseAdamW(build_param_groups(model))
    first = against_released(f"{what}: first", lambda: refresh_masks(untrained, config), FIRST_GOAL)
    method, bases = train_a_while(model, tokens, **sizes.training, rank=rank)
    again = partial(refresh_masks, method.sparse_optimizer, config, bases=bases)
    later = against_released(f"{what}: later", again, LATER_GOAL)
    goal = SHARE_GOAL if rank == sizes.ranks[0] else None
    return [first, later, refresh_share(what, later.samples["ours"], Step(method), tokens, sizes.batch, repeats, goal)]


def refresh_share(
    what: str,
    refresh: list[float],
    step: Step,
    tokens: Tensor,
    batch: tuple[int, int],
    repeats: int,
    goal: float | None,
) -> Row:
    """A later refresh in units of the INTERVAL steps that it is there for."""
    source = batches(tokens, *batch)
    steps = alternate({"step": lambda: step(next(source))}, repeats, f"{what}: steps")["step"]
    share = statistics.median(refresh) / (INTERVAL * statistics.median(steps))
    label = f"{what}: later refresh / {INTERVAL} steps of {batch[0] * batch[1]} tokens"
    return single(label, share, {"ours": refresh, "step": steps}, better="lower", goal=goal)


# ---------------------------------------------------------------- one large matrix


def power_law_matrix(rows: int, columns: int) -> Tensor:
    """Singular vectors at random, the i-th singular value i ** -0.5; rows <= columns."""
    generator = torch.Generator().manual_seed(SEED)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T
    return (left * torch.arange(1, rows + 1) ** -0.5) @ right


class Later(NamedTuple):
    """A matrix that was trained since it was last decomposed, and the basis of then."""

    weight: Tensor
    basis: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, config: SelectionConfig) -> Later:
        """After noise on the selected entries as large as what some hundred steps change."""
        selection = select(weight, config)
        generator = torch.Generator().manual_seed(SEED)
        noise = torch.randn(selection.indices.numel(), generator=generator) * CHANGE * weight.std()
        trained = weight.clone()
        trained.view(-1)[selection.indices] += noise
        return cls(trained, selection.basis)


def matrix_rows(later: Later, config: SelectionConfig, goals: dict[str, float], repeats: int) -> list[Row]:
    """A cold and a warm selection, in turn with the rival."""
    weight, what = later.weight, " x ".join(map(str, later.weight.shape))
    runs: dict[str, Callable[[], Any]] = {
        "warm": lambda: select(weight, config, basis=later.basis),
        "cold": lambda: select(weight, config),
        "rival": lambda: released(weight, config.approximation_rank, config.budget(*weight.shape)),
    }
    samples = alternate(runs, repeats, what)
    rows = []
    for label in ("cold", "warm"):
        solved = runs[label]().solved[0]
        extra = {"solved by": solved.solver, "estimated error": solved.error}
        goal = goals.get(label)
        title = f"{what}, R = {config.approximation_rank}: {label}"
        rows.append(compare(title, samples[label], samples["rival"], better="higher", goal=goal, extra=extra))
    return rows


def memory_rows(later: Later, config: SelectionConfig, repeats: int, threads: int) -> list[Row]:
    """Peak of a warm selection beside the weight, for a weight in float32 and in bfloat16."""
    rows = []
    what = " x ".join(map(str, later.weight.shape))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "later.pt"
        torch.save(tuple(later), file)
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{what} in {str(dtype).removeprefix('torch.')}: peak of a warm selection"
            units = [
                in_fresh_process(selection_peak, file, dtype, config, threads, preload=PRELOAD) / later.weight.nbytes
                for _ in progress(range(repeats), label)
            ]
            middle, samples = statistics.median(units), {"ours": units}
            rows.append(single(label, middle, samples, better="lower", goal=MEMORY_GOAL, unit="float32 matrices"))
    return rows


def selection_peak(file: Path, dtype: torch.dtype, config: SelectionConfig, threads: int) -> int:
    """Bytes; runs in a process of its own."""
    torch.set_num_threads(threads)
    select(power_law_matrix(512, 512), config)  # loads the libraries' code, which is no working memory
    weight, basis = torch.load(file)
    weight = weight.to(dtype)
    return peak_above(lambda: select(weight, config, basis=basis))


# ---------------------------------------------------------------- all of it


def main(chosen: Options) -> None:
    """Measure and report."""
    sizes, repeats = QUICK if chosen.quick else FULL_SIZE, chosen.times(REPEATS)
    tokens = load_tokens(chosen.quick)
    rows = [row for rank in sizes.ranks for row in refresh_rows(load_model(chosen.quick), tokens, rank, sizes, repeats)]
    config = SelectionConfig(density=DENSITY, lra_rank=sizes.lra_rank)
    square = Later.of(power_law_matrix(*sizes.square), config)
    rows += matrix_rows(square, config, {"cold": COLD_GOAL, "warm": WARM_GOAL}, repeats)
    wide = Later.of(power_law_matrix(*sizes.wide), config)
    rows += matrix_rows(wide, config, {"warm": WARM_GOAL}, repeats)
    rows += memory_rows(wide, config, repeats, chosen.threads)
    settings = {"repeats": repeats, "interval": INTERVAL, "density": DENSITY, "change": CHANGE, "optimizer": ADAMW}
    report(chosen, rows, {**settings, **sizes._asdict()})


if __name__ == "__main__":
    main(options("refresh", __doc__))
