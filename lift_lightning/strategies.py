"""FSDP2 and FSDP1 as strategies of their own, which a Trainer finds by the names `fsdp2` and `fsdp1`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from lift_lightning.errors import CheckpointError, ConfigError
from lift_lightning.sharding import (
    all_ranks,
    flatten_model,
    has_flattened,
    load_whole_states,
    whole_optimizer_state,
    whole_weights,
)

# In the folder of a checkpoint in parts, what is not weights or optimizer state; it is written last.
META_FILE = "meta.pt"
# In a checkpoint, the weights without those of the base, where `save_base_weights` is off.
WEIGHTS_KEY = "lift_lightning_delta"


class ReadsAllCheckpoints(ParallelStrategy):
    """What the strategies here add to Lightning's: each resumes from the checkpoints of any."""

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a file, whichever strategy wrote it, or of a folder that this one wrote.

        Raises:
            CheckpointError: if a folder is not whole, as after a process was killed while it saved.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_file():
            check_folder(path)
            return super().load_checkpoint(path, weights_only)
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        if WEIGHTS_KEY in checkpoint:
            raise CheckpointError(
                f"{str(path)!r} was saved with save_base_weights off, and its weights are no whole model that could be "
                "split over devices: resume it on one device or by ddp"
            )
        assert self.model is not None
        assert self.lightning_module is not None
        states = checkpoint["optimizer_states"] if self.optimizers else []
        load_whole_states(
            self.model,
            checkpoint.pop("state_dict"),
            list(zip(self.optimizers, states, strict=True)),
            strict=self.lightning_module.strict_loading,
        )
        return checkpoint


class FSDP2Strategy(ReadsAllCheckpoints, ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` for FSDP2 over all devices of all nodes.

    Lightning's own default shards over the nodes only and splits matrices within them, so that on one node nothing is
    sharded. The module's `configure_model` calls `fully_shard` on the mesh `self.device_mesh["data_parallel"]`, as
    `LiftLightningModule` does.

    Args:
        save_distributed_checkpoint: a folder to which each rank writes its part, instead of one file. `export` and
            other strategies read files only.
        process_group_backend: of torch.distributed; chosen by the device if not given.
        timeout: of collectives.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Start or join the processes, and make the mesh of all of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Under the name that configurations use."""
        strategy_registry.register("fsdp2", cls, description="FSDP2 over all devices", override=True)


class FSDP1Strategy(ReadsAllCheckpoints, FSDPStrategy):
    """Lightning's `FSDPStrategy`, with checkpoints that every strategy reads and writes.

    FSDP1 is the older FSDP of torch; take `FSDP2Strategy` for what is new. Beside the checkpoints, this one also runs
    on the CPU, and leaves the dtype of buffers alone under a lower precision. Its arguments are those of
    `FSDPStrategy`: with `state_dict_type="sharded"` each rank writes its part into a folder.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if has_flattened(model):
            return super()._setup_model(model)
        flattened = flatten_model(
            model,
            (),
            device=self.root_device,
            mixed_precision=mixed_precision_of(self),
            sharding_strategy=self.sharding_strategy,
            cpu_offload=self.cpu_offload,
            **self.kwargs,
        )
        return super()._setup_model(flattened)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on rank 0, or the parts of each rank."""
        assert self.model is not None
        return super().lightning_module_state_dict() if self._sharded() else whole_weights(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The same of an optimizer."""
        plain = getattr(optimizer, "_optimizer", optimizer)  # without Lightning's wrapper
        return super().optimizer_state(plain) if self._sharded() else whole_optimizer_state(plain, all_ranks())

    def _sharded(self) -> bool:
        return self._state_dict_type == "sharded"

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Under the name that configurations use."""
        strategy_registry.register("fsdp1", cls, description="FSDP1 over all devices", override=True)


def mixed_precision_of(strategy: FSDPStrategy) -> Any:
    """What FSDP1 is to compute in; None leaves it at the dtype of the weights.

    Lightning has FSDP1 cast to float32 under `32-true`, which is not nothing where the default dtype is another.
    """
    if strategy.mixed_precision is None and not strategy.precision_plugin.precision.endswith("mixed"):
        return None
    return strategy.mixed_precision_config


def refuse_split_models(strategy: Strategy) -> None:
    """Under which checkpoints cannot leave the base's weights out.

    Raises:
        ConfigError: if no process has the whole model.
    """
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        raise ConfigError(
            "save_base_weights=false compares whole weights with the base's, and under "
            f"{type(strategy).__name__} no process has those: leave it on, and add DeltaExport for a delta at the end"
        )


def check_folder(path: Path) -> None:
    """Of a checkpoint that ranks wrote in parts.

    Raises:
        FileNotFoundError: if it is not there.
        CheckpointError: if what is written last is missing.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {str(path)!r}")
    missing = [name for name in (".metadata", META_FILE) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"the checkpoint folder {str(path)!r} has no {' and no '.join(missing)}: it was not written to its end; "
            "resume from the one before it"
        )


for _strategy in (FSDP1Strategy, FSDP2Strategy):
    _strategy.register_strategies(StrategyRegistry)
