"""Moments in 8 bits: codes and a scale for each block of entries, as bitsandbytes' 8-bit optimizers keep them.

The map of codes is bitsandbytes'. The rounding is not: its kernel on the CPU (0.50) takes a neighbour of the nearest
value now and then, zero included, so that what is read and written again would wander, and a run that is resumed would
not be the run that went on.

Letters: K entries of a vector.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# As in bitsandbytes' own 8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861).
BLOCK = 256


class BlockwiseVector:
    """A (K,) float32 vector that is kept in 8 bits; it offers what a moment is asked for.

    Every value is the nearest of 256 of a dynamic map, times the largest magnitude of its block of 256 entries. What
    was dequantised is quantised to the same codes again. Nothing here waits for the device.

    Args:
        values: (K,) to begin with.
        signed: False for vectors without negative values, whose map then has twice as many positive ones.
    """

    dtype = torch.uint8

    def __init__(self, values: Tensor, *, signed: bool) -> None:
        self.signed = signed
        self.map = torch.tensor(_map(signed), dtype=torch.float32, device=values.device)  # (256,)
        self.codes = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
        self.scales = torch.empty(-(-values.numel() // BLOCK), dtype=torch.float32, device=values.device)
        self.copy_(values)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of codes, scales and map."""
        return self.codes.nbytes + self.scales.nbytes + self.map.nbytes

    def numel(self) -> int:
        """K."""
        return self.codes.numel()

    def to(self, dtype: torch.dtype) -> Tensor:
        """(K,) new tensor of the values."""
        return (self.map[self.codes.int()] * self._scale_of_each()).to(dtype)

    def copy_(self, values: Tensor) -> None:
        """Take over the values of a (K,) tensor, rounded."""
        values = values.to(device=self.device, dtype=torch.float32)
        padded = torch.nn.functional.pad(values, (0, len(self.scales) * BLOCK - values.numel()))
        self.scales.copy_(padded.view(-1, BLOCK).abs().amax(dim=1))
        smallest = torch.finfo(torch.float32).tiny  # of a block of zeros there is nothing to divide by
        between = (self.map[1:] + self.map[:-1]) / 2
        self.codes.copy_(torch.bucketize(values / self._scale_of_each().clamp(min=smallest), between))

    def _scale_of_each(self) -> Tensor:
        return self.scales.repeat_interleave(BLOCK, output_size=len(self.scales) * BLOCK)[: self.numel()]


@functools.cache
def _map(signed: bool) -> list[float]:
    """The 256 ascending values between -1 or 0 and 1 that a code stands for."""
    from bitsandbytes.functional import create_dynamic_map  # here: importing it takes seconds, and few need it

    values: list[float] = create_dynamic_map(signed=signed).tolist()
    if signed:
        # bitsandbytes' own ends at -0.993: a block whose largest magnitude is negative would shrink a little each time
        # that it is read and written.
        values[0] = -1.0
    return values
