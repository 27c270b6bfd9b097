"""FSDP2 as a strategy of its own, which a Trainer finds by the name `fsdp2`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from lift_lightning.errors import CheckpointError
from lift_lightning.sharding import load_whole_states


class FSDP2Strategy(ModelParallelStrategy):
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

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a file, whichever strategy wrote it, or of a folder that this one wrote.

        Raises:
            CheckpointError: if a folder is not whole, as after a process was killed while it saved.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_file():
            _check_folder(path)
            return super().load_checkpoint(path, weights_only)
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
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

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Under the name that configurations use."""
        strategy_registry.register("fsdp2", cls, description="FSDP2 over all devices")


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    missing = [name for name in (".metadata", "meta.pt") if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"the checkpoint folder {str(path)!r} has no {' and no '.join(missing)}: it was not written to its end; "
            "resume from the one before it"
        )


if "fsdp2" not in StrategyRegistry.available_strategies():
    FSDP2Strategy.register_strategies(StrategyRegistry)
