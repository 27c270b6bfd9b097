"""A `ModelCheckpoint` whose last checkpoint is that of the last step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, which also saves at the end of each epoch and at `max_steps`.

    Lightning 2.6 saves with `every_n_train_steps` at these steps only: of 1,857 steps with a checkpoint every 400, what
    is tested or exported from `last.ckpt` would be the model of step 1,600. A run that something else ends, such as
    early stopping in the middle of an epoch, has the checkpoints of its intervals.

    Args:
        **kwargs: those of `ModelCheckpoint`.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by the interval, and after the last step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Here and not in `on_train_end`: there the counters are those of an epoch that is over, and a resumed run would
        # leave out the rest of its rows.
        last = trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step
        if last and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None or self.monitor in candidates:
                self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
