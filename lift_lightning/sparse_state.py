"""What is kept for one sparse parameter: vectors of length K, and how they follow its selection and its weight.

Letters: K selected entries of the parameter, K' after a refresh.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lift_lightning.indices import carry, gather, index_dtype, locate


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
        grad: gradient summed over the micro-batches of the step, in float32 (float64 for float64 weights).
        has_grad: whether `grad` holds anything since the last `zero_grad`.
    """

    indices: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    grad: Tensor
    has_grad: bool = False

    @classmethod
    def first(cls, parameter: nn.Parameter, indices: Tensor, moments: torch.dtype, master: bool) -> SparseState:
        """The state of a first selection.

        Args:
            parameter: whose entries are selected.
            indices: (K,), any integer dtype and device.
            moments: dtype of the moments, which are float64 for a float64 weight in any case.
            master: whether to keep a copy in the working dtype.
        """
        indices = indices.to(device=parameter.device, dtype=index_dtype(parameter.numel()))
        working = working_dtype(parameter)
        exp_avg = torch.zeros(indices.numel(), dtype=_wider(moments, parameter), device=parameter.device)
        values = gather(parameter, indices).to(working) if master else None
        return cls(indices, exp_avg, torch.zeros_like(exp_avg), values, torch.empty_like(exp_avg, dtype=working))

    def reselected(self, parameter: nn.Parameter, indices: Tensor) -> SparseState:
        """The state for another selection: entries that stay keep moments and master, new ones begin at zero."""
        new = self.first(parameter, indices, self.exp_avg.dtype, self.master is not None)
        position, kept = locate(self.indices, new.indices)
        new.exp_avg = carry(self.exp_avg, position, kept)
        new.exp_avg_sq = carry(self.exp_avg_sq, position, kept)
        if self.master is not None and new.master is not None:
            self.refresh_master(parameter)
            new.master = carry(self.master, position, kept, fill=new.master)
        return new

    def collect(self, parameter: nn.Parameter) -> None:
        """Add the selected entries of `parameter.grad` to the accumulator and drop the dense gradient."""
        assert parameter.grad is not None
        picked = gather(parameter.grad, self.indices)
        self.grad = self.grad.add_(picked) if self.has_grad else self.grad.copy_(picked)
        self.has_grad = True
        parameter.grad = None

    def values(self, parameter: nn.Parameter) -> Tensor:
        """The (K,) values to update in place: the master itself, or a copy of the entries in the working dtype."""
        if self.master is None:
            return gather(parameter, self.indices).to(working_dtype(parameter))
        self.refresh_master(parameter)
        return self.master

    def refresh_master(self, parameter: nn.Parameter) -> None:
        """Where something else wrote to the weight (loading, averaging), the weight wins over its master."""
        assert self.master is not None
        current = gather(parameter, self.indices)
        ours = self.master.to(current.dtype) == current
        self.master = torch.where(ours, self.master, current.to(self.master.dtype))

    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for field in fields(self) if isinstance(t := getattr(self, field.name), Tensor))

    def state_dict(self, *, with_grad: bool = True) -> dict[str, Tensor]:
        """Its tensors by name; the gradient where there is one and it is wanted."""
        tensors = {"indices": self.indices, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.master is not None:
            tensors["master"] = self.master
        if self.has_grad and with_grad:
            tensors["grad"] = self.grad
        return tensors

    def load_state_dict(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take over the values of a saved state with the same indices; dtypes stay as they are here.

        Raises:
            ValueError: naming the parameter, if a vector is not of length K.
        """
        for key, saved in tensors.items():
            target = getattr(self, key)
            if target is None:
                continue  # a master that this run does not keep
            if saved.shape != target.shape:  # copy_ would broadcast a single entry
                raise ValueError(f"{name}: {target.numel()} indices, but {saved.numel()} of {key}")
            target.copy_(saved)
        self.has_grad = "grad" in tensors


def _wider(dtype: torch.dtype, parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else dtype
