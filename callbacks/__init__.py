"""Lightning callbacks. Installed as `lift_lightning.callbacks`."""

if not __name__.startswith("lift_lightning."):
    raise ImportError("import lift_lightning.callbacks, not callbacks: the bare name would load a second copy")

from lift_lightning.callbacks.adapter_export import AdapterExport
from lift_lightning.callbacks.checkpoint import StepCheckpoint
from lift_lightning.callbacks.delta_export import DeltaExport
from lift_lightning.callbacks.eigenspace_monitor import EigenspaceMonitor
from lift_lightning.callbacks.mask_refresh import MaskRefreshCallback
from lift_lightning.callbacks.sparsity_monitor import SparsityMonitor

__all__ = [
    "AdapterExport",
    "DeltaExport",
    "EigenspaceMonitor",
    "MaskRefreshCallback",
    "SparsityMonitor",
    "StepCheckpoint",
]
