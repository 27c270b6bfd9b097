"""The adapter that a fit trained, written at its end."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lift_lightning.adapters import Adapter, check_adapter_folder
from lift_lightning.callbacks.folders import folder_of, on_first


class AdapterExport(pl.Callback):
    """Write the adapter when a fit has come to its end: safetensors and JSON, for peft's methods in peft's format.

    For a `LiftLightningModule` whose `method` is one of `lora`, `rslora`, `dora`, `pissa`, `shira`, `spectral`; what
    LIFT and full fine-tuning change, `DeltaExport` writes.

    Args:
        output: the folder to write; `adapter` beside the logs of the run if null.
        overwrite: replace an adapter that is there.

    Attributes:
        folder: what was written last.

    Raises:
        MisconfigurationException: when a fit begins, if no adapter is trained.
        ConfigError: when a fit begins, if a tied parameter is trained whole beside the adapter.
        FileExistsError: when a fit begins, if the folder may not be written.
    """

    def __init__(self, output: str | None = None, overwrite: bool = False) -> None:
        self.output, self.overwrite = output, overwrite
        self.folder: Path | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before the work whether it can be written at its end."""
        adapter, target = _adapter_of(pl_module), folder_of(trainer, self.output, "adapter")

        def check() -> None:
            check_adapter_folder(target, overwrite=self.overwrite)
            adapter.check_writable()

        on_first(check)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        adapter, target = _adapter_of(pl_module), folder_of(trainer, self.output, "adapter")

        def write() -> str:
            base = getattr(pl_module, "model_name_or_path", "")
            found = adapter.save_pretrained(target, base=base, overwrite=self.overwrite)
            size = sum(file.stat().st_size for file in found.iterdir()) / 2**20
            rank_zero_info(f"the adapter of {adapter.entries:,} numbers takes {size:,.2f} MiB, in {found}")
            return str(found)

        self.folder = Path(on_first(write))


def _adapter_of(module: pl.LightningModule) -> Adapter:
    adapter = getattr(module, "adapter", None)
    if not isinstance(adapter, Adapter):
        raise MisconfigurationException(
            f"AdapterExport writes an adapter, and {type(module).__name__} trains none: set model.method to one, or "
            "use lift_lightning.callbacks.DeltaExport, which writes what changed of the base"
        )
    return adapter
