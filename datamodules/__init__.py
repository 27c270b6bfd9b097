if not __name__.startswith("lift_lightning."):
    raise ImportError(
        "import lift_lightning.datamodules, not datamodules: the bare name would load a second copy of its classes"
    )

from lift_lightning.datamodules.base import SFTDataModule
from lift_lightning.datamodules.chat import ChatDataModule
from lift_lightning.datamodules.finetuning import FineTuningDataModule
from lift_lightning.datamodules.glue import GLUEDataModule
from lift_lightning.datamodules.instruction import (
    AlpacaDataModule,
    Commonsense170KDataModule,
    GSM8KDataModule,
    InstructionDataModule,
    StrategyQADataModule,
)
from lift_lightning.datamodules.math10k import Math10KDataModule
from lift_lightning.datamodules.s1k import S1KDataModule

__all__ = [
    "AlpacaDataModule",
    "ChatDataModule",
    "Commonsense170KDataModule",
    "FineTuningDataModule",
    "GLUEDataModule",
    "GSM8KDataModule",
    "InstructionDataModule",
    "Math10KDataModule",
    "S1KDataModule",
    "SFTDataModule",
    "StrategyQADataModule",
]
