"""Which matrices carry an adapter, and the rank at which it trains as many numbers as LIFT would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from lift_lightning.adapters.methods import METHODS, AdapterName, Shape, trained_entries
from lift_lightning.errors import ConfigError
from lift_lightning.param_groups import build_param_groups, matrix_views
from lift_lightning.selection_config import SelectionConfig


class Targets(NamedTuple):
    """Where an adapter goes.

    Attributes:
        shapes: (M, N) of each layer's matrix, outputs and inputs, by the name of the layer, in the model's order.
        groups: those that LIFT would train sparsely, as `build_param_groups` returns them.
        dense: names of parameters that are trained whole beside the adapter, such as a new classifier head.
    """

    shapes: dict[str, Shape]
    groups: list[dict[str, Any]]
    dense: list[str]


def adapter_targets(
    model: nn.Module,
    method: AdapterName,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_train: str | Sequence[str] = (),
) -> Targets:
    """Find the layers by the patterns that LIFT uses; see `build_param_groups`. Freezes every other parameter.

    Args:
        model: without an adapter.
        method: whose adapter they are to carry.
        target_modules: presets and regular expressions.
        modules_to_train: what is trained whole, in the same notation.

    Raises:
        ConfigError: if a pattern matches nothing, or a layer that the method does not serve.
    """
    groups = build_param_groups(model, target_modules, modules_to_train)
    shapes: dict[str, Shape] = {}
    for name, parameter in (member for group in groups if group["sparse"] for member in group["params"]):
        layer_name = name.removesuffix(".weight")
        layer = model.get_submodule(layer_name) if layer_name != name else None
        if isinstance(layer, nn.Linear):
            shapes[layer_name] = (parameter.shape[0], parameter.shape[1])
        elif isinstance(layer, Conv1D) and METHODS[method].transposed:
            shapes[layer_name] = (parameter.shape[1], parameter.shape[0])
        else:
            served = "nn.Linear and Conv1D" if METHODS[method].transposed else "nn.Linear"
            kind = "a parameter of fused experts" if layer is None else f"a layer of {type(layer).__name__}"
            raise ConfigError(
                f"{name} is {kind}, and method={method!r} serves {served} only: leave it out of target_modules, or use "
                "method=lift"
            )
    groups_of_lift = [group for group in groups if group["sparse"]]
    in_model_order = {name: shapes[name] for name, _ in model.named_modules() if name in shapes}
    dense = [name for group in groups if not group["sparse"] for name, _ in group["params"]]
    return Targets(in_model_order, groups_of_lift, dense)


def selected_entries(config: SelectionConfig, groups: Sequence[dict[str, Any]], model_entries: int) -> int:
    """How many entries LIFT would train of these matrices, before its budgets are rounded to blocks.

    Args:
        config: of the selection.
        groups: sparse ones of `build_param_groups`.
        model_entries: of the whole model, for `density_of: model`.
    """
    members = [(parameter, group["halves"]) for group in groups for _, parameter in group["params"]]
    resolved = config.of_targets(sum(parameter.numel() for parameter, _ in members), model_entries)
    if resolved.count is not None:
        return resolved.count
    views = [view for parameter, halves in members for view in matrix_views(parameter, halves)]
    return sum(resolved.budget(*view.shape) for view in views)


def matched_rank(method: AdapterName, shapes: Sequence[Shape], budget: int) -> int:
    """The largest rank at which no more than `budget` numbers are trained, and which every matrix allows.

    Args:
        method: of the adapter.
        shapes: (M, N) of each matrix.
        budget: in numbers.

    Raises:
        ConfigError: if rank 1 trains more.
    """
    at_one = trained_entries(method, shapes, 1)
    bounds = [bound for shape in shapes if (bound := METHODS[method].largest_rank(*shape)) is not None]
    if at_one > budget or min(bounds, default=1) < 1:
        raise ConfigError(
            f"match_budget: method={method!r} trains {at_one:,} numbers at rank 1 already, and the selection of the "
            f"lift section {budget:,} entries: set a larger lift.rank or lift.density, or adapter_rank instead"
        )
    # Linear in the rank beyond what the first costs.
    rank = 1 + (budget - at_one) // (trained_entries(method, shapes, 2) - at_one)
    return min([rank, *bounds])
