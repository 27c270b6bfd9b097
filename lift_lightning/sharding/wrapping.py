"""How a model is split over ranks: by FSDP2, or by FSDP1."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lift_lightning.errors import ConfigError
from lift_lightning.sharding.owned import note_flattened


def fully_shard_model(model: nn.Module, mesh: DeviceMesh, blocks: Sequence[str], precision: str) -> None:
    """FSDP2: one unit for each block and one for the rest.

    Args:
        model: on any device.
        mesh: one-dimensional.
        blocks: class names of the blocks, of transformers: the model's `_no_split_modules`.
        precision: the Trainer's. Gradients of bfloat16 are summed over the ranks in float32.

    Raises:
        ConfigError: if the model has none of the blocks.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32 if precision.startswith("bf16") else None,
    )
    for block in _blocks_of(model, blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def allocate(model: Any, device: torch.device) -> None:
    """Give what of a sharded model is on the meta device memory on another one, where its buffers go too.

    Args:
        model: that can tie its weights again, as those of transformers can: here they come apart.
    """
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    model.tie_weights()


def flatten_model(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    device: torch.device,
    mixed_precision: MixedPrecision | None = None,
    **kwargs: Any,
) -> FullyShardedDataParallel:
    """FSDP1: one unit for each block and one for the rest; parameters keep their names.

    Args:
        model: on any device.
        blocks: class names of the blocks, of transformers: the model's `_no_split_modules`.
        device: of this rank.
        mixed_precision: of parameters and gradients. Buffers keep their dtype: rotary frequencies in bfloat16 are
            another model.
        **kwargs: of `FullyShardedDataParallel`; an `auto_wrap_policy` among them is used in place of the blocks.

    Raises:
        ConfigError: if the model has none of the blocks, or the ranks would not split it.
    """
    if kwargs.get("auto_wrap_policy") is None and blocks:
        kwargs["auto_wrap_policy"] = ModuleWrapPolicy({type(block) for block in _blocks_of(model, blocks)})
    kwargs["use_orig_params"] = True
    if mixed_precision is not None:
        mixed_precision = replace(mixed_precision, buffer_dtype=None)
    with warnings.catch_warnings():
        # Norms, which are frozen while matrices are not: their gradients are a thousandth of the whole.
        warnings.filterwarnings("ignore", message="(?s).*both parameters with requires_grad=True and False")
        wrapped = FullyShardedDataParallel(model, device_id=device, mixed_precision=mixed_precision, **kwargs)
    note_flattened(wrapped)
    return wrapped


def is_flattened(model: nn.Module) -> bool:
    """Whether it is wrapped by FSDP1 itself."""
    return isinstance(model, FullyShardedDataParallel)


def has_flattened(model: nn.Module) -> bool:
    """Whether it, or a module of it, is."""
    return any(map(is_flattened, model.modules()))


def _blocks_of(model: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    found = [module for module in model.modules() if type(module).__name__ in blocks]
    if not found:
        raise ConfigError(f"{type(model).__name__} has none of the blocks {list(blocks)} to shard it by")
    return found
