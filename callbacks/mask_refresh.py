"""When to select anew, in any Lightning project whose optimizer is a `SparseAdamW`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.progress import track
from torch.optim import Optimizer

from lift_lightning.errors import ConfigError
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.refresh import Bases, RefreshReport, gathered_bases, own_bases, refresh_masks
from lift_lightning.selection import SelectionConfig
from lift_lightning.sharding import owned, ranks_of
from lift_lightning.summary import parameter_summary, summary_table
from lift_lightning.support import OnNonfinite, SkipReporter, follow_wrapping, is_wrapped_by_ddp, refuse_unsupported

CHECKPOINT_KEY = "lift_lightning"


class MaskRefreshCallback(pl.Callback):
    """Select entries before the first step and every `interval` optimizer steps (arXiv 2506.00772, Algorithm 1).

    Works with `LiftLightningModule` and with any module, automatic optimization too, whose `configure_optimizers`
    returns a `SparseAdamW`. The refresh comes before the gradient of step t (counted from 1, in optimizer steps) where
    t is a multiple of `interval`. The callback writes selections and moments to checkpoints and applies them on resume;
    under automatic optimization it clips by the Trainer's `gradient_clip_val`, over sparse and dense gradients
    together. Without a sparse group it logs one line and selects nothing.

    Args:
        interval: optimizer steps between refreshes; null keeps the first selection.
        device: where decompositions run, such as `cuda:0` for weights on the CPU; each weight's own if not given.
        basis_device: where the subspace solver's bases wait for the next refresh, `cpu` to keep them out of the GPU's
            memory; where they were made if not given.
        on_nonfinite: what to do about steps that were skipped because their gradients were not finite: `warn`, or
            `raise`. Looked at when the Trainer logs.
        **selection: the fields of `SelectionConfig`.

    Attributes:
        history: (step, report) of every selection of the last fit.

    Raises:
        ConfigError: if the interval is below 1 or a field of the selection is out of range.
    """

    def __init__(
        self,
        interval: int | None = 200,
        device: str | None = None,
        basis_device: str | None = None,
        on_nonfinite: OnNonfinite = "warn",
        **selection: Any,
    ) -> None:
        if interval is not None and interval < 1:
            raise ConfigError(f"interval must be at least 1 optimizer step, or null for a fixed mask, got {interval}")
        self.interval = interval
        self.device = device
        self.basis_device = basis_device
        self.on_nonfinite = on_nonfinite
        self.config = SelectionConfig(**selection)
        if on_nonfinite not in get_args(OnNonfinite):
            raise ConfigError(f"on_nonfinite must be one of {', '.join(get_args(OnNonfinite))}, got {on_nonfinite!r}")
        self.history: list[tuple[int, RefreshReport]] = []
        self._forget()

    def _forget(self) -> None:
        """The state of a fit that has not begun."""
        self._optimizer: SparseAdamW | None = None
        self._skips: SkipReporter | None = None
        self._restored: dict[str, Any] | None = None  # of the checkpoint that is resumed; empty if it holds nothing
        self._resolved = self.config  # its density counted over the targets of this model
        self._bases: Bases = {}
        self._checked_step = 0

    def should_refresh(self, step: int) -> bool:
        """Whether to select anew before optimizer step `step` (from 1). Override for another schedule.

        Asked once for each step; the first selection, before the first step of all, is not asked for.
        """
        return self.interval is not None and step % self.interval == 0

    # ---------------------------------------------------------------- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what would train wrong in silence."""
        if stage == "fit":
            refuse_unsupported(trainer)
            if isinstance(trainer.strategy, FSDPStrategy):
                follow_wrapping(trainer.strategy, pl_module)
            self._forget()  # before a checkpoint is read

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the selection of a checkpoint, or make the first one. All of the run's state is restored by now."""
        self.history = []
        optimizer = self._find_optimizer(trainer)
        if optimizer is not None and any(True for _ in optimizer.sparse_parameters()):
            self._optimizer = optimizer
            self._start(trainer, pl_module, optimizer)
        else:
            rank_zero_info("MaskRefreshCallback: no optimizer here has a sparse group, so there is nothing to select")
        if optimizer is not None:
            self._skips = SkipReporter(optimizer, self.on_nonfinite)
        self._restored = None

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
        if self._optimizer is None or optimizer is not self._optimizer or not pl_module.automatic_optimization:
            return
        if clip and trainer.gradient_clip_algorithm == "value":
            self._optimizer.clip_grad_value_(clip)
        elif clip:
            self._optimizer.clip_grad_norm_(clip)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report skipped steps when the Trainer logs: reading the counter waits for the device."""
        if self._skips is not None:
            self._skips.look(trainer.log_every_n_steps)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what was skipped since the last time."""
        if self._skips is not None:
            self._skips.report()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the gradients back to whoever trains the model next. The state stays: it may be saved after the fit."""
        if self._optimizer is not None:
            self._optimizer.remove_hooks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same after a fit that broke off, which is not torn down."""
        self.teardown(trainer, pl_module, "fit")
        if self._optimizer is not None and pl_module.automatic_optimization:
            self._optimizer.zero_grad()  # half a backward may be in them, and a checkpoint may follow

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the selection and its state, by parameter name; tensors and numbers only."""
        if self._optimizer is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "optimizer": self._optimizer.sparse_state_dict(),
                "bases": {name: b for name, b in self._all_bases().items() if any(x is not None for x in b)},
                "checked_step": self._checked_step,
                "selection": asdict(self.config),
            }
        elif self._restored:  # of a run that was over when it was resumed
            checkpoint[CHECKPOINT_KEY] = self._restored

    def _all_bases(self) -> Bases:
        """Those of all ranks, on rank 0: each has those of the matrices that it decomposed."""
        assert self._optimizer is not None
        ranks = ranks_of([parameter for _, parameter, _ in self._optimizer.sparse_parameters()])
        return self._bases if ranks is None else gathered_bases(ranks, self._optimizer, self._bases)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until `on_train_start`: on one device there is no optimizer yet."""
        if trainer.state.fn == "fit":  # validating a checkpoint must not reach into the next fit
            self._restored = checkpoint.get(CHECKPOINT_KEY, {})

    # ---------------------------------------------------------------- what they do

    def _find_optimizer(self, trainer: pl.Trainer) -> SparseAdamW | None:
        found = [o for o in trainer.optimizers if isinstance(o, SparseAdamW)]
        if len(found) > 1:
            raise MisconfigurationException(
                f"MaskRefreshCallback serves one SparseAdamW, configure_optimizers returned {len(found)}: put their "
                "groups into one"
            )
        return found[0] if found else None

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: SparseAdamW) -> None:
        optimizer.thin_state_dict = True
        if is_wrapped_by_ddp(trainer):
            optimizer.remove_hooks()  # they would take the gradients before they are reduced
        else:
            optimizer.attach_hooks()  # gone if it has been through a fit
        entries = sum(owned(p).numel for _, p, _ in optimizer.sparse_parameters())
        self._resolved = self.config.of_targets(entries, sum(owned(p).numel for p in pl_module.parameters()))
        if self._restored:
            optimizer.load_sparse_state_dict(self._restored["optimizer"])
            self._bases = own_bases(optimizer, self._resolved, self._restored["bases"])
            self._checked_step = self._restored["checked_step"]
            if self._restored["selection"] != asdict(self.config):
                rank_zero_warn(
                    f"the selection was made with {self._restored['selection']}; what is set now, "
                    f"{asdict(self.config)}, takes effect at the next refresh"
                )
        elif not optimizer.has_selection():
            if self._restored is not None:
                rank_zero_warn(
                    "the checkpoint has no selection, it was saved without MaskRefreshCallback: selecting anew, with "
                    "moments that begin at zero"
                )
            self._checked_step = optimizer.attempted_steps + 1
            self._refresh(trainer, self._checked_step)
        summary = parameter_summary(pl_module, optimizer)
        if trainer.is_global_zero:
            Console().print(summary_table(summary, optimizer))

    def _refresh(self, trainer: pl.Trainer, step: int) -> None:
        assert self._optimizer is not None
        first = not self._optimizer.has_selection()
        bar = trainer.progress_bar_callback
        show = first and trainer.is_global_zero and bar is not None and bar.is_enabled
        report = refresh_masks(
            self._optimizer,
            self._resolved,
            device=self.device,
            basis_device=self.basis_device,
            bases=self._bases,
            progress=lambda items: track(items, "Selecting principal weights", disable=not show),
        )
        self._bases = report.bases
        self.history.append((step, replace(report, bases={})))  # the history would keep every old basis alive
        self._log(trainer, step, report, first)

    def _log(self, trainer: pl.Trainer, step: int, report: RefreshReport, first: bool) -> None:
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
        solvers = ", ".join(f"{count} {solver}" for solver, count in report.solvers.items())
        if "subspace" in report.solvers:
            solvers += f" (error up to {report.error:.1e})"
        overlap = "" if report.overlap is None else f", {report.overlap:.2%} of them selected before"
        split = f"; most on one rank: {report.imbalance:.2f} times the mean" if report.imbalance > 1 else ""
        rank_zero_info(
            f"LIFT refresh at step {step}: {report.selected:,} of {report.entries:,} entries "
            f"({report.density:.2%}){overlap}, {report.seconds:.1f} s{solvers and '; matrices by solver: '}{solvers}"
            f"{split}"
        )
