"""Checkpoints of whole tensors, as a single process writes them, from ranks that share them and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.fsdp._common_utils import FSDP_PREFIX
from torch.optim import Optimizer

from lift_lightning.sharding.owned import Owned, local, owned, step_shape
from lift_lightning.sharding.ranks import Ranks


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with whole tensors, on the CPU of rank 0; elsewhere nothing. Every rank has to call it.

    One parameter at a time is whole on the device of rank 0. What torch has for FSDP1 gathers all of a unit, and does
    not work on the CPU (torch 2.13: it ends in a segmentation fault).

    Args:
        model: of which modules may be wrapped by FSDP1; their prefixes are not in the names.
    """
    tensors: dict[int, Tensor | None] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in _named_tensors(model):
        if id(tensor) not in tensors:  # tied ones once
            tensors[id(tensor)] = _whole(tensor, owned(tensor))
        if (whole := tensors[id(tensor)]) is not None:
            found[name] = whole
    return found


def whole_optimizer_state(optimizer: Optimizer, ranks: Ranks | None) -> dict[str, Any]:
    """The same for an optimizer's state dict. A rank may have no state of a parameter that it has nothing of."""
    saved = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Counters as they are, and of tensors with an entry for each of the parameter's the dtype.
    mine = {
        i: {key: value.dtype if value.dim() else value.cpu() for key, value in values.items()}
        for i, values in saved["state"].items()
    }
    theirs = [mine] if ranks is None else ranks.objects(mine)
    state: dict[int, dict[str, Tensor]] = {}
    for i, parameter in enumerate(parameters):
        kinds = next((one[i] for one in theirs if i in one), {})
        here = saved["state"].get(i, {})
        state[i] = {}
        for key, kind in kinds.items():
            if isinstance(kind, Tensor):
                state[i][key] = kind
                continue
            part = here[key] if key in here else parameter.new_empty(0, dtype=kind)
            whole = _whole(part, owned(parameter))
            if whole is not None:
                state[i][key] = whole
    return {**saved, "state": {i: values for i, values in state.items() if values}}


def read_parts(folder: Path) -> dict[str, Any]:
    """What ranks wrote into a folder by torch.distributed.checkpoint, with whole tensors on the CPU."""
    parts: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(parts, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    return parts


def _whole(tensor: Tensor, mine: Owned) -> Tensor | None:
    if mine.group is None:
        return tensor.detach().cpu()
    found = Ranks(mine.group).gather(local(tensor).reshape(-1))
    return None if found is None else found.view(mine.shape).cpu()


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers, tied ones by each of their names."""
    found: list[tuple[str, Tensor]] = [
        (name.replace(FSDP_PREFIX, ""), p) for name, p in model.named_parameters(remove_duplicate=False)
    ]
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}".replace(FSDP_PREFIX, "").lstrip("."), buffer))
    return found


def load_whole_states(
    model: nn.Module,
    weights: dict[str, Any],
    optimizers: Sequence[tuple[Optimizer, dict[str, Any]]],
    *,
    strict: bool,
) -> None:
    """Give each rank its part of a checkpoint that holds whole tensors, whichever strategy wrote it.

    Args:
        model: sharded.
        weights: its state dict; every rank has it.
        optimizers: each with the state dict that it, or that of an unsharded model, saved. Parameters are found by
            their place in the groups: numbers mean one thing to torch's own optimizers and another to FSDP's.
        strict: every weight must be there, and no other.
    """
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=strict))
    names = {id(parameter): name.replace(FSDP_PREFIX, "") for name, parameter in model.named_parameters()}
    for optimizer, saved in optimizers:
        groups: list[dict[str, Any]] = []
        named: dict[Any, str] = {}
        for theirs, mine in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group = [names[id(parameter)] for parameter in mine["params"]]
            named.update(zip(theirs["params"], group, strict=True))
            groups.append({**theirs, "params": group})
        state: dict[str, Any] = {named[key]: dict(values) for key, values in saved["state"].items()}
        # A step is a step, whichever shape its counter has.
        shapes = {names[id(p)]: step_shape(p) for group in optimizer.param_groups for p in group["params"]}
        for name, values in state.items():
            if "step" in values:
                values["step"] = values["step"].reshape(shapes[name])
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
