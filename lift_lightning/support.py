"""What every way of training with a `SparseAdamW` under a Trainer shares: refusals, and the report of skipped steps."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lift_lightning.optimizer import SparseAdamW
from lift_lightning.sharding import all_ranks, is_flattened, note_flattened

OnNonfinite = Literal["warn", "raise"]


def refuse_unsupported(trainer: pl.Trainer) -> None:
    """Check the strategy and the precision of a Trainer that is about to fit, before it trains wrong in silence.

    Raises:
        MisconfigurationException: naming the setting and the remedy, for strategies other than a single device, DDP,
            FSDP2 and FSDP1, for tensor parallelism and for loss scaling.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, FSDPStrategy)):
        raise MisconfigurationException(
            f"LIFT works on a single device, with DDP, with FSDP2 (ModelParallelStrategy) and with FSDP1 "
            f"(FSDPStrategy), the Trainer has {type(strategy).__name__}: set trainer.strategy to auto or ddp, or add "
            "--config configs/strategies/fsdp2.yaml"
        )
    if isinstance(strategy, ModelParallelStrategy) and (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise MisconfigurationException(
            f"the Trainer splits matrices by tensor parallelism over {size} devices, LIFT needs them in rows as FSDP2 "
            f"splits them: set the strategy's data_parallel_size={trainer.world_size} and tensor_parallel_size=1"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"precision={trainer.precision!r} scales the loss, and the entries that LIFT gathers from the gradients "
            "would be scaled too: use precision='bf16-mixed', 'bf16-true' or '32-true'"
        )


def leave_unwrapped(strategy: DDPStrategy) -> None:
    """Let DDP start its processes but not wrap the model: its gradients are summed by `GradientSum`.

    DistributedDataParallel would reduce, and keep buckets for, the dense gradients of which K entries are wanted. What
    else it does, giving all ranks the parameters of the first, is done here.
    """

    def configure_ddp() -> None:
        ranks = all_ranks()
        if ranks is not None:
            assert strategy.model is not None
            ranks.broadcast_(strategy.model)

    strategy.configure_ddp = configure_ddp


def follow_wrapping(strategy: FSDPStrategy, pl_module: pl.LightningModule) -> None:
    """Know where FSDP1 will put the parameters, and refuse that it wraps the root under manual optimization.

    Strategies wrap between two hooks, and call `configure_optimizers` right after, so that there is no other place.
    Lightning refuses to clip by norm under FSDP1, where `MaskRefreshCallback` has done so already: it is let pass.
    """
    wrap = type(strategy)._setup_model.__get__(strategy)
    plugin = strategy.precision_plugin
    refuse_to_clip = type(plugin).clip_grad_by_norm.__get__(plugin)

    def _setup_model(model: nn.Module) -> nn.Module:
        wrapped: nn.Module = wrap(model)
        if is_flattened(wrapped) and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(strategy).__name__} has wrapped all of {type(pl_module).__name__}, which optimizes manually: "
                "its training_step would run inside the forward pass of FSDP1, which never comes to the end of its "
                "backward, and gradients would pile up from step to step without a word. Wrap the model inside in "
                "configure_model, as LiftLightningModule does, or use FSDP2: --config configs/strategies/fsdp2.yaml"
            )
        note_flattened(wrapped)
        return wrapped

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: float) -> None:
        if not isinstance(getattr(optimizer, "_optimizer", optimizer), SparseAdamW):
            refuse_to_clip(optimizer, clip_val)

    strategy._setup_model = _setup_model
    plugin.clip_grad_by_norm = clip_grad_by_norm


def is_wrapped_by_ddp(trainer: pl.Trainer) -> bool:
    """Whether DistributedDataParallel reduces the gradients, at the end of the backward pass."""
    return isinstance(trainer.strategy.model, DistributedDataParallel)


class SkipReporter:
    """Tells of optimizer steps that were skipped because their gradients were not finite.

    Args:
        optimizer: which counts them on its device.
        on_nonfinite: `warn` or `raise`.
    """

    def __init__(self, optimizer: SparseAdamW, on_nonfinite: OnNonfinite = "warn") -> None:
        self.optimizer = optimizer
        self.on_nonfinite = on_nonfinite
        self._reported = int(optimizer.skipped_steps)
        self._looked_at = optimizer.attempted_steps

    def look(self, every: int) -> None:
        """Report if `every` divides the steps taken, once for each; 0 never does. It waits for the device."""
        steps = self.optimizer.attempted_steps
        if every and steps != self._looked_at and steps % every == 0:
            self._looked_at = steps
            self.report()

    def report(self) -> None:
        """Warn of steps skipped since the last report.

        Raises:
            FloatingPointError: instead, if asked for.
        """
        skipped = int(self.optimizer.skipped_steps)
        new, self._reported = skipped - self._reported, skipped
        if new == 0:
            return
        message = (
            f"{new} optimizer steps were skipped because their gradients were not finite "
            f"({skipped} of {self.optimizer.attempted_steps} so far); lower the learning rate or look at the data"
        )
        if self.on_nonfinite == "raise":
            raise FloatingPointError(message)
        rank_zero_warn(message)


class CountOptimizerSteps(pl.Callback):
    """Tells the Trainer how many micro-batches a manually optimizing module makes a step of.

    Its counts, the axes of loggers and its estimate of the run's length are in steps then. Lightning refuses the
    argument under manual optimization, because it would not act on it, so it is set after that check and taken back at
    the end.
    """

    def __init__(self, module: pl.LightningModule, accumulate_grad_batches: int) -> None:
        self.module = module
        self.accumulate_grad_batches = accumulate_grad_batches

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set it for a fit of its module; the Trainer keeps the callback, and may fit another one later."""
        if stage == "fit" and pl_module is self.module:
            trainer.accumulate_grad_batches = self.accumulate_grad_batches

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the Trainer as it was."""
        if pl_module is self.module:
            trainer.accumulate_grad_batches = 1

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A fit that broke off is not torn down."""
        self.teardown(trainer, pl_module, "fit")
