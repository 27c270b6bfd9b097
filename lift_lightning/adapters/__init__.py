"""Adapters in the place of a mask: LoRA and its kin through peft, and the Spectral Adapter."""

from __future__ import annotations

from lift_lightning.adapters.budget import largest_rank, trained_entries
from lift_lightning.adapters.methods import ADAPTERS, AdapterMethod, Adapters, put_adapters

__all__ = ["ADAPTERS", "AdapterMethod", "Adapters", "largest_rank", "put_adapters", "trained_entries"]
