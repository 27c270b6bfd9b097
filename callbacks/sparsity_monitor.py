"""How the selection moves during training."""

from __future__ import annotations

import time
import weakref
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lift_lightning.analysis.masks import overlap
from lift_lightning.analysis.matrices import layer_types
from lift_lightning.optimizer import SparseAdamW


class SparsityMonitor(pl.Callback):
    """Log at every selection, for each type of layer and for all, what of it is new and what was ever selected.

    The metrics are `selection_replaced/LAYER`, the share of the selected entries that the selection before did not
    have; `selection_since_first/LAYER`, the share that the first one did not have; and `selection_ever/LAYER`, the
    share of the matrices' entries that was selected at any time, which is what a delta will hold. Works in any project
    whose optimizer is a `SparseAdamW`, beside `MaskRefreshCallback`; what it keeps goes into checkpoints. It looks at
    selections only: between refreshes it costs next to nothing. It keeps up to three index vectors in the CPU's memory:
    the first selection, the last, and all that was ever selected.

    Attributes:
        history: (step, metrics) of every selection of the last fit.
        seconds: spent on it in the last fit.

    Raises:
        MisconfigurationException: when a fit begins, if no `SparseAdamW` has a sparse group, or the parameters are
            split over devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []
        self.seconds = 0.0
        self._looked = 0
        self._seen: dict[str, weakref.ref[Tensor]] = {}  # the selections that were looked at, on the optimizer's device
        self._last: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, before a checkpoint is read."""
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether there is anything to follow."""
        optimizer = _sparse_optimizer(trainer)
        if optimizer is None:
            raise MisconfigurationException(
                "SparsityMonitor follows the selection of a SparseAdamW, and no optimizer here has a sparse group: "
                "leave the callback out, or train with method=lift"
            )
        if optimizer.split_over is not None:
            raise MisconfigurationException(
                "SparsityMonitor needs whole selections, and FSDP splits them over devices: leave the callback out, or "
                "use DDP or a single device"
            )
        self._looked = trainer.global_step
        if self._last and optimizer.has_selection():  # of the checkpoint that is resumed, which was looked at
            self._seen = {name: weakref.ref(optimizer.indices(p)) for name, p, _ in optimizer.sparse_parameters()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the selection, if it is another one than at the last step."""
        optimizer = _sparse_optimizer(trainer)
        if not trainer.is_global_zero or optimizer is None or not optimizer.has_selection():
            return
        if trainer.global_step == self._looked:
            return  # a micro-batch in the middle of a step
        self._looked = trainer.global_step
        current = {name: optimizer.indices(p) for name, p, _ in optimizer.sparse_parameters()}
        if current.keys() == self._seen.keys() and all(current[name] is self._seen[name]() for name in current):
            return
        started = time.perf_counter()
        known, self._seen = bool(self._seen), {name: weakref.ref(indices) for name, indices in current.items()}
        entries = {name: p.numel() for name, p, _ in optimizer.sparse_parameters()}
        chosen = {name: indices.cpu() for name, indices in current.items()}
        unchanged = all(name in self._last and torch.equal(chosen[name], self._last[name]) for name in chosen)
        if not known and self._last and unchanged:
            return  # of the checkpoint that is resumed
        metrics = self._metrics(chosen, entries)
        self.history.append((trainer.global_step, metrics))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.seconds += time.perf_counter() - started

    def _metrics(self, chosen: dict[str, Tensor], entries: dict[str, int]) -> dict[str, float]:
        sums: dict[str, dict[str, list[float]]] = {}
        layers = layer_types(list(chosen))
        for name, indices in chosen.items():
            first = self._first.setdefault(name, indices)
            ever = self._ever.get(name)
            self._ever[name] = indices if ever is None else torch.cat([ever, indices]).unique()
            shares: dict[str, tuple[float, int]] = {"selection_ever": (len(self._ever[name]), entries[name])}
            if ever is not None and len(indices):
                fresh = 1 - overlap(indices, self._last[name])
                shares["selection_replaced"] = (fresh * len(indices), len(indices))
                shares["selection_since_first"] = ((1 - overlap(indices, first)) * len(indices), len(indices))
            self._last[name] = indices
            for metric, (part, whole) in shares.items():
                for layer in (layers[name], "all"):
                    total = sums.setdefault(metric, {}).setdefault(layer, [0.0, 0.0])
                    total[0] += part
                    total[1] += whole
        return {f"{metric}/{layer}": p / w for metric, found in sums.items() for layer, (p, w) in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The first and the last selection, and what was ever selected, by parameter."""
        return {"first": self._first, "last": self._last, "ever": self._ever}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._first, self._last, self._ever = (dict(state_dict[key]) for key in ("first", "last", "ever"))


def _sparse_optimizer(trainer: pl.Trainer) -> SparseAdamW | None:
    found = [o for o in trainer.optimizers if isinstance(o, SparseAdamW)]
    return next((o for o in found if any(True for _ in o.sparse_parameters())), None)
