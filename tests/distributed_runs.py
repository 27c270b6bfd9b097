"""Training runs of one tiny model under each strategy, for the tests that compare them."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from foreign import Regression
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lift_lightning import LiftLightningModule, SelectionConfig, SparseAdamW, build_param_groups, refresh_masks
from lift_lightning.callbacks import MaskRefreshCallback, StepCheckpoint
from lift_lightning.datamodules import Math10KDataModule
from lift_lightning.sharding import flatten_model, local, whole_weights
from lift_lightning.strategies import META_FILE, FSDP1Strategy, FSDP2Strategy

# 84 training rows, 8 to a step: 10 steps of two micro-batches an epoch, then one of the 4 rows that are left.
GLOBAL_BATCH, STEPS, INTERVAL, SAVED = 8, 20, 7, 10


class PlainFSDP(FSDPStrategy):
    """Lightning's `strategy: fsdp`, of which the Trainer knows only subclasses not to need a GPU."""


def strategy_of(name: str) -> Any:
    if name == "fsdp2 folder":
        return FSDP2Strategy(save_distributed_checkpoint=True)
    if name == "fsdp plain":
        return PlainFSDP(state_dict_type="sharded")  # the other kind of Lightning's crashes on the CPU
    if name == "fsdp1 folder":
        return FSDP1Strategy(state_dict_type="sharded")
    return "auto" if name == "single" else name


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
    trainer = pl.Trainer(callbacks=list(callbacks), **{"strategy": strategy_of(name), **defaults, **settings})
    if isinstance(trainer.strategy, FSDPStrategy):
        # Lightning's plugin for FSDP1 sets float32 as default for the model, also where the test's is float64.
        trainer.precision_plugin._desired_input_dtype = torch.get_default_dtype()
    return trainer


def data_of(rows: Path, model: Path, ranks: int, **settings: Any) -> Math10KDataModule:
    defaults = {"batch_size": GLOBAL_BATCH // 2 // ranks, "val_size": 17, "cache_dir": str(rows.parent / "cache")}
    return Math10KDataModule(str(rows), tokenizer=str(model), **{**defaults, **settings})


def module_of(model: Path, **settings: Any) -> LiftLightningModule:
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    return LiftLightningModule(str(model), **{**defaults, **settings})


def refresh_of(**settings: Any) -> MaskRefreshCallback:
    return MaskRefreshCallback(**{"interval": INTERVAL, "rank": 3, "lra_rank": 4, **settings})


def weights_of(trainer: pl.Trainer, prefix: str = "") -> dict[str, Tensor]:
    """All of the model's parameters, by name; of a model that is split over ranks on rank 0 only."""
    assert trainer.strategy.model is not None
    found = whole_weights(trainer.strategy.model)
    return {name.removeprefix(prefix): weight.clone() for name, weight in found.items()}


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


class Dies(pl.Callback):
    """Rank `rank` gets SIGKILL when step `step` begins."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank and trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class DiesWhileSaving(pl.Callback):
    """Rank 0 gets SIGKILL when half of the checkpoint of the last step is written."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank or trainer.global_step < STEPS:
            return

        def half(opener: Any, content: bytes) -> None:
            opener.f.write(content[: len(content) // 2])
            opener.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(file, Path) and file.name == META_FILE:
                os.kill(os.getpid(), signal.SIGKILL)
            whole_save(content, file, *args, **kwargs)

        whole_save, torch.save = torch.save, save  # into a folder
        LocalFileOpener.write = half  # of a file, as Lightning writes it


def fit(
    name: str,
    ranks: int,
    model: Path,
    rows: Path,
    folder: Path | None,
    dtype: torch.dtype,
    resume: Path | None = None,
    callback: pl.Callback | None = None,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """One run; saves a checkpoint at step SAVED into `folder`."""
    torch.set_default_dtype(dtype)
    pl.seed_everything(1, verbose=False)
    masks, refresh = FirstMasks(), refresh_of()
    callbacks = [refresh, masks] if callback is None else [refresh, masks, callback]
    if folder is not None:
        callbacks.append(StepCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1))
    trainer, module = trainer_of(name, ranks, *callbacks, accelerator=accelerator), module_of(model)
    trainer.fit(module, datamodule=data_of(rows, model, ranks), ckpt_path=None if resume is None else str(resume))
    optimizer = trainer.optimizers[0]
    sparse = {name: parameter for name, parameter, _ in optimizer.sparse_parameters()}
    local = {name: optimizer.indices(parameter).numel() for name, parameter in sparse.items()}
    state = optimizer.sparse_state_dict()
    found = {
        "weights": weights_of(trainer, "model."),
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


def answers(name: str, ranks: int, model: Path, rows: Path, folder: Path) -> tuple[dict[str, float], str]:
    """Metrics of `test` over 5 rows, which no number of ranks divides, and the predictions that it wrote."""
    module = module_of(model, predictions_dir=str(folder), num_beams=2, max_new_tokens=12, unknown_tasks="number")
    data = data_of(rows, model, ranks, test_path={"mine": str(rows)}, test_limit=5, eval_batch_size=1)
    (metrics,) = trainer_of(name, ranks).test(module, datamodule=data, verbose=False)
    return metrics, (folder / "mine.jsonl").read_text()


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
    module = {"fsdp2": ShardedRegression, "fsdp1": Regression}.get(name, FrozenRegression)()
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(24, 12, generator=generator), torch.randn(24, 3, generator=generator))
    refresh = MaskRefreshCallback(interval=3, density=0.3, lra_rank=2)
    settings = {"max_epochs": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    trainer = trainer_of(name, ranks, refresh, use_distributed_sampler=False, **settings)  # Lightning's would shuffle
    order = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=4 // ranks, sampler=order))
    assert [step for step, _ in refresh.history] == [1, 3, 6, 9, 12]
    return weights_of(trainer)


class ManualRegression(Regression):
    """What FSDP1 trains wrong, if it wraps it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def refused(name: str, ranks: int) -> str:
    """Why a Trainer does not train it."""
    trainer = trainer_of(name, ranks, MaskRefreshCallback(density=0.3, lra_rank=2))
    try:
        trainer.fit(ManualRegression(), DataLoader(TensorDataset(torch.randn(8, 12), torch.randn(8, 3))))
    except MisconfigurationException as error:
        return str(error)
    return "nothing"


def not_finite(rank: int, ranks: int, name: str) -> str:
    """What this rank raises when a weight is not finite, in the shard of the last rank if there are shards."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(5)))
    third = net[2].weight
    if name == "fsdp2":
        fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
        third = net[2].weight
    elif name == "fsdp1":
        net = flatten_model(net, (), device=torch.device("cpu"))
    optimizer = SparseAdamW(build_param_groups(net, "."))
    here = local(third).reshape(-1)
    if here.numel() and (rank == ranks - 1 or name != "fsdp2"):  # whole copies are the same on all ranks
        here[-3] = float("nan")
    try:
        refresh_masks(optimizer, SelectionConfig(density=0.1, lra_rank=2))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank: int, ranks: int, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs, one after the other, in the same processes."""
    return [fit(ranks=ranks, **call) for call in calls]


def other_work(rank: int, ranks: int, name: str, inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """What needs no checkpoint."""
    found: dict[str, Any] = {"val_loss": validate(name, ranks, **inputs), "foreign": foreign(name, ranks, rank)}
    if name == "fsdp1":
        found["refused"] = refused(name, ranks)
    else:
        found["answers"] = answers(name, ranks, **inputs, folder=folder)
    return {**found, "not finite": not_finite(rank, ranks, name)}
