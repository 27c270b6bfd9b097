"""Which entries of a parameter are on this rank: of plain parameters, FSDP2's DTensors and FSDP1's flat slices.

Letters: M, N rows and columns of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.weak import WeakTensorKeyDictionary

from lift_lightning.errors import ConfigError

# Of FSDP1's parameters, which are vectors that do not know what they are slices of.
_FLATTENED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Owned:
    """Where this rank's entries of a parameter lie in the whole.

    Attributes:
        shape: of the whole parameter.
        start: first flat index that is here.
        stop: the one after the last; equal to `start` where this rank has none.
        group: of the ranks that the parameter is split over; None where all of it is here.
    """

    shape: torch.Size
    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    @property
    def numel(self) -> int:
        """Entries of the whole parameter."""
        return self.shape.numel()


def owned(parameter: Tensor) -> Owned:
    """Which entries of the parameter this rank has.

    Raises:
        ConfigError: if they are not one contiguous range of rows, as under tensor parallelism, or FSDP1 has flattened
            the parameter and `note_flattened` did not see it.
    """
    if not isinstance(parameter, DTensor):
        known: Owned | None = _FLATTENED.get(parameter)
        if known is None and getattr(parameter, "_fsdp_flattened", False):
            raise ConfigError(
                f"FSDP1 has flattened this parameter into a vector of {parameter.numel()} entries, and the model that "
                "it wrapped is not known here: give build_param_groups the outermost FullyShardedDataParallel module "
                "(in Lightning: self.trainer.strategy.model)"
            )
        return known or Owned(parameter.shape, 0, parameter.numel())
    mesh, placements = parameter.device_mesh, parameter.placements
    split = [i for i, placement in enumerate(placements) if placement != Replicate()]
    if not split:
        return Owned(parameter.shape, 0, parameter.numel())
    if len(split) > 1 or placements[split[0]] != Shard(0):
        raise ConfigError(
            f"a parameter of shape {tuple(parameter.shape)} is laid out as {placements}: LIFT trains parameters that "
            "are split into contiguous rows over one dimension of the mesh, as fully_shard does, and not by tensor "
            "parallelism"
        )
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    row = parameter.shape[1:].numel()
    start = min(offset[0] * row, parameter.numel())
    return Owned(parameter.shape, start, start + torch.Size(shape).numel(), mesh.get_group(split[0]))


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a parameter or gradient: a plain tensor that shares its memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def is_absent(parameter: Tensor) -> bool:
    """Whether FSDP1 has left nothing of a parameter to this rank: it gets no gradient, and may have no state."""
    mine = owned(parameter)
    return mine.group is not None and mine.start == mine.stop and not isinstance(parameter, DTensor)


def step_shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the counter that an optimizer keeps for it: of FSDP2's parameters torch saves and loads vectors only."""
    return (1,) if isinstance(parameter, DTensor) else ()


def note_flattened(model: nn.Module) -> None:
    """Keep in mind where the parameters lie that FSDP1 has flattened, in the model or in modules of it.

    What torch shows of them is a vector, of this rank's entries. Shape and place are with the flat parameter of their
    unit (`torch/distributed/fsdp/_flat_param.py`), in attributes without a promise that have been there since 2.1.

    Raises:
        ConfigError: if a unit was wrapped without `use_orig_params`, or has not split its parameters.
    """
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle = unit._handle
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise ConfigError("LIFT tells parameters apart: wrap the model by FSDP1 with use_orig_params=True")
        if not handle.uses_sharded_strategy:
            raise ConfigError(
                "FSDP1 has not split the model's parameters, for the strategy is NO_SHARD or there is one process: "
                "use DDP, or no strategy on a single device"
            )
        flat = handle.flat_param
        for parameter, shape, shard in zip(flat._params or (), flat._shapes, flat._shard_param_infos, strict=True):
            start, stop = shard.intra_param_start_idx or 0, 0
            if shard.intra_param_end_idx is not None:
                stop = shard.intra_param_end_idx + 1
            _FLATTENED[parameter] = Owned(shape, start, stop, unit.process_group)
