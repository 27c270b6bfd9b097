"""Spectral Adapter in its additive form (arXiv 2405.13952, section 3): singular vectors are trained, not the weight.

Letters: M, N outputs and inputs of a layer; r rank. W = U S V^T; of the top r triplets U1 (M, r), S1 (r), V1 (N, r) the
vectors get A_U (M, r) and A_V (N, r), which begin at zero: W_new = (U1 + A_U) S1 (V1 + A_V)^T + the rest of W.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lift_lightning.lowrank import check_finite


class SpectralLinear(nn.Module):
    """A linear layer whose leading singular vectors are trained; its own weight stays as it is.

    Args:
        base_layer: with a weight (M, N).
        rank: r, at most min(M, N).
        decompose: False leaves U1, S1, V1 at zero, for values that are loaded next.

    Raises:
        DecompositionError: if the weight holds NaN or infinity.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, *, decompose: bool = True) -> None:
        super().__init__()
        weight = base_layer.weight.detach()
        self.base_layer = base_layer
        if decompose:
            check_finite(weight)
            left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
            u, s, v = left[:, :rank], values[:rank], right[:rank].T
        else:
            u, s, v = (weight.new_zeros(size) for size in ((weight.shape[0], rank), (rank,), (weight.shape[1], rank)))
        # Persistent: a checkpoint must not depend on the signs that another machine's decomposition gives.
        self.register_buffer("spectral_u", u.to(weight.dtype).contiguous())
        self.register_buffer("spectral_s", s.to(weight.dtype).contiguous())
        self.register_buffer("spectral_v", v.to(weight.dtype).contiguous())
        self.spectral_a_u = nn.Parameter(torch.zeros_like(self.spectral_u))
        self.spectral_a_v = nn.Parameter(torch.zeros_like(self.spectral_v))

    spectral_u: Tensor
    spectral_s: Tensor
    spectral_v: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N) -> (..., M). What the change adds is multiplied out, so that it is zero at the start, to the bit.

        (V1 + A_V) S1 (U1 + A_U)^T - V1 S1 U1^T = V1 S1 A_U^T + A_V S1 (U1 + A_U)^T
        """
        old = (x @ self.spectral_v) * self.spectral_s
        new = (x @ self.spectral_a_v) * self.spectral_s
        change = old @ self.spectral_a_u.T + new @ (self.spectral_u + self.spectral_a_u).T
        out: Tensor = self.base_layer(x)
        return out + change.to(out.dtype)

    def merged(self) -> nn.Linear:
        """The base layer with W_new (M, N) as its weight, summed in float32."""
        u, s, v = self.spectral_u.float(), self.spectral_s.float(), self.spectral_v.float()
        a_u, a_v = self.spectral_a_u.detach().float(), self.spectral_a_v.detach().float()
        weight = self.base_layer.weight
        change = (a_u * s) @ v.T + ((u + a_u) * s) @ a_v.T
        weight.data = (weight.detach().float() + change).to(weight.dtype)
        return self.base_layer


def put_on_spectral(model: nn.Module, names: Iterable[str], rank: int, *, decompose: bool = True) -> None:
    """Replace the named `nn.Linear` layers, decomposing one matrix at a time."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), "adapter_targets refuses others"
        model.set_submodule(name, SpectralLinear(layer, rank, decompose=decompose))
