"""What is kept for one sparse parameter: vectors of length K, and how they follow its selection and its weight.

Of a parameter that is split over ranks each has the entries that it owns: K and all indices are those of its shard.

Letters: K selected entries of the parameter, K' after a refresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lift_lightning.eight_bit import BlockwiseVector
from lift_lightning.indices import carry, gather, index_dtype, scatter, scatter_add
from lift_lightning.sharding import local

Moment = Tensor | BlockwiseVector  # of K entries
MomentsDtype = torch.dtype | Literal["8bit"]


def working_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which gradients are summed and values updated: float32, or the weight's where that is wider."""
    return torch.promote_types(parameter.dtype, torch.float32)


@dataclass
class SparseState:
    """Indices, moments, master and gradient accumulator of one parameter; every tensor is (K,).

    Attributes:
        indices: flat indices into the parameter, ascending, int32 below 2^31 entries.
        exp_avg: first moment.
        exp_avg_sq: second moment.
        master: float32 copy of the selected entries of a narrower weight, or None.
        grad: gradient summed over the micro-batches of the step, in float32 (float64 for float64 weights); None from
            `zero_grad` to the next backward, so that it takes no memory while the forward pass needs the most.
    """

    indices: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment
    master: Tensor | None
    grad: Tensor | None = None

    @classmethod
    def first(cls, parameter: nn.Parameter, indices: Tensor, moments: MomentsDtype, master: bool) -> SparseState:
        """The state of a first selection.

        Args:
            parameter: whose entries are selected.
            indices: (K,), any integer dtype and device.
            moments: dtype of the moments, which are float64 for a float64 weight unless they are `8bit`.
            master: whether to keep a copy in the working dtype.
        """
        indices = indices.to(device=parameter.device, dtype=index_dtype(local(parameter).numel()))
        working = working_dtype(parameter)
        zeros = torch.zeros(indices.numel(), dtype=_moments_in(moments, parameter), device=parameter.device)
        values = gather(local(parameter), indices).to(working) if master else None
        if moments == "8bit":
            return cls(indices, BlockwiseVector(zeros, signed=True), BlockwiseVector(zeros, signed=False), values)
        return cls(indices, zeros, torch.zeros_like(zeros), values)

    def reselected(self, parameter: nn.Parameter, indices: Tensor) -> tuple[SparseState, int]:
        """The state for another selection, and how many entries stay: those keep moments and master, new ones begin
        at zero."""
        indices = indices.to(device=parameter.device, dtype=self.indices.dtype)

        def carried(values: Tensor) -> Tensor:
            return carry(values, self.indices, indices, local(parameter).numel())

        kept = carried(torch.ones_like(self.indices, dtype=torch.bool))
        exp_avg, exp_avg_sq = (_like(m, carried(plain(m))) for m in (self.exp_avg, self.exp_avg_sq))
        new = SparseState(indices, exp_avg, exp_avg_sq, master=None)
        if self.master is not None:
            self.refresh_master(parameter)
            current = gather(local(parameter), indices).to(self.master.dtype)
            new.master = torch.where(kept, carried(self.master), current)
        return new, int(torch.count_nonzero(kept))

    def collect(self, parameter: nn.Parameter) -> Tensor:
        """Add the selected entries of `parameter.grad` to the accumulator, and drop it; returns the accumulator."""
        assert parameter.grad is not None
        picked = gather(local(parameter.grad), self.indices)
        self.grad = picked.to(working_dtype(parameter)) if self.grad is None else self.grad.add_(picked)
        parameter.grad = None
        return self.grad

    def operand(self, parameter: nn.Parameter, *, additive: bool) -> Tensor:
        """The (K,) tensor for AdamW to update in place, in the working dtype; `write` brings it to the weight.

        That is the master, where there is one, or a copy of the entries. An update that does not depend on the value,
        as without weight decay, is made on (negative) zeros instead and added: the weight is read and written in one
        go, and x + (0 - update) rounds as x - update does.

        Args:
            parameter: whose state this is.
            additive: whether the update does not depend on the value.
        """
        if self.master is not None:
            self.refresh_master(parameter)
            return self.master
        if additive and parameter.dtype == working_dtype(parameter):
            return torch.full(self.indices.shape, -0.0, dtype=parameter.dtype, device=self.indices.device)
        return gather(local(parameter), self.indices).to(working_dtype(parameter))

    def write(self, parameter: nn.Parameter, operand: Tensor, *, additive: bool) -> None:
        """Bring what `operand` returned, updated, to the weight's entries."""
        if self.master is None and additive and parameter.dtype == working_dtype(parameter):
            scatter_add(local(parameter), self.indices, operand)
        else:
            scatter(local(parameter), self.indices, operand)

    def refresh_master(self, parameter: nn.Parameter) -> None:
        """Where something else wrote to the weight (loading, averaging), the weight wins over its master."""
        assert self.master is not None
        current = gather(local(parameter), self.indices)
        ours = self.master.to(current.dtype) == current
        self.master = torch.where(ours, self.master, current.to(self.master.dtype))

    def nbytes(self, parameter: nn.Parameter) -> int:
        """Bytes of all its tensors, the accumulator counted whether it is there or not."""
        kept = (self.indices, self.exp_avg, self.exp_avg_sq, self.master)
        gradient = self.indices.numel() * working_dtype(parameter).itemsize
        return gradient + sum(tensor.nbytes for tensor in kept if tensor is not None)

    def state_dict(self, *, with_grad: bool = True) -> dict[str, Tensor]:
        """Its tensors by name, moments in 8 bits as float32; the gradient where there is one and it is wanted."""
        tensors = {"indices": self.indices, "exp_avg": plain(self.exp_avg), "exp_avg_sq": plain(self.exp_avg_sq)}
        if self.master is not None:
            tensors["master"] = self.master
        if self.grad is not None and with_grad:
            tensors["grad"] = self.grad
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over the (K,) values of a saved state with the same indices; dtypes stay as they are here."""
        for key, saved in tensors.items():
            target = getattr(self, key)
            if target is not None and key != "indices":  # None: a master that this run does not keep
                target.copy_(saved)
        grad = tensors.get("grad")
        self.grad = None if grad is None else grad.to(self.indices.device, copy=True)


def plain(moment: Moment) -> Tensor:
    """(K,) tensor: the moment itself, or what its 8 bits stand for."""
    return moment.to(torch.float32) if isinstance(moment, BlockwiseVector) else moment


def _like(moment: Moment, values: Tensor) -> Moment:
    """The values, kept as the moment is."""
    return BlockwiseVector(values, signed=moment.signed) if isinstance(moment, BlockwiseVector) else values


def _moments_in(dtype: MomentsDtype, parameter: Tensor) -> torch.dtype:
    if dtype == "8bit":
        return torch.float32
    return torch.float64 if parameter.dtype == torch.float64 else dtype
