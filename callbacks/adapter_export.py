"""The adapters that a training made, written at its end without the base's weights."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class AdapterExport(pl.Callback):
    """Write the adapters of a `LiftLightningModule` when a fit has come to its end.

    Args:
        output: the folder to write; `adapter` beside the logs of the run if null.
        overwrite: write into a folder that is not empty.

    Attributes:
        folder: what was written last.

    Raises:
        MisconfigurationException: when a fit begins, if its method has no adapters, or a head that is trained with them
            would be lost.
        FileExistsError: when a fit begins, if the folder is not empty.
    """

    def __init__(self, output: str | None = None, overwrite: bool = False) -> None:
        self.output = output
        self.overwrite = overwrite
        self.folder: Path | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before the work whether it can be done at its end."""
        if getattr(pl_module, "adapters", None) is None:
            raise MisconfigurationException(
                "AdapterExport writes the adapters of methods such as lora, and this module has none: use DeltaExport"
            )
        if getattr(pl_module, "new_parameters", None):
            raise MisconfigurationException(
                f"AdapterExport writes adapters only, and {pl_module.new_parameters[0]!r} is trained with them: export "
                "the checkpoint instead"
            )
        target = self._target(trainer)
        if not self.overwrite and target.is_dir() and any(target.iterdir()):
            raise FileExistsError(f"{str(target)!r} is not empty: name another output, or set overwrite")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write them; every device has the same."""
        target = self._target(trainer)
        if trainer.is_global_zero:
            pl_module.adapters.save_pretrained(target)
            size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            rank_zero_info(f"the adapters take {size / 2**20:,.2f} MiB, in {target}")
        self.folder = target

    def _target(self, trainer: pl.Trainer) -> Path:
        beside = trainer.log_dir or trainer.default_root_dir
        return Path(beside) / "adapter" if self.output is None else Path(self.output)
