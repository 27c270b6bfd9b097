"""Rival fine-tuning methods: adapters of a few numbers on the matrices that LIFT would train, the base frozen."""

from lift_lightning.adapters.adapter import Adapter, check_adapter_folder, load_adapter, merge_adapter, put_on
from lift_lightning.adapters.budget import adapter_targets, matched_rank, selected_entries
from lift_lightning.adapters.methods import METHODS, AdapterMethod, AdapterName, trained_entries

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterMethod",
    "AdapterName",
    "adapter_targets",
    "load_adapter",
    "matched_rank",
    "merge_adapter",
    "put_on",
    "check_adapter_folder",
    "selected_entries",
    "trained_entries",
]
