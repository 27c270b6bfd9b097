"""A callback that follows the quickstart's skills through a fit."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lift_lightning.models import load_tokenizer
from lift_lightning.module import LiftLightningModule
from lift_lightning.quickstart.skills import accuracies


class SkillProbe(pl.Callback):
    """Log `target_accuracy` and `source_accuracy` on held-out questions, before the first step and every few steps.

    Args:
        interval: optimizer steps between two measurements; null measures never.
        questions: held-out questions of each skill.

    Attributes:
        seconds: spent on it in the last fit.
    """

    def __init__(self, interval: int | None = 25, questions: int = 100) -> None:
        self.interval = interval
        self.questions = questions
        self.seconds = 0.0
        self._measured = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What the model can do before it is trained."""
        self.seconds, self._measured = 0.0, -1
        self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After every `interval` steps."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        # Several micro-batches may belong to one step.
        if self.interval is None or step % self.interval or step == self._measured:
            return
        self._measured = step
        if not isinstance(pl_module, LiftLightningModule):
            raise MisconfigurationException(f"SkillProbe asks a LiftLightningModule, not a {type(pl_module).__name__}")
        started = time.perf_counter()
        tokenizer = load_tokenizer(pl_module.model_name_or_path, pl_module.hparams.revision)
        found = accuracies(pl_module.hf_model, tokenizer, self.questions, ("target", "source"))
        self.seconds += time.perf_counter() - started
        for logger in trainer.loggers:
            logger.log_metrics({f"{skill}_accuracy": share for skill, share in found.items()}, step=step)
