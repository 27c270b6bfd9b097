"""Sparse fine-tuning of language models with LIFT (Low-rank Informed Sparse Fine-Tuning, arXiv 2506.00772)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lift_lightning.gradients import gradient_statistics
from lift_lightning.lowrank import DecompositionError, LowRankFactors, low_rank_factors
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import build_param_groups
from lift_lightning.refresh import RefreshReport, refresh_masks
from lift_lightning.selection import Selection, SelectionConfig, select, select_indices
from lift_lightning.shares import divide_budget

if TYPE_CHECKING:
    from lift_lightning.module import LiftLightningModule

__version__ = "0.1.0"

__all__ = [
    "DecompositionError",
    "LiftLightningModule",
    "LowRankFactors",
    "RefreshReport",
    "Selection",
    "SelectionConfig",
    "SparseAdamW",
    "build_param_groups",
    "divide_budget",
    "gradient_statistics",
    "low_rank_factors",
    "refresh_masks",
    "select",
    "select_indices",
]


def __getattr__(name: str) -> object:
    # Loaded when asked for, so that a plain PyTorch loop does not pay for importing Lightning.
    if name == "LiftLightningModule":
        from lift_lightning.module import LiftLightningModule

        return LiftLightningModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
