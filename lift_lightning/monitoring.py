"""Throughput and memory of training, measured without waiting for the device."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor


class StepMeter:
    """Tokens per second from step to step, and the peak of memory."""

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._since: float | None = None

    def count(self, tokens: Tensor) -> None:
        """Add the tokens of one micro-batch (0-dim)."""
        self._tokens = self._tokens + tokens

    def rates(self, device: torch.device) -> dict[str, Tensor | float]:
        """`tokens_per_second` since the last call (none at the first) and `peak_memory_gib` of the whole run."""
        now = time.perf_counter()
        found: dict[str, Tensor | float] = {"peak_memory_gib": peak_memory(device) / 2**30}
        if self._since is not None:
            found["tokens_per_second"] = self._tokens / (now - self._since)
        self._since, self._tokens = now, 0
        return found


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
