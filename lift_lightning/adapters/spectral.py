"""Spectral Adapter, additive form (arXiv 2405.13952): the leading singular vectors of a weight are fine-tuned.

Letters: M, N rows and columns of the weight (outputs and inputs of the layer); r rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lift_lightning.errors import ConfigError


class SpectralLinear(nn.Module):
    """A linear layer whose top r singular directions U1 S1 V1^T become (U1 + A_U) S1 (V1 + A_V)^T.

    A_U (M, r) and A_V (N, r), which begin at zero, are trained; the weight itself stays, and so do the outputs at the
    start, to the bit: what the adapter adds is a difference of two equal products then.

    Args:
        base_layer: whose weight is decomposed here, in float32 or better.
        rank: r, at most min(M, N).
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = base_layer.weight.detach()
        left, values, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), False)
        self.base_layer = base_layer
        self.register_buffer("left", left[:, :rank].to(weight.dtype).contiguous())
        self.register_buffer("values", values[:rank].to(weight.dtype))
        self.register_buffer("right", right[:rank].T.to(weight.dtype).contiguous())
        self.spectral_u = nn.Parameter(torch.zeros_like(self.left))
        self.spectral_v = nn.Parameter(torch.zeros_like(self.right))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., N) -> (..., M)."""
        moved = (inputs @ (self.right + self.spectral_v) * self.values) @ (self.left + self.spectral_u).T
        before = (inputs @ self.right * self.values) @ self.left.T
        outputs: Tensor = self.base_layer(inputs)
        return outputs + (moved - before)

    def delta(self) -> Tensor:
        """(M, N): what the adapter adds to the weight."""
        moved = ((self.left + self.spectral_u) * self.values) @ (self.right + self.spectral_v).T
        return (moved - (self.left * self.values) @ self.right.T).detach()


def put_spectral(model: nn.Module, names: Iterable[str], rank: int) -> None:
    """Replace linear layers of the model, by name, in place.

    Raises:
        ConfigError: if one of them is no `nn.Linear`, or has a side below the rank.
    """
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ConfigError(f"method=spectral adapts nn.Linear, and {name!r} is {type(layer).__name__}: use lora")
        if rank > min(layer.weight.shape):
            raise ConfigError(
                f"method=spectral: adapter_rank={rank} is more than the shorter side of {name!r}, "
                f"{min(layer.weight.shape)}"
            )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, SpectralLinear(layer, rank))


def spectral_layers(model: nn.Module) -> dict[str, SpectralLinear]:
    """Those of a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SpectralLinear)}


@torch.no_grad()
def merge_spectral(model: nn.Module) -> None:
    """Put plain layers back, in place, whose weights have the adapters added."""
    for name, layer in spectral_layers(model).items():
        layer.base_layer.weight += layer.delta()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.base_layer)
