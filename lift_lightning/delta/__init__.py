"""The result of a training as a small adapter: what of a checkpoint differs from its base, to the last bit."""

from lift_lightning.delta.extract import Difference, diff, extract
from lift_lightning.delta.folder import write_model
from lift_lightning.delta.format import Delta
from lift_lightning.delta.live import AttachedDelta, apply, attach, revert
from lift_lightning.delta.merge import merge
from lift_lightning.delta.report import difference_table, inspect
from lift_lightning.delta.sources import ModelSource, open_folder

__all__ = [
    "AttachedDelta",
    "Delta",
    "Difference",
    "ModelSource",
    "apply",
    "attach",
    "diff",
    "difference_table",
    "extract",
    "inspect",
    "merge",
    "open_folder",
    "revert",
    "write_model",
]
