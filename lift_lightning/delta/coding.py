"""Ascending flat indices in less than a byte each: the code of Elias and Fano.

Each index is cut in two. The low bits, as many as there are in the mean gap, are stored as they are. The rest never
falls from one index to the next, so it is stored as its steps: for each index as many zeros as it rises by, and a one.
That is at most 2 + ⌈log2(N / K)⌉ bits an index, however they lie, and both ways are a few numpy calls on whole vectors.
(P. Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21, 1974.)

Letters: N entries of the tensor, K indices, l low bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lift_lightning.indices import index_dtype


def encode(indices: Tensor, numel: int) -> Tensor:
    """The code of a selection.

    Args:
        indices: (K,) flat indices, ascending and without repeats.
        numel: N, of the tensor that they point into.

    Returns:
        (`coded_bytes(K, N)`,) uint8: the steps, then each of the l low bits in a row of ⌈K / 8⌉ bytes.
    """
    flat = indices.cpu().numpy().astype(np.int64, copy=False)
    low = low_bits(flat.size, numel)
    steps = np.zeros(_step_bits(flat.size, numel), dtype=np.uint8)
    steps[(flat >> low) + np.arange(flat.size)] = 1
    planes = [np.packbits(((flat >> bit) & 1).astype(np.uint8), bitorder="little") for bit in range(low)]
    return torch.from_numpy(np.concatenate([np.packbits(steps, bitorder="little"), *planes]))


def decode(code: Tensor, count: int, numel: int) -> Tensor:
    """The selection that `encode` was given.

    Args:
        code: as `encode` returns it.
        count: K.
        numel: N.

    Returns:
        (K,) flat indices, ascending, int32 below 2^31 entries.

    Raises:
        ValueError: if it is not the code of K ascending indices below N.
    """
    expected = coded_bytes(count, numel)
    if code.dtype != torch.uint8 or tuple(code.shape) != (expected,):
        raise ValueError(
            f"the code of {count} indices below {numel} is {expected} bytes, got {tuple(code.shape)} {code.dtype}"
        )
    stored, low = code.numpy(), low_bits(count, numel)
    length = -(-_step_bits(count, numel) // 8)
    ones = np.flatnonzero(np.unpackbits(stored[:length], bitorder="little"))
    if ones.size != count:
        raise ValueError(f"the code has {ones.size} indices, {count} are said to be in it")
    flat = (ones - np.arange(count)) << low
    for bit, plane in enumerate(stored[length:].reshape(low, -(-count // 8))):
        flat |= np.unpackbits(plane, count=count, bitorder="little").astype(np.int64) << bit
    if count and not ((flat[1:] > flat[:-1]).all() and flat[-1] < numel):
        raise ValueError(f"the code is not of ascending indices below {numel}")
    return torch.from_numpy(flat).to(index_dtype(numel))


def coded_bytes(count: int, numel: int) -> int:
    """Length of the code of K indices below N, which depends on nothing else."""
    return -(-_step_bits(count, numel) // 8) + low_bits(count, numel) * -(-count // 8)


def low_bits(count: int, numel: int) -> int:
    """l = ⌊log2(N / K)⌋, for which the code is shortest."""
    return (numel // count).bit_length() - 1 if count else 0


def _step_bits(count: int, numel: int) -> int:
    """A one for each index, and a zero for each step of the highest index that there can be."""
    return count + ((numel - 1) >> low_bits(count, numel)) if count else 0
