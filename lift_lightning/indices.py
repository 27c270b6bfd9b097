"""The flat-index layout of a selection: exact top-K, carrying values across a refresh, gather and scatter.

A selection is a vector of K flat indices into a contiguous tensor, ascending and without repeats. Ascending order
makes results reproducible, memory access regular, and the part of a contiguous shard a contiguous slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

# What is asked for one part of a matrix of scores: slices of its rows and columns.
Part = Callable[[tuple[slice, slice]], Tensor]

# Scores that are looked at first, to bracket the threshold.
_SAMPLE = 2**14
# Scores that exist at one time: on a CPU as many as its caches hold, else enough to keep a GPU busy.
_BLOCK_ENTRIES = {"cpu": 2**18}
_BLOCK_ENTRIES_ELSEWHERE = 2**24
# Entries of a parameter whose values are spread out at one time to be carried over.
_CARRIED_ENTRIES = 2**24


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
    return top_k_of_parts(flat.unsqueeze(1).__getitem__, (flat.numel(), 1), k, flat.device, largest=largest)


def top_k_of_parts(
    scores: Part, shape: tuple[int, int], k: int, device: torch.device, *, largest: bool = True
) -> Tensor:
    """`top_k_indices` of an (M, N) matrix of scores that is made some rows at a time and never exists as a whole.

    The threshold is bracketed from a sample of the scores, so that one pass can leave out nearly all of what lies below
    it and need not rank what lies above. The sample decides how much work there is, never which entries are found: a
    bracket that turns out wrong is widened.

    Args:
        scores: (slice of rows, slice of columns) -> the scores there, no NaN. It is asked for blocks of whole rows,
            which follow each other, and for a sample, with steps.
        shape: (M, N).
        k: how many, from 0 to M * N.
        device: of the scores.
        largest: False takes the smallest.

    Raises:
        ValueError: if k is out of range.
    """
    entries = shape[0] * shape[1]
    if not 0 <= k <= entries:
        raise ValueError(f"k must be between 0 and the {entries} scores there are, got {k}")
    if k == entries:
        return torch.arange(k, device=device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    ranked = scores if largest else lambda part: -scores(part)
    low, high = _bracket(ranked, shape, k)
    values, positions = _at_least(ranked, shape, device, low)
    if values.numel() < k:
        values, positions = _at_least(ranked, shape, device, None)
    # Which of equal scores a sort or torch.topk takes is left open, so only the threshold's value is asked for.
    undecided, rank = values, k
    if high is not None:
        above = int(torch.count_nonzero(values > high))
        if 0 < above < k:
            undecided, rank = values.index_select(0, _where(values <= high)), k - above
    threshold = _kth_smallest(undecided, undecided.numel() - rank + 1)
    chosen = values > threshold
    ties = _where(values == threshold)
    chosen[ties[: k - int(torch.count_nonzero(chosen))]] = True
    return positions.index_select(0, _where(chosen))


def _bracket(scores: Part, shape: tuple[int, int], k: int) -> tuple[Tensor | None, Tensor | None]:
    """Values between which the k-th largest score probably lies; None where a sample would not help."""
    entries = shape[0] * shape[1]
    size = max(_SAMPLE, entries // 256)
    if entries <= 4 * size:
        return None, None
    # A grid of about as many rows as columns, as far as there are so many.
    high = min(shape[0], max(math.isqrt(size), size // shape[1]))
    wide = min(shape[1], size // high)
    sample = scores((slice(0, None, shape[0] // high), slice(0, None, shape[1] // wide))).reshape(-1)
    expected = sample.numel() * k / entries
    # Entries of a row are alike, so a grid strays more than independent draws would: ten of their standard
    # deviations instead of three or four.
    margin = 10 * math.sqrt(expected) + 10
    first, last = math.ceil(expected - margin), math.ceil(expected + margin)
    return (
        _kth_smallest(sample, sample.numel() - last + 1) if last <= sample.numel() else None,
        _kth_smallest(sample, sample.numel() - first + 1) if first >= 1 else None,
    )


def rows_at_a_time(columns: int, device: torch.device) -> int:
    """How many rows of scores to make at one time."""
    return max(1, _BLOCK_ENTRIES.get(device.type, _BLOCK_ENTRIES_ELSEWHERE) // columns)


def _at_least(scores: Part, shape: tuple[int, int], device: torch.device, low: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores of at least `low` and their flat indices, ascending; all of them for None."""
    values, positions = [], []
    step = rows_at_a_time(shape[1], device)
    for start in range(0, shape[0], step):
        block = scores((slice(start, min(start + step, shape[0])), slice(None))).reshape(-1)
        found = torch.arange(block.numel(), device=device) if low is None else _where(block >= low)
        values.append(block.index_select(0, found))
        positions.append(found.add_(start * shape[1]))
    return torch.cat(values), torch.cat(positions)


def _where(mask: Tensor) -> Tensor:
    """Ascending int64 positions of the True entries of a vector."""
    if mask.device.type == "cpu":  # numpy's is three to eight times as fast there (docs/performance.md)
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    """0-dim, the k-th smallest of a vector, k from 1."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):  # four times as fast, likewise
        return torch.from_numpy(np.partition(values.numpy(), k - 1)[k - 1 : k])[0]
    return values.kthvalue(k).values


def index_dtype(numel: int) -> torch.dtype:
    """int32 for tensors of fewer than 2^31 entries, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def check_indices(indices: Tensor, numel: int, name: str) -> None:
    """Raise ValueError, naming the parameter, unless `indices` is a vector of ascending flat indices below `numel`."""
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{name}: indices must be a vector of integers, got {indices.dtype} {tuple(indices.shape)}")
    if indices.is_meta or is_fake(indices):
        return  # a step on tensors without values, to see what memory it takes
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
    # Of gradients that were just written no other call is faster (docs/performance.md).
    return tensor.detach().reshape(-1).index_select(0, indices)


def scatter(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write `values` (K,) to the entries of a contiguous `tensor` at flat `indices`; all others keep their bits."""
    flat_view(tensor).scatter_(0, indices, values.to(tensor.dtype))


def scatter_add(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Add `values` (K,) of the tensor's dtype to the entries of a contiguous `tensor` at flat `indices`."""
    flat_view(tensor).scatter_add_(0, indices, values)


def carry(values: Tensor, old: Tensor, new: Tensor, numel: int) -> Tensor:
    """Values of a new selection: those of the entries that stay, and zero for the entries that are new.

    Args:
        values: (K,) of the old selection.
        old: (K,) ascending flat indices into a tensor of `numel` entries.
        new: (K',) likewise.
        numel: the working memory is as many entries of the dtype of `values`, up to a limit.
    """
    carried = values.new_empty(new.numel())
    for start in range(0, numel, _CARRIED_ENTRIES):
        stop = min(start + _CARRIED_ENTRIES, numel)
        leaving, arriving = slice_for_shard(old, start, stop), slice_for_shard(new, start, stop)
        spread = values.new_zeros(stop - start).scatter_(0, old[leaving] - start, values[leaving])
        carried[arriving] = gather(spread, new[arriving] - start)
    return carried


def slice_for_shard(indices: Tensor, start: int, stop: int) -> slice:
    """The part of an ascending index vector that falls in the flat range [start, stop)."""
    bounds = torch.searchsorted(indices, torch.tensor([start, stop], dtype=indices.dtype, device=indices.device))
    first, last = bounds.tolist()
    return slice(first, last)
