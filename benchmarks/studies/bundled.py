"""One fine-tuning run on the bundled model, with everything that studies 4 and 5 look at."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.studies.records import Run, significant
from lift_lightning.adapters import merge_adapter
from lift_lightning.analysis.updates import compare_matrix
from lift_lightning.cli import lightning_cli, with_packaged_configs
from lift_lightning.collate import pad_batch
from lift_lightning.losses import causal_lm_loss
from lift_lightning.models import load_model, load_tokenizer
from lift_lightning.param_groups import build_param_groups
from lift_lightning.prompts import encode_example, render_prompt
from lift_lightning.quickstart.problems import Split
from lift_lightning.quickstart.skills import SKILLS, accuracies
from lift_lightning.quickstart.text import Skill, questions

MODEL = "lift-lightning/quickstart"
TESTED = 300  # questions of each skill; there are 313 of source
TOP = 16  # directions of the eigenspace that is followed, the rank of LIFT's approximation here
STEPS, INTERVAL = 200, 50
SETTINGS = {
    "trainer.max_steps": STEPS,
    "trainer.callbacks": "[]",
    "trainer.logger": "false",
    "trainer.enable_checkpointing": "false",
    "trainer.enable_progress_bar": "false",
    "lift.interval": INTERVAL,
}


class StepLosses(pl.Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *others: Any) -> None:
        """After the step."""
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def train(method: str, lr: float, seed: int, options: Mapping[str, object], *, split: Split = "heldout") -> Run:
    """Train, test, and look at what became of the weights.

    Args:
        method: a file of `configs/methods/`.
        lr: peak learning rate.
        seed: of the order of the rows, of adapters' initial values and of random selections.
        options: by name, on top of the file.
        split: of the target's and the bridge's questions; the source has none for validation.

    Returns:
        Losses of each step, accuracies and losses of the skills, counts, figures of the update of each matrix; None
        for what is not finite, and no updates where the weights are not.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        given = {
            **SETTINGS,
            "model.lr": lr,
            "seed_everything": seed,
            "lift.seed": seed,
            "trainer.default_root_dir": folder,
            **options,
        }
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        files = ["--config", "configs/quickstart.yaml", "--config", f"configs/methods/{method}.yaml"]
        cli = lightning_cli(with_packaged_configs([*files, *arguments]), run=False)
        module, trainer, steps = cli.model, cli.trainer, StepLosses()
        trainer.callbacks.append(steps)
        started = time.perf_counter()
        trainer.fit(module, datamodule=cli.datamodule)
        seconds = time.perf_counter() - started
    optimizer, refreshes = trainer.optimizers[0], _refreshes(trainer)
    trained = sum(optimizer.indices(p).numel() for _, p, _ in optimizer.sparse_parameters())
    trained += sum(p.numel() for p in optimizer.dense_parameters())
    model, tokenizer = module.hf_model, load_tokenizer(MODEL)
    if module.adapter is not None:
        merge_adapter(model)
    return {
        "method": method,
        "lr": lr,
        "options": {name: str(value) for name, value in options.items()},
        "split": split,
        "tested": TESTED,
        "accuracy": skill_accuracies(model, tokenizer, split),
        "loss": {skill: significant(answer_loss(model, tokenizer, skill, split)) for skill in SKILLS},
        "trained": trained,
        "state_bytes": optimizer.state_bytes(),
        "seconds": round(seconds, 1),
        "refreshes": refreshes,
        "losses": [significant(loss, 5) for loss in steps.losses],
        "updates": updates(model) if all(p.isfinite().all() for p in model.parameters()) else {},
    }


def skill_accuracies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: Split) -> dict[Skill, float]:
    """Share of right answers of each skill, of the source on its held-out questions whatever the split."""
    found = accuracies(model, tokenizer, TESTED, ("target", "bridge"), split)
    found.update(accuracies(model, tokenizer, TESTED, ("source",)))
    return {skill: significant(found[skill]) for skill in SKILLS}


@torch.no_grad()
def answer_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: Skill, split: Split = "heldout"
) -> float:
    """Mean loss over the tokens of the right answers to `TESTED` questions."""
    asked = questions(skill, TESTED, split="heldout" if skill == "source" else split)
    encoded = [encode_example(tokenizer, render_prompt(q.instruction, q.input), q.output, 128) for q in asked]
    rows = [{"input_ids": example.input_ids, "labels": example.labels} for example in encoded]
    batch = pad_batch(rows, pad_token_id=int(tokenizer.pad_token_id))
    labels = batch.pop("labels")
    total, weight = causal_lm_loss(model.eval()(**batch, use_cache=False).logits, labels)
    return float(total / weight)


def matrices(model: PreTrainedModel, target_modules: str = "all-linear") -> dict[str, Tensor]:
    """What LIFT trains by default."""
    return {name: p for group in build_param_groups(model, target_modules) for name, p in group["params"]}


def updates(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Figures of the update of every matrix against the model as it comes with the package."""
    base, after = matrices(load_model(MODEL).model), matrices(model)
    found = {}
    for name, weight in base.items():
        update = asdict(compare_matrix(weight, after[name], min(TOP, *weight.shape)))
        found[name] = {key: significant(value, 5) for key, value in update.items()}
    return found


def _refreshes(trainer: pl.Trainer) -> list[dict[str, float | None]]:
    history = [entry for callback in trainer.callbacks for entry in getattr(callback, "history", ())]
    return [{"step": step, "overlap": report.overlap} for step, report in history]
