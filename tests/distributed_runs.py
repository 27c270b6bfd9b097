"""Training runs of one tiny model under each strategy, for the tests that compare them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from foreign import Regression
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lift_lightning import LiftLightningModule, SelectionConfig, SparseAdamW, build_param_groups, refresh_masks
from lift_lightning.callbacks import MaskRefreshCallback, StepCheckpoint
from lift_lightning.datamodules import Math10KDataModule
from lift_lightning.strategies import FSDP2Strategy

# 84 training rows, 8 to a step: 10 steps of two micro-batches an epoch, then one of the 4 rows that are left.
GLOBAL_BATCH, STEPS, INTERVAL, SAVED = 8, 20, 7, 10


def strategy_of(name: str) -> Any:
    if name == "fsdp2 folder":
        return FSDP2Strategy(save_distributed_checkpoint=True)
    return {"single": "auto", "ddp": "ddp", "fsdp2": "fsdp2"}[name]


def trainer_of(name: str, ranks: int, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": ranks,
        "max_steps": STEPS,
        "max_epochs": 10,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, StepCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    warnings.filterwarnings(
        "ignore", message=".*callbacks used to create the checkpoint.*|.*num_workers.*|.*barrier.*|.*pin_memory.*"
    )
    return pl.Trainer(callbacks=list(callbacks), **{"strategy": strategy_of(name), **defaults, **settings})


def data_of(rows: Path, model: Path, ranks: int, **settings: Any) -> Math10KDataModule:
    defaults = {"batch_size": GLOBAL_BATCH // 2 // ranks, "val_size": 17, "cache_dir": str(rows.parent / "cache")}
    return Math10KDataModule(str(rows), tokenizer=str(model), **{**defaults, **settings})


def module_of(model: Path, **settings: Any) -> LiftLightningModule:
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    return LiftLightningModule(str(model), **{**defaults, **settings})


def refresh_of(**settings: Any) -> MaskRefreshCallback:
    return MaskRefreshCallback(**{"interval": INTERVAL, "rank": 3, "lra_rank": 4, **settings})


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, on every rank."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


class FirstMasks(pl.Callback):
    """Keeps the selections of all ranks as they were after each refresh, by step."""

    def __init__(self) -> None:
        self.masks: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        optimizer = trainer.optimizers[0]
        step = optimizer.attempted_steps + 1
        if step in (1, INTERVAL, 2 * INTERVAL) and step not in self.masks:
            saved = optimizer.sparse_state_dict()["parameters"]
            self.masks[step] = {name: tensors["indices"].long().clone() for name, tensors in saved.items()}


def fit(
    name: str,
    ranks: int,
    model: Path,
    rows: Path,
    folder: Path | None,
    dtype: torch.dtype,
    resume: Path | None = None,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """One run; saves a checkpoint at step SAVED into `folder`."""
    torch.set_default_dtype(dtype)
    pl.seed_everything(1, verbose=False)
    masks, refresh = FirstMasks(), refresh_of()
    callbacks = [refresh, masks]
    if folder is not None:
        callbacks.append(StepCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1))
    trainer, module = trainer_of(name, ranks, *callbacks, accelerator=accelerator), module_of(model)
    trainer.fit(module, datamodule=data_of(rows, model, ranks), ckpt_path=None if resume is None else str(resume))
    optimizer = trainer.optimizers[0]
    sparse = {name: parameter for name, parameter, _ in optimizer.sparse_parameters()}
    local = {name: optimizer.indices(parameter).numel() for name, parameter in sparse.items()}
    state = optimizer.sparse_state_dict()
    found = {
        "weights": {n: whole(p) for n, p in module.hf_model.named_parameters()},
        "state": state,
        "masks": masks.masks,
        "selected_here": local,
        "steps": [step for step, _ in refresh.history],
        "solvers": [report.solvers for _, report in refresh.history],
        "imbalance": [report.imbalance for _, report in refresh.history],
        "overlap": [report.overlap for _, report in refresh.history],
        "loss": float(trainer.callback_metrics["train_loss"]),
        "norm": float(trainer.callback_metrics["grad_norm"]),
        "sent_bytes": None if module._sum is None else module._sum.sent_bytes,
        "global_step": trainer.global_step,
    }
    torch.set_default_dtype(torch.float32)
    return found


def validate(name: str, ranks: int, model: Path, rows: Path) -> float:
    """Loss over 17 held-out rows, which no number of ranks divides."""
    trainer, module = trainer_of(name, ranks, limit_val_batches=1.0), module_of(model)
    (metrics,) = trainer.validate(module, datamodule=data_of(rows, model, ranks), verbose=False)
    return metrics["val_loss"]


class FrozenRegression(Regression):
    """The project that is not ours.

    DDP waits for a gradient of all that is not frozen when it wraps the module, which is before `configure_optimizers`.
    """

    def configure_model(self) -> None:
        build_param_groups(self, r"net\.\d\.weight", "head")


class ShardedRegression(Regression):
    """The same, sharded by its own means."""

    def configure_model(self) -> None:
        if not isinstance(self.head.weight, DTensor):
            for part in (self.net, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def foreign(name: str, ranks: int, rank: int = 0) -> dict[str, Tensor]:
    """Automatic optimization with accumulation, clipping, dense parameters and refreshes; the weights at the end."""
    module = ShardedRegression() if name.startswith("fsdp2") else FrozenRegression()
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(24, 12, generator=generator), torch.randn(24, 3, generator=generator))
    refresh = MaskRefreshCallback(interval=3, density=0.3, lra_rank=2)
    settings = {"max_epochs": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    trainer = trainer_of(name, ranks, refresh, use_distributed_sampler=False, **settings)  # Lightning's would shuffle
    order = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=4 // ranks, sampler=order))
    assert [step for step, _ in refresh.history] == [1, 3, 6, 9, 12]
    return {name: whole(parameter) for name, parameter in module.named_parameters()}


def not_finite(rank: int, ranks: int, sharded: bool) -> str:
    """What this rank raises when a weight is not finite, in the shard of the last rank if there are shards."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(5)))
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = SparseAdamW(build_param_groups(net, "."))
    if rank == ranks - 1 or not sharded:  # whole copies are the same on all ranks
        weight = net[2].weight.detach()
        (weight.to_local() if isinstance(weight, DTensor) else weight)[-1, 3] = float("nan")
    try:
        refresh_masks(optimizer, SelectionConfig(density=0.1, lra_rank=2))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank: int, ranks: int, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs, one after the other, in the same processes."""
    return [fit(ranks=ranks, **call) for call in calls]


def other_work(rank: int, ranks: int, name: str, inputs: dict[str, Path]) -> dict[str, Any]:
    """What needs no checkpoint."""
    found = {"val_loss": validate(name, ranks, **inputs), "foreign": foreign(name, ranks, rank)}
    return {**found, "not finite": not_finite(rank, ranks, sharded=name == "fsdp2")}
