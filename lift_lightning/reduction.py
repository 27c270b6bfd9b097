"""Gradients summed over ranks of which each has the whole model, as under DDP: of sparse parameters only K entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lift_lightning.optimizer import SparseAdamW
from lift_lightning.sharding import Ranks, VectorSum
from lift_lightning.sparse_state import working_dtype


class GradientSum:
    """Sums an optimizer's gradients over ranks, once for each step.

    What sparse parameters have collected is sent on while the last backward of the step still runs, in place of the
    dense all-reduce of DistributedDataParallel.

    Args:
        optimizer: every rank has all of its parameters.
        ranks: that take the same steps.
    """

    def __init__(self, optimizer: SparseAdamW, ranks: Ranks) -> None:
        self.optimizer = optimizer
        self.ranks = ranks
        self.sent_bytes = 0  # in the last step, of gradients, by each rank
        self._sum: VectorSum | None = None

    def begin(self) -> None:
        """Before the last backward of a step."""
        sparse = [parameter for _, parameter, _ in self.optimizer.sparse_parameters()]
        nbytes = {p: self.optimizer.indices(p).numel() * working_dtype(p).itemsize for p in reversed(sparse)}
        self._sum = VectorSum(self.ranks, nbytes)
        self.optimizer.on_collected = self._sum.ready

    @torch.no_grad()
    def finish(self) -> None:
        """After it: wait for the sums, which replace the gradients.

        A parameter without a gradient here counts as one with a gradient of zero, since another rank may have one.
        """
        assert self._sum is not None, "begin comes first"
        waiting, self._sum, self.optimizer.on_collected = self._sum, None, None
        grads = self.optimizer.gradients_by_parameter()
        for parameter in waiting.missing():
            waiting.ready(parameter, _or_zero(grads.get(parameter), parameter, self.optimizer.indices(parameter)))
        dense = self.optimizer.dense_parameters()
        rest = VectorSum(self.ranks, {p: p.numel() * p.itemsize for p in dense})
        for parameter in dense:
            rest.ready(parameter, _or_zero(grads.get(parameter), parameter, parameter))
        self.sent_bytes = waiting.nbytes + rest.nbytes
        for parameter, total in {**waiting.finish(), **rest.finish()}.items():
            self.optimizer.set_gradient(parameter, total)


def _or_zero(grad: Tensor | None, parameter: nn.Parameter, like: Tensor) -> Tensor:
    if grad is not None:
        return grad.reshape(-1)
    dtype = parameter.dtype if like is parameter else working_dtype(parameter)
    return torch.zeros(like.numel(), dtype=dtype, device=parameter.device)
