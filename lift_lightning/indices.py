"""The flat-index layout of a selection: exact top-K, carrying values across a refresh, gather and scatter.

A selection is a vector of K flat indices into a contiguous tensor, ascending and without repeats. Ascending order
makes results reproducible, memory access regular, and the part of a contiguous shard a contiguous slice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_indices(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Flat indices of the k largest (or smallest) scores, ascending; of equal scores the lower indices win.

    Args:
        scores: any shape, no NaN.
        k: how many, from 0 to the number of scores.
        largest: False takes the smallest.

    Returns:
        (k,) int64 on the device of `scores`. The same scores give the same indices on every device.

    Raises:
        ValueError: if k is out of range.
    """
    flat = scores.reshape(-1)
    if not 0 <= k <= flat.numel():
        raise ValueError(f"k must be between 0 and the {flat.numel()} scores there are, got {k}")
    if k == flat.numel():
        return torch.arange(k, device=flat.device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    # Which of equal scores a sort or torch.topk takes is left open, so only the threshold value is asked for.
    threshold = flat.kthvalue(flat.numel() - k + 1 if largest else k).values
    chosen = flat > threshold if largest else flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().squeeze(1)


def index_dtype(numel: int) -> torch.dtype:
    """int32 for tensors of fewer than 2^31 entries, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def check_indices(indices: Tensor, numel: int, name: str) -> None:
    """Raise ValueError, naming the parameter, unless `indices` is a vector of ascending flat indices below `numel`."""
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{name}: indices must be a vector of integers, got {indices.dtype} {tuple(indices.shape)}")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"{name}: indices must be ascending and without repeats")
    if indices.numel() and not (int(indices[0]) >= 0 and int(indices[-1]) < numel):
        raise ValueError(
            f"{name}: indices from {int(indices[0])} to {int(indices[-1])} do not lie in the {numel} entries there are"
        )


def flat_view(tensor: Tensor) -> Tensor:
    """The tensor as a vector that shares its memory and takes no part in autograd.

    Raises:
        ValueError: if the tensor is not contiguous, so that no such vector exists.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous; "
            "replace the parameter by its .contiguous() copy before building the optimizer"
        )
    return tensor.detach().view(-1)


def gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """(K,) copy of the entries at flat `indices`."""
    return tensor.detach().reshape(-1).gather(0, indices)


def scatter(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write `values` (K,) to the entries of a contiguous `tensor` at flat `indices`; all others keep their bits."""
    flat_view(tensor).scatter_(0, indices, values.to(tensor.dtype))


def locate(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """For every entry of `new` (K',): its position in `old` (K,) and whether it is there. Both ascending."""
    if old.numel() == 0:
        return torch.zeros_like(new, dtype=torch.int64), torch.zeros_like(new, dtype=torch.bool)
    position = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    return position, old[position] == new


def carry(values: Tensor, position: Tensor, kept: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """Values of a new selection: those of the entries that stay, and `fill` for the entries that are new.

    Args:
        values: (K,) of the old selection.
        position: (K',) from `locate`.
        kept: (K',) from `locate`.
        fill: for new entries, a number or a (K',) tensor.
    """
    if values.numel() == 0:
        filled = torch.empty(position.numel(), dtype=values.dtype, device=values.device)
        return filled.copy_(fill) if isinstance(fill, Tensor) else filled.fill_(fill)
    return torch.where(kept, values[position], fill)


def slice_for_shard(indices: Tensor, start: int, stop: int) -> slice:
    """The part of an ascending index vector that falls in the flat range [start, stop)."""
    bounds = torch.searchsorted(indices, torch.tensor([start, stop], dtype=indices.dtype, device=indices.device))
    first, last = bounds.tolist()
    return slice(first, last)
