if not __name__.startswith("lift_lightning."):
    raise ImportError(
        "import lift_lightning.datamodules, not datamodules: the bare name would load a second copy of its classes"
    )

from lift_lightning.datamodules.base import SFTDataModule
from lift_lightning.datamodules.math10k import Math10KDataModule

__all__ = ["Math10KDataModule", "SFTDataModule"]
