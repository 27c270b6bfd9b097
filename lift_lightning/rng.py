"""The states of the random number generators, as tensors and primitives that a checkpoint can hold."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """States of Python's and torch's generators, on the CPU and on every GPU."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue where `rng_state` was taken; GPUs that were not there then keep their own state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["cpu"].cpu())
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state.cpu(), device)


def seed_of(*parts: object) -> int:
    """A seed of 63 bits that is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
