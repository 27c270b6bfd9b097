"""Tensors as bit patterns: what differs, and a checksum. -0.0 is not 0.0 here, and a NaN is the one that it is."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

# By the bytes of one entry.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """(N,) integers that share the memory of a contiguous tensor, one for each entry.

    Raises:
        ValueError: if it is not contiguous, or of a dtype whose entries have no integer of their size.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous")
    if tensor.dtype.itemsize not in _INTEGERS:
        raise ValueError(f"entries of {tensor.dtype} have {tensor.dtype.itemsize} bytes: at most 8 can be compared")
    return tensor.detach().reshape(-1).view(_INTEGERS[tensor.dtype.itemsize])


def differing(left: Tensor, right: Tensor) -> Tensor:
    """(N,) bool: the entries of two tensors of one shape and dtype, on the CPU, whose bits are not the same."""
    return bits(left) != bits(right)


def positions(mask: Tensor) -> Tensor:
    """Ascending int64 positions of the True entries of a vector on the CPU."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype, on one device, are equal to the last bit."""
    return left.shape == right.shape and torch.equal(bits(left), bits(right))


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal; dtype and shape are not in it."""
    return hashlib.sha256(bits(tensor.detach().cpu().contiguous()).numpy().data).hexdigest()
