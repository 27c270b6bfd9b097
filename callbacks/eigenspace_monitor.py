"""How far training turns the top eigenspaces of the weights, while it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lift_lightning.analysis.matrices import places_of
from lift_lightning.analysis.spectra import alignment_score, leading_right_vectors, top_directions
from lift_lightning.errors import ConfigError
from lift_lightning.param_groups import Target, match_targets
from lift_lightning.sharding import owned


class EigenspaceMonitor(pl.Callback):
    """Log the alignment of each matrix's top eigenspace with that of the first step (arXiv 2506.00772, App. H.1).

    How its rotation goes with learning is a question that the paper leaves open; it measures before and after only.
    The metrics are `alignment/LAYER`, the mean over the matrices of a type of layer, and `alignment/all`: 1 where
    nothing turned. Works with any method that trains the matrices themselves, and in any project. Every look decomposes
    every matrix once, exactly, on the weights' device: about what a refresh with the exact solver costs. Name fewer
    matrices in `target_modules`, or look less often, where that is too much.

    Args:
        interval: optimizer steps between looks. The first is before the first step, which all are compared with, and
            the last is at the end of the fit.
        directions: right singular vectors that make the top eigenspace; 128, and at most an eighth of the shorter side,
            if null.
        target_modules: which matrices, as in training.

    Attributes:
        history: (step, metrics) of every look of the last fit.
        seconds: spent on it in the last fit.

    Raises:
        ConfigError: if a value is below 1, or a pattern matches nothing.
        MisconfigurationException: when a fit begins, if the matrices are split over devices, or an adapter is trained
            in their place.
    """

    def __init__(
        self,
        interval: int = 100,
        directions: int | None = None,
        target_modules: str | Sequence[str] = "all-linear",
    ) -> None:
        super().__init__()
        for name, value in (("interval", interval), ("directions", directions)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.interval, self.directions, self.target_modules = interval, directions, target_modules
        self._forget()

    def _forget(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []
        self.seconds = 0.0
        self._targets: list[Target] = []
        self._before: dict[str, Tensor] = {}
        self._looked = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, before a checkpoint is read."""
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the eigenspaces of the beginning, or those of the checkpoint that is resumed."""
        if getattr(pl_module, "adapter", None) is not None:
            raise MisconfigurationException(
                "EigenspaceMonitor looks at the weight matrices, which stay as they are under an adapter: leave the "
                "callback out, and compare the exported model with its base by `analyze alignment`"
            )
        own = getattr(pl_module, "model", None)
        model = own if isinstance(own, nn.Module) else pl_module
        self._targets = match_targets(model, self.target_modules)
        if any(owned(target.parameter).group is not None for target in self._targets):
            raise MisconfigurationException(
                "EigenspaceMonitor needs whole matrices, and FSDP splits them over devices: leave the callback out, or "
                "use DDP or a single device"
            )
        if not self._before:  # else a checkpoint is resumed
            self._look(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, after every `interval` steps."""
        if trainer.global_step % self.interval == 0:
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look once more, at what came out."""
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        # Several micro-batches may belong to one step.
        if not trainer.is_global_zero or trainer.global_step == self._looked:
            return
        self._looked = trainer.global_step
        started = time.perf_counter()
        scores: dict[str, list[float]] = {}
        for target, i, place in places_of(self._targets):
            matrix = target.matrices()[i]
            after = leading_right_vectors(matrix, top_directions(place.shape, self.directions)).float().cpu()
            before = self._before.setdefault(place.name, after)
            for layer in (place.layer, "all"):
                scores.setdefault(f"alignment/{layer}", []).append(alignment_score(before, after))
        # Where a matrix has too few directions for a top eigenspace there is no score.
        defined = {name: [value for value in values if not math.isnan(value)] for name, values in scores.items()}
        metrics = {name: sum(values) / len(values) for name, values in defined.items() if values}
        self.history.append((trainer.global_step, metrics))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.seconds += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """The eigenspaces of the beginning, by matrix, and the step that was looked at last."""
        return {"before": self._before, "looked": self._looked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with them."""
        self._before, self._looked = dict(state_dict["before"]), state_dict["looked"]
