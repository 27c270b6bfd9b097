"""When to select anew, in any Lightning project whose optimizer is a `SparseAdamW`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.optim import Optimizer

from lift_lightning.allocation import Share
from lift_lightning.errors import ConfigError
from lift_lightning.gradients import Statistics, drawn_batches, gradient_statistics
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.refresh import Bases, RefreshReport, gathered_bases, own_bases, refresh_masks
from lift_lightning.schedules import Origins, Schedule, all_selected, part_of
from lift_lightning.selection import SelectionConfig
from lift_lightning.sharding import all_ranks, owned, ranks_of
from lift_lightning.shares import SPLIT, Shares, divide_budget
from lift_lightning.summary import parameter_summary, shares_table, summary_table
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
        schedule: what a refresh does. `periodic` selects anew (the paper's method). `accumulate` adds to what is
            selected, until the budget is reached with the last of `accumulate_selections`, and drops nothing (paper,
            App. A). `drop_and_grow` lets the share `drop_fraction` of the entries, those that moved least,
            compete anew, and sets those that lose back to their first values (SpIEL, arXiv 2401.16405); the share falls
            to 0 over the run, in a line. What the last two train is never more than the budget's entries.
        accumulate_selections: number of selections of `accumulate`, the first one counted.
        drop_fraction: of `drop_and_grow`, at the beginning of the run; above 0 and up to 1.
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
        schedule: Schedule = "periodic",
        accumulate_selections: int = 4,
        drop_fraction: float = 0.2,
        device: str | None = None,
        basis_device: str | None = None,
        on_nonfinite: OnNonfinite = "warn",
        **selection: Any,
    ) -> None:
        if interval is not None and interval < 1:
            raise ConfigError(f"interval must be at least 1 optimizer step, or null for a fixed mask, got {interval}")
        if accumulate_selections < 1:
            raise ConfigError(f"accumulate_selections must be at least 1, got {accumulate_selections}")
        if not 0 < drop_fraction <= 1:
            raise ConfigError(f"drop_fraction must be above 0 and at most 1, got {drop_fraction}")
        if schedule not in get_args(Schedule):
            raise ConfigError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
        if schedule != "periodic" and interval is None:
            raise ConfigError(f"schedule={schedule} changes the selection: set interval, which is null")
        self.interval = interval
        self.schedule = schedule
        self.accumulate_selections = accumulate_selections
        self.drop_fraction = drop_fraction
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
        self._selections = 0  # made so far, over all parts of a run that was resumed
        self._shares: Shares | None = None  # where matrices have budgets of their own
        self._origins = Origins()

    def should_refresh(self, step: int) -> bool:
        """Whether to select anew before optimizer step `step` (from 1). Override for another schedule.

        Asked once for each step; the first selection, before the first step of all, is not asked for.
        """
        if self.schedule == "accumulate" and self._selections >= self.accumulate_selections:
            return False
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
            self._refresh(trainer, pl_module, step)

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
                "selections": self._selections,
                "shares": None if self._shares is None else {n: [list(s) for s in t] for n, t in self._shares.items()},
                "origins": self._origins.values,
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
            self._selections = self._restored.get("selections", 1)
            if (shares := self._restored.get("shares")) is not None:
                self._shares = {name: [Share(*one) for one in theirs] for name, theirs in shares.items()}
            self._origins = Origins(dict(self._restored.get("origins", {})))
            self._refuse_another_schedule()
            if self._restored["selection"] != asdict(self.config):
                rank_zero_warn(
                    f"the selection was made with {self._restored['selection']}; what is set now, "
                    f"{asdict(self.config)}, takes effect at the next refresh"
                    + (", except for the budget, which stays divided as it was" if self._has_shares() else "")
                )
        elif not optimizer.has_selection():
            if self._restored is not None:
                rank_zero_warn(
                    "the checkpoint has no selection, it was saved without MaskRefreshCallback: selecting anew, with "
                    "moments that begin at zero"
                )
            self._checked_step = optimizer.attempted_steps + 1
            self._refresh(trainer, pl_module, self._checked_step)
        summary = parameter_summary(pl_module, optimizer)
        if trainer.is_global_zero:
            Console().print(summary_table(summary, optimizer))

    def _refuse_another_schedule(self) -> None:
        """What a schedule or a division of the budget builds on must have been there from the first selection."""
        if self.schedule == "drop_and_grow" and not self._origins.values:
            raise ConfigError(
                "schedule=drop_and_grow sets entries back to the values from before the training, which this "
                "checkpoint does not have: it was trained with another schedule; go on with that one"
            )
        if not self._has_shares():
            self._shares = None  # of settings that are no longer in force
        elif self._shares is None:
            raise ConfigError(
                f"schedule={self.schedule}, allocation={self.config.allocation}, count={self.config.count} divide the "
                "budget before the first selection, and this checkpoint was trained without: go on with its settings"
            )

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        first = not optimizer.has_selection()
        bar = trainer.progress_bar_callback
        show = first and trainer.is_global_zero and bar is not None and bar.is_enabled
        if self.schedule != "periodic" and optimizer.split_over is not None:
            raise ConfigError(SPLIT.format(what=f"schedule={self.schedule}"))
        statistics = self._statistics(trainer, pl_module, step) if self.config.needs_gradients else None
        if first and self._has_shares():
            self._divide(trainer, statistics, show)
        self._selections += 1
        before = all_selected(optimizer)
        shares, kept = self._shares, None
        if self.schedule == "accumulate":
            assert shares is not None
            shares = part_of(shares, self._selections, self.accumulate_selections)
            kept = None if first else before
        elif self.schedule == "drop_and_grow" and not first:
            kept = self._origins.survivors(optimizer, self._share_to_drop(trainer, step))
        report = refresh_masks(
            optimizer,
            self._resolved,
            device=self.device,
            basis_device=self.basis_device,
            bases=self._bases,
            shares=shares,
            statistics=statistics,
            kept=kept,
            progress=lambda items: track(items, "Selecting principal weights", disable=not show),
        )
        if self.schedule == "drop_and_grow":
            self._origins.follow(optimizer, before)
        self._bases = report.bases
        self.history.append((step, replace(report, bases={})))  # the history would keep every old basis alive
        self._log(trainer, step, report, first)

    def _has_shares(self) -> bool:
        """Whether matrices have budgets of their own, which are found before the first selection and stay."""
        return self._resolved.divides or self.schedule == "accumulate"

    def _share_to_drop(self, trainer: pl.Trainer, step: int) -> float:
        steps = trainer.estimated_stepping_batches
        return self.drop_fraction * max(0.0, 1 - step / steps) if 0 < steps < float("inf") else self.drop_fraction

    def _divide(self, trainer: pl.Trainer, statistics: Statistics | None, show: bool) -> None:
        assert self._optimizer is not None
        self._shares = divide_budget(
            self._optimizer,
            self._resolved,
            device=self.device,
            statistics=statistics,
            progress=lambda items: track(items, "Dividing the budget", disable=not show),
        )
        if self.config.divides and trainer.is_global_zero:
            Console().print(shares_table(self._shares, self._optimizer))

    def _statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> Statistics:
        """Of batches of the training data, on the module as it is in training."""
        assert self._optimizer is not None
        loss_of = getattr(pl_module, "selection_loss", None)
        if loss_of is None or is_wrapped_by_ddp(trainer):
            raise MisconfigurationException(
                f"criterion={self.config.criterion} needs the gradient of single batches: give "
                f"{type(pl_module).__name__} a method selection_loss(batch) that returns their loss, and train it on "
                "one device; LiftLightningModule has one, and works under DDP too"
            )
        loader = trainer.train_dataloader
        ranks, config = all_ranks(), self.config
        seed = config.seed + step * (1 if ranks is None else ranks.size) + (0 if ranks is None else ranks.rank)
        strategy = trainer.strategy

        def loss(batch: Any) -> Tensor:
            with strategy.precision_plugin.train_step_context():
                found: Tensor = loss_of(strategy.batch_to_device(batch))
            return found

        power = config.gradient_power if config.criterion == "gradient" else 1
        with isolate_rng():
            batches = drawn_batches(loader, config.gradient_batches, seed)
            return gradient_statistics(self._optimizer, loss, batches, power, ranks=ranks)

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
