"""Moments in 8 bits: codes and a scale for each block of entries, as bitsandbytes' 8-bit optimizers keep them.

The map of codes is bitsandbytes'. The rounding is not: its kernel on the CPU (0.50) takes a neighbour of the nearest
value now and then, zero included, so that what is read and written again would wander, and a run that is resumed would
not be the run that went on.

Letters: K entries of a vector.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# As in bitsandbytes' own 8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861).
BLOCK = 256


class BlockwiseVector:
    """A (K,) float32 vector that is kept in 8 bits; it offers what a moment is asked for.

    Every value is the nearest of 256 of a dynamic map, times the largest magnitude of its block of 256 entries. What
    was dequantised is quantised to the same codes again. Nothing here waits for the device. Of a vector without
    negative values nothing but zero becomes zero: a first moment beside a second one of zero would be divided by eps
    alone.

    Args:
        values: (K,) to begin with.
        signed: False for vectors without negative values, whose map then has twice as many positive ones.
    """

    dtype = torch.uint8

    def __init__(self, values: Tensor, *, signed: bool) -> None:
        self.signed = signed
        self._book = _book(signed, values.device)
        self.codes = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
        self.scales = torch.empty(-(-values.numel() // BLOCK), dtype=torch.float32, device=values.device)
        self.copy_(values)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of codes and scales; the map is one for all vectors."""
        return self.codes.nbytes + self.scales.nbytes

    def numel(self) -> int:
        """K."""
        return self.codes.numel()

    def to(self, dtype: torch.dtype) -> Tensor:
        """(K,) new tensor of the values."""
        return (self._book.values.index_select(0, self.codes.int()) * self._scale_of_each()).to(dtype)

    def copy_(self, values: Tensor) -> None:
        """Take over the values of a (K,) tensor, rounded."""
        values = values.to(device=self.device, dtype=torch.float32)
        padded = torch.nn.functional.pad(values, (0, len(self.scales) * BLOCK - values.numel()))
        self.scales.copy_(padded.view(-1, BLOCK).abs().amax(dim=1))
        smallest = torch.finfo(torch.float32).tiny  # of a block of zeros there is nothing to divide by
        codes = self._book.nearest(values / self._scale_of_each().clamp(min=smallest))
        self.codes.copy_(codes if self.signed else torch.maximum(codes, (values > 0).to(torch.uint8)))

    def _scale_of_each(self) -> Tensor:
        return self.scales.repeat_interleave(BLOCK, output_size=len(self.scales) * BLOCK)[: self.numel()]


class _Book(NamedTuple):
    """The values that codes stand for, and what finds the nearest one.

    Attributes:
        values: (256,) float32, ascending, between -1 or 0 and 1.
        above: (256,) float32, beyond which the next one is nearer; infinite for the last.
        first: (65536,) uint8, the lowest code of all float32 numbers that begin with these 16 bits. Those are the
            numbers between two neighbours in bfloat16, and at most one limit lies among them.
    """

    values: Tensor
    above: Tensor
    first: Tensor

    def nearest(self, numbers: Tensor) -> Tensor:
        """uint8 codes of float32 numbers: what `torch.bucketize` finds between the limits, in a sixth of its time."""
        begin = numbers.view(torch.int32).bitwise_right_shift(16).bitwise_and(0xFFFF)
        codes = self.first.index_select(0, begin)
        return codes + (numbers > self.above.index_select(0, codes.int()))


_BOOKS: dict[tuple[bool, torch.device], _Book] = {}


def _book(signed: bool, device: torch.device) -> _Book:
    """One for all vectors of a device."""
    if (signed, device) in _BOOKS:
        return _BOOKS[signed, device]
    book = _Book(*(torch.tensor(numbers, device=device) for numbers in _numbers(signed)))
    if type(book.values) is Tensor:  # else it is traced, and of no use to others
        _BOOKS[signed, device] = book
    return book


@functools.cache
def _numbers(signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Those of a book."""
    from bitsandbytes.functional import create_dynamic_map  # here: importing it takes seconds, and few need it

    values = create_dynamic_map(signed=signed).numpy().copy()
    if signed:
        # bitsandbytes' own ends at -0.993: a block whose largest magnitude is negative would shrink a little each time
        # that it is read and written.
        values[0] = -1.0
    above = np.append((values[1:] + values[:-1]) / 2, np.float32(np.inf))
    bits = np.arange(2**16, dtype=np.uint32) << 16
    lowest = [np.searchsorted(above[:-1], end.view(np.float32)) for end in (bits, bits | 0xFFFF)]
    return values, above, np.minimum(*lowest).astype(np.uint8)
