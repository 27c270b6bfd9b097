"""When to select anew, in any Lightning project whose optimizer is a `SparseAdamW`."""

from __future__ import annotations

import logging
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.progress import track
from torch.optim import Optimizer

from lift_lightning.optimizer import SparseAdamW
from lift_lightning.refresh import Bases, RefreshReport, refresh_masks
from lift_lightning.selection import SelectionConfig
from lift_lightning.summary import parameter_summary, summary_table

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "lift_lightning"


class MaskRefreshCallback(pl.Callback):
    """Select entries before the first step and every `interval` optimizer steps (arXiv 2506.00772, Algorithm 1).

    Works with `LiftLightningModule` and with any module, automatic optimization too, whose `configure_optimizers`
    returns a `SparseAdamW`. The refresh comes before the gradient of step t (counted from 1, in optimizer steps) where
    t is a multiple of `interval`. The callback writes selections and moments to checkpoints and applies them on resume;
    under automatic optimization it clips by the Trainer's `gradient_clip_val`, over sparse and dense gradients
    together. Without a `SparseAdamW` it logs one line and does nothing.

    Args:
        interval: optimizer steps between refreshes; null keeps the first selection.
        device: where decompositions run, such as `cuda:0` for weights on the CPU; each weight's own if not given.
        on_nonfinite: what to do about steps that were skipped because their gradients were not finite: `warn`, or
            `raise`. Looked at when the Trainer logs.
        **selection: the fields of `SelectionConfig`.

    Raises:
        ValueError: if the interval is below 1 or a field of the selection is out of range.
    """

    def __init__(
        self,
        interval: int | None = 200,
        device: str | None = None,
        on_nonfinite: Literal["warn", "raise"] = "warn",
        **selection: Any,
    ) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f"interval must be at least 1 optimizer step, or null for a fixed mask, got {interval}")
        self.interval = interval
        self.device = device
        self.on_nonfinite = on_nonfinite
        self.config = SelectionConfig(**selection)
        self.history: list[tuple[int, RefreshReport]] = []
        self._optimizer: SparseAdamW | None = None
        self._bases: Bases = {}
        self._checked_step = 0
        self._reported_skips = 0
        self._restored: dict[str, Any] | None = None

    def should_refresh(self, step: int) -> bool:
        """Whether to select anew before optimizer step `step` (from 1). Override for another schedule.

        Asked once for each step; the first selection, before the first step of all, is not asked for.
        """
        return self.interval is not None and step % self.interval == 0

    # ---------------------------------------------------------------- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what would train wrong in silence."""
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"LIFT trains on one device so far, the Trainer has {trainer.world_size} processes: set "
                "trainer.devices=1 and trainer.num_nodes=1"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"precision={trainer.precision!r} scales the loss, and the entries that LIFT gathers from the "
                "gradients would be scaled too: use precision='bf16-mixed', 'bf16-true' or '32-true'"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the selection of a checkpoint, or make the first one. All of the run's state is restored by now."""
        self._optimizer = self._find_optimizer(trainer)
        if self._optimizer is None:
            return
        self._optimizer.thin_state_dict = True
        entries = sum(p.numel() for _, p, _ in self._optimizer.sparse_parameters())
        self.config = self.config.of_targets(entries, sum(p.numel() for p in pl_module.parameters()))
        if self._restored is not None:
            self._apply(self._restored, self._optimizer)
            self._restored = None
        elif not self._optimizer.has_selection():
            self._checked_step = self._optimizer.attempted_steps + 1
            self._refresh(trainer, self._checked_step)
        self._reported_skips = int(self._optimizer.skipped_steps)
        if trainer.is_global_zero:
            Console().print(summary_table(parameter_summary(pl_module, self._optimizer), self._optimizer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refresh before the first micro-batch of a step that asks for it."""
        if self._optimizer is None:
            return
        step = self._optimizer.attempted_steps + 1
        # Several micro-batches belong to one step under gradient accumulation.
        if step == self._checked_step:
            return
        self._checked_step = step
        if self.should_refresh(step):
            self._refresh(trainer, step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip for the Trainer, which looks at `p.grad` only and would miss the gradients of sparse parameters."""
        clip = trainer.gradient_clip_val
        if optimizer is not self._optimizer or not pl_module.automatic_optimization or not clip:
            return
        if trainer.gradient_clip_algorithm == "value":
            self._optimizer.clip_grad_value_(clip)
        else:
            self._optimizer.clip_grad_norm_(clip)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report skipped steps when the Trainer logs: reading the counter waits for the device."""
        if self._optimizer is None or self._optimizer.attempted_steps % trainer.log_every_n_steps:
            return
        self._report_skips()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what was skipped since the last time."""
        if self._optimizer is not None:
            self._report_skips()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the selection and its state, by parameter name; tensors and numbers only."""
        if self._optimizer is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "optimizer": self._optimizer.sparse_state_dict(),
                "bases": {name: b for name, b in self._bases.items() if any(x is not None for x in b)},
                "checked_step": self._checked_step,
            }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until `on_train_start`: on one device there is no optimizer yet."""
        self._restored = checkpoint.get(CHECKPOINT_KEY)

    # ---------------------------------------------------------------- what they do

    def _apply(self, restored: dict[str, Any], optimizer: SparseAdamW) -> None:
        optimizer.load_sparse_state_dict(restored["optimizer"])
        self._bases = restored["bases"]
        self._checked_step = restored["checked_step"]

    def _find_optimizer(self, trainer: pl.Trainer) -> SparseAdamW | None:
        found = [o for o in trainer.optimizers if isinstance(o, SparseAdamW)]
        if len(found) > 1:
            raise MisconfigurationException(
                f"MaskRefreshCallback serves one SparseAdamW, configure_optimizers returned {len(found)}: put their "
                "groups into one"
            )
        if found and any(True for _ in found[0].sparse_parameters()):
            return found[0]
        rank_zero_info("MaskRefreshCallback: no optimizer here has a sparse group, so there is nothing to select")
        return None

    def _refresh(self, trainer: pl.Trainer, step: int) -> None:
        assert self._optimizer is not None
        first = not self._optimizer.has_selection()
        bar = trainer.progress_bar_callback
        show = first and trainer.is_global_zero and bar is not None and bar.is_enabled
        report = refresh_masks(
            self._optimizer,
            self.config,
            device=self.device,
            bases=self._bases,
            progress=lambda items: track(items, "Selecting principal weights", disable=not show),
        )
        self._bases = report.bases
        self.history.append((step, report))
        metrics = {"lift_refresh_seconds": report.seconds, "lift_density": report.density}
        if report.overlap is not None:
            metrics["lift_overlap"] = report.overlap
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if first and report.unreduced:
            rank_zero_warn(
                f"the rank of the approximation, {self.config.approximation_rank}, is not below the shorter side of "
                f"{report.unreduced} matrices: their entries are picked by plain magnitude; set a smaller lra_rank"
            )
        overlap = "" if report.overlap is None else f", {report.overlap:.2%} of them selected before"
        rank_zero_info(
            f"LIFT refresh at step {step}: {report.selected:,} of {report.entries:,} entries "
            f"({report.density:.2%}){overlap}, {report.seconds:.1f} s"
        )

    def _report_skips(self) -> None:
        assert self._optimizer is not None
        skipped = int(self._optimizer.skipped_steps)
        if skipped == self._reported_skips:
            return
        message = (
            f"{skipped - self._reported_skips} optimizer steps were skipped because their gradients were not finite "
            f"({skipped} of {self._optimizer.attempted_steps} so far); lower the learning rate or look at the data"
        )
        self._reported_skips = skipped
        if self.on_nonfinite == "raise":
            raise FloatingPointError(message)
        rank_zero_warn(message)
