"""What SparsityMonitor and EigenspaceMonitor cost. Some minutes on two cores.

    LIFT_SMOLLM2_DIR=path/to/SmolLM2-135M python benchmarks/bench_monitors.py [--quick] [--out PATH]

On SmolLM2-135M in float32, trained with LIFT for some steps: one look of each monitor against the refresh that the
selection comes from (warm, as in training) and against a training step of 4 x 128 tokens. The share of a run is a look
over the steps between two looks. Expected before the first run: SparsityMonitor a few percent of a refresh, for it
sorts indices; EigenspaceMonitor several refreshes, since it decomposes exactly and cold.
"""

from __future__ import annotations

from types import SimpleNamespace

from harness import Options, alternate, compare, options, report
from methods import Step
from smollm2 import batches, load_model, load_tokens, train_a_while

from lift_lightning import SelectionConfig, refresh_masks
from lift_lightning.callbacks import EigenspaceMonitor, SparsityMonitor

RANK, QUICK_RANK = 32, 4
STEPS, QUICK_STEPS = 5, 2
SHAPE, QUICK_SHAPE = (4, 128), (4, 16)
REPEATS = 5
INTERVAL = 200  # steps between looks, as between refreshes


def main(chosen: Options) -> None:
    """Measure and report."""
    rank, steps = (QUICK_RANK, QUICK_STEPS) if chosen.quick else (RANK, STEPS)
    rows, length = QUICK_SHAPE if chosen.quick else SHAPE
    model, tokens = load_model(chosen.quick), load_tokens(chosen.quick)
    method, bases = train_a_while(model, tokens, steps=steps, tokens_per_step=rows * length, rank=rank)
    optimizer, config = method.sparse_optimizer, SelectionConfig(rank=rank, lra_rank=rank)
    trainer = SimpleNamespace(optimizers=[optimizer], is_global_zero=True, loggers=[], global_step=0)
    sparsity, eigenspace = SparsityMonitor(), EigenspaceMonitor()
    eigenspace.on_train_start(trainer, SimpleNamespace(model=model))
    sparsity.on_train_batch_end(trainer, None, None, None, 0)
    step, source = Step(method), batches(tokens, rows, length)

    def refresh() -> None:
        nonlocal bases
        bases = refresh_masks(optimizer, config, bases=bases).bases

    def look_at_selection() -> None:
        sparsity.on_train_batch_end(trainer, None, None, None, 0)

    def look_at_eigenspaces() -> None:
        trainer.global_step += INTERVAL
        eigenspace.on_train_batch_end(trainer, None, None, None, 0)

    runs = {
        "sparsity": look_at_selection,
        "eigenspace": look_at_eigenspaces,
        "refresh": refresh,
        "step": lambda: step(next(source)),
    }
    # Looking again at the same selection would cost nothing.
    found = alternate(runs, chosen.times(REPEATS), "monitors", before={"sparsity": refresh}, once_above=float("inf"))
    table = []
    for name, label in (("sparsity", "SparsityMonitor"), ("eigenspace", "EigenspaceMonitor")):
        share = sorted(found[name])[len(found[name]) // 2] / sorted(found["step"])[len(found["step"]) // 2] / INTERVAL
        table.append(compare(f"{label}: a look / a refresh", found[name], found["refresh"], better="lower"))
        extra = {f"share of {INTERVAL} steps": f"{share:.2%}"}
        table.append(compare(f"{label}: a look / a step", found[name], found["step"], better="lower", extra=extra))
    report(chosen, table, {"rank": rank, "batch": (rows, length), "interval": INTERVAL})


if __name__ == "__main__":
    main(options("monitors", __doc__))
