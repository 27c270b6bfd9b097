"""A Lightning project that is not ours: a small regression, automatic optimization, no transformers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lift_lightning import SelectionConfig, SparseAdamW, build_param_groups, select_indices


def loader(rows: int = 24, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 12, generator=generator)
    y = torch.randn(rows, 3, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


class Regression(pl.LightningModule):
    """12 -> 16 -> 3; the last layer is trained densely where `dense_head` says so."""

    def __init__(self, make_optimizer: str = "sparse", weight_decay: float = 0.1, dense_head: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh())
            self.head = nn.Linear(16, 3)
        self.make_optimizer = make_optimizer
        self.weight_decay = weight_decay
        self.dense_head = dense_head
        self.norms: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.net(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": self.weight_decay}
        groups = build_param_groups(self, r"net\.\d\.weight", "head" if self.dense_head else ())
        if self.make_optimizer == "sparse":
            return SparseAdamW(groups, **settings)
        return torch.optim.AdamW([p for g in groups for _, p in g["params"]], **settings)


class MaskedDense(pl.Callback):
    """The oracle: dense AdamW whose gradients, moments and updates are masked, on the schedule of Algorithm 1."""

    def __init__(self, interval: int, config: SelectionConfig) -> None:
        self.interval, self.config = interval, config
        self.masks: dict[nn.Parameter, Tensor] = {}
        self.before: dict[nn.Parameter, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.targets = [p for name, p in pl_module.named_parameters() if name.startswith("net") and p.ndim == 2]
        self._refresh(trainer)
        for parameter in self.targets:
            parameter.register_hook(lambda grad, p=parameter: grad * self.masks[p])

    def _refresh(self, trainer: pl.Trainer) -> None:
        for parameter in self.targets:
            mask = torch.zeros(parameter.numel())
            mask[select_indices(parameter.detach(), self.config)] = 1.0
            self.masks[parameter] = mask.view_as(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in trainer.optimizers[0].state[parameter]:
                    trainer.optimizers[0].state[parameter][key].mul_(self.masks[parameter])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        first_micro_batch = batch_idx % trainer.accumulate_grad_batches == 0
        if first_micro_batch and (trainer.global_step + 1) % self.interval == 0:
            self._refresh(trainer)
        self.before = {p: p.detach().clone() for p in self.targets}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for p in self.targets:  # weight decay reached the unselected entries: take it back
            p.data.copy_(torch.where(self.masks[p] == 1, p.data, self.before[p]))


def fit(module: pl.LightningModule, callback: pl.Callback, *, data: DataLoader | None = None, **settings: Any):
    """A quiet Trainer on the CPU that has run."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [callback, *settings.pop("callbacks", [])]
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(callbacks=callbacks, **{**defaults, **settings})
    trainer.fit(module, data if data is not None else loader(), ckpt_path=ckpt_path)
    return trainer
