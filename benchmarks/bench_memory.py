"""Peak memory of training: LIFT against LoRA and against full fine-tuning. Some minutes on two cores.

    LIFT_SMOLLM2_DIR=path/to/SmolLM2-135M python benchmarks/bench_memory.py [--quick] [--out PATH]

Each method in a fresh process, in turn: load SmolLM2-135M in float32, then set the method up (LIFT's first refresh is
part of that) and take three steps of 4 x 128 tokens. Counted is what is resident at the peak above the loaded model.
The same once more with gradient checkpointing on all sides, and once more without head and logits, whose memory is the
same for all and hides what differs. Last, what each method keeps between steps: state, gradients, adapters. Linux only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from harness import SEED, Options, compare, options, progress, report
from methods import Step, body_loss, language_model_loss, method
from resident_memory import in_fresh_process, peak_above
from smollm2 import batches, load_model, load_tokens

from lift_lightning.models import checkpoint_activations

RANK, QUICK_RANK = 32, 4
REPEATS = 5
STEPS = 3
SHAPE, QUICK_SHAPE = (4, 128), (4, 16)
RIVALS = {"lora": "LoRA", "full": "full fine-tuning"}
GOAL = 0.6
MIB = 2**20
# Imported before a process is forked, so that no import is counted.
PRELOAD = ("lift_lightning.optimizer", "peft", "transformers.models.llama.modeling_llama")


class Variant(NamedTuple):
    """One way of running all three methods."""

    what: str
    checkpointing: bool = False
    with_head: bool = True
    goal: float | None = None


VARIANTS = (
    Variant("peak above the model", goal=GOAL),
    Variant("the same, gradient checkpointing", checkpointing=True),
    Variant("the same, without head and logits", with_head=False),
)


class Measured(NamedTuple):
    """Of one process."""

    peak: int
    kept: int


def train(name: str, variant: Variant, quick: bool, threads: int) -> Measured:
    """Load the model, then set up one method and take the steps; runs in a process of its own."""
    torch.set_num_threads(threads)
    model, source = load_model(quick), batches(load_tokens(quick), *(QUICK_SHAPE if quick else SHAPE))
    data = [next(source) for _ in range(STEPS)]
    kept = 0

    def run() -> None:
        nonlocal kept
        torch.manual_seed(SEED)
        one = method(name, model, QUICK_RANK if quick else RANK)
        if variant.checkpointing:
            checkpoint_activations(model)
        step = Step(one, language_model_loss if variant.with_head else body_loss)
        for token_ids in data:
            step(token_ids)
        kept = one.kept_bytes()

    peak = peak_above(run)
    return Measured(peak, kept)


def main(chosen: Options) -> None:
    """Measure and report."""
    load_tokens(chosen.quick)  # fails here, and not in the first process, where there is no model
    repeats = chosen.repeats or (1 if chosen.quick else REPEATS)
    rows, kept = [], {}
    for variant in VARIANTS:
        peaks: dict[str, list[float]] = {name: [] for name in ("lift", *RIVALS)}
        turns = [name for _ in range(repeats) for name in peaks]
        for name in progress(turns, variant.what):
            measured = in_fresh_process(train, name, variant, chosen.quick, chosen.threads, preload=PRELOAD)
            peaks[name].append(measured.peak / MIB)
            kept[name] = [measured.kept / MIB]
        for rival, label in RIVALS.items():
            what = f"LIFT / {label}: {variant.what}"
            rows.append(compare(what, peaks["lift"], peaks[rival], better="lower", goal=variant.goal, unit="MiB"))
    for rival, label in RIVALS.items():
        what = f"LIFT / {label}: state, gradients, adapters"
        rows.append(compare(what, kept["lift"], kept[rival], better="lower", unit="MiB"))
    shape = QUICK_SHAPE if chosen.quick else SHAPE
    settings = {"rank": QUICK_RANK if chosen.quick else RANK, "repeats": repeats, "batch": shape, "steps": STEPS}
    report(chosen, rows, settings)


if __name__ == "__main__":
    main(options("memory", __doc__))
