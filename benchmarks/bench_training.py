"""Time of a training step: LIFT against LoRA and against full fine-tuning. Some minutes on two cores.

    LIFT_SMOLLM2_DIR=path/to/SmolLM2-135M python benchmarks/bench_training.py [--quick] [--out PATH]

SmolLM2-135M in float32: forward, backward, clipping, update and zero_grad, each method on a copy of its own, the same
batches and the same loss. LoRA is peft's on all linear layers at r = 32 without dropout; full fine-tuning trains every
entry of the matrices that LIFT chooses from. Both rivals have the fused AdamW.

The flops floor is the ratio that the matrix products alone would give: LIFT computes every weight's gradient and picks
from it, LoRA computes the adapters' only. Attention, the same for all, is left out of it.
"""

from __future__ import annotations

from harness import Options, Row, alternate, compare, options, progress, report
from methods import ADAMW, CLIP, Method, Step, method
from resident_memory import give_back
from smollm2 import batches, load_model, load_tokens
from torch import Tensor, nn

from lift_lightning.models import checkpoint_activations

RANK, QUICK_RANK = 32, 4
# Sequences, tokens of each, repeats, gradient checkpointing. A step of the last takes a minute, and was killed
# for memory (24 GiB, other work beside it) without checkpointing; it has no goal.
SIZES = ((4, 128, 7, False), (4, 512, 5, False), (16, 512, 1, True))
QUICK_SIZES = ((2, 16, 2, False), (4, 16, 2, True))
RIVALS = {"lora": "LoRA", "full": "full fine-tuning"}
# At the first of the sizes.
GOALS = {"lora": 1.0, "full": 0.97}


def flops_per_token(method: Method, checkpointing: bool) -> int:
    """Of the matrix products in forward and backward: 2 for each entry and each of output, dX and dW.

    With checkpointing the output is computed twice, but for the head's.
    """
    linear = [m for m in method.model.modules() if isinstance(m, nn.Linear)]
    entries = sum(m.weight.numel() for m in linear)
    trained = sum(m.weight.numel() for m in linear if m.weight.requires_grad)
    again = sum(m.weight.numel() for name, m in method.base.named_modules() if m in linear and "lm_head" not in name)
    return 4 * entries + 2 * trained + (2 * again if checkpointing else 0)


def measure(
    methods: dict[str, Method], stretch: list[Tensor], goals: dict[str, float], checkpointing: bool
) -> list[Row]:
    """One row for each rival; the first batch is the warm-up's."""
    batches_of = {name: iter(stretch) for name in methods}
    steps = {name: Step(one) for name, one in methods.items()}
    runs = {name: lambda name=name: steps[name](next(batches_of[name])) for name in methods}
    size = f"{stretch[0].numel()} tokens{', checkpointing' if checkpointing else ''}"
    flops = {name: flops_per_token(one, checkpointing) for name, one in methods.items()}
    # Pages that one method has freed are there for the next one to take, and save it as many page faults: a tenth of a
    # step, which went to whatever came after the method with the largest peak. Now all begin without any.
    samples = alternate(runs, len(stretch) - 1, size, before=dict.fromkeys(runs, give_back))
    return [
        compare(
            f"LIFT / {label}, {size}",
            samples["lift"],
            samples[rival],
            better="lower",
            goal=goals.get(rival),
            extra={"flops floor": flops["lift"] / flops[rival]},
        )
        for rival, label in RIVALS.items()
    ]


def main(chosen: Options) -> None:
    """Measure and report."""
    rank, sizes = (QUICK_RANK, QUICK_SIZES) if chosen.quick else (RANK, SIZES)
    tokens = load_tokens(chosen.quick)
    methods = {
        name: method(name, load_model(chosen.quick), rank) for name in progress(["lift", *RIVALS], "making the models")
    }
    rows: list[Row] = []
    for i, (sequences, length, usual, checkpointing) in enumerate(sizes):
        if checkpointing:
            for one in methods.values():
                checkpoint_activations(one.base)
        source = batches(tokens, sequences, length)
        stretch = [next(source) for _ in range(1 + chosen.times(usual))]
        rows += measure(methods, stretch, GOALS if i == 0 else {}, checkpointing)
    settings = {"rank": rank, "sizes": sizes, "clip": CLIP, "adamw": ADAMW}
    report(chosen, rows, settings)


if __name__ == "__main__":
    main(options("training", __doc__))
