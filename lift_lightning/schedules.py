"""What a refresh keeps of the selection before it: nothing, all of it, or the entries that moved most.

Letters: K selected entries of one parameter.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lift_lightning.allocation import Share
from lift_lightning.indices import carry, gather, scatter, top_k_indices
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.sharding import local
from lift_lightning.shares import Shares

Schedule = Literal["periodic", "accumulate", "drop_and_grow"]


def part_of(shares: Shares, selection: int, selections: int) -> Shares:
    """Budgets on the way to the final ones, which the last of the selections (from 1) has; rounded up."""
    reached = min(selection, selections)
    return {
        name: [Share(one.lra_rank, math.ceil(one.entries * reached / selections)) for one in theirs]
        for name, theirs in shares.items()
    }


def all_selected(optimizer: SparseAdamW) -> dict[str, Tensor]:
    """By parameter name the (K,) indices of the entries that are selected now; those that have a selection."""
    return {name: optimizer.indices(p) for name, p, _ in optimizer.sparse_parameters() if optimizer.is_selected(p)}


class Origins:
    """The values that selected entries had before they were trained: what drop and grow sets dropped ones back to.

    An entry outside the selection always has its first value then, so that what was trained is never more than the K
    entries that are selected (SpIEL, arXiv 2401.16405).

    Attributes:
        values: by parameter name (K,), in the order of the selection and the dtype of the weight.
    """

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values = {} if values is None else values

    @torch.no_grad()
    def survivors(self, optimizer: SparseAdamW, share: float) -> dict[str, Tensor]:
        """The indices of each parameter's selected entries without those that have moved least.

        Args:
            optimizer: between two steps.
            share: of the selected entries that is left out, rounded down; of equal ones the lower indices.
        """
        kept = {}
        for name, parameter, _ in optimizer.sparse_parameters():
            indices, origin = optimizer.indices(parameter), self.values[name].to(parameter.device)
            moved = (gather(local(parameter), indices).double() - origin.double()).abs()
            stays = torch.ones_like(indices, dtype=torch.bool)
            stays[top_k_indices(moved, math.floor(share * indices.numel()), largest=False)] = False
            kept[name] = indices[stays]
        return kept

    @torch.no_grad()
    def follow(self, optimizer: SparseAdamW, before: dict[str, Tensor]) -> None:
        """Set the entries that the refresh has dropped back to their first values, and note those of new ones.

        Args:
            optimizer: after the refresh.
            before: the indices that `values` belong to; empty at the first selection.
        """
        for name, parameter, _ in optimizer.sparse_parameters():
            new, weight = optimizer.indices(parameter), local(parameter)
            current = gather(weight, new)
            if name in before:
                old, origin, numel = before[name], self.values[name].to(parameter.device), weight.numel()
                dropped = ~carry(torch.ones_like(new, dtype=torch.bool), new, old, numel)
                scatter(weight, old[dropped], origin[dropped])
                stayed = carry(torch.ones_like(old, dtype=torch.bool), old, new, numel)
                current = torch.where(stayed, carry(origin, old, new, numel), current)
            self.values[name] = current
