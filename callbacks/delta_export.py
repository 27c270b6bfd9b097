"""What a training changed, written at its end as a delta from the base: a few percent of a checkpoint."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import track
from transformers import PreTrainedModel

from lift_lightning.adapters import Adapter
from lift_lightning.callbacks.folders import folder_of, on_first
from lift_lightning.callbacks.mask_refresh import MaskRefreshCallback
from lift_lightning.delta import Delta, ModelSource, extract, open_folder
from lift_lightning.delta.format import check_delta_folder
from lift_lightning.delta.sources import check_names_in_base
from lift_lightning.sharding import owned, whole_weights


class DeltaExport(pl.Callback):
    """Write the delta when a fit has come to its end, under any strategy.

    The weights are compared with the base's files tensor by tensor. Where they are split over devices, rank 0 gathers
    them into its CPU's memory first.

    Args:
        output: the folder to write; `delta` beside the logs of the run if null.
        base: hub id or folder of the model that training began from; that of a `LiftLightningModule` if null.
        revision: of the base on the hub; likewise.
        base_name: what to call the base where it is a folder here and on the hub for others, such as `user/model`.
        store_base_values: keep the base's values too, so that a model folder can be reverted without the base.
        overwrite: replace a delta that is there.

    Attributes:
        folder: what was written last.

    Raises:
        MisconfigurationException: when a fit begins, if there is no model of transformers, or no base is known, or an
            adapter is trained, which is no change of the base's entries.
        DeltaError: when a fit begins, if the base's files hold the parameters under other names.
        FileExistsError: when a fit begins, if the folder may not be written.
    """

    def __init__(
        self,
        output: str | None = None,
        base: str | None = None,
        revision: str | None = None,
        base_name: str | None = None,
        store_base_values: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.output = output
        self.base, self.revision, self.base_name = base, revision, base_name
        self.store_base_values, self.overwrite = store_base_values, overwrite
        self.folder: Path | None = None

    # ---------------------------------------------------------------- hooks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before the work whether it can be written at its end."""
        if isinstance(adapter := getattr(pl_module, "adapter", None), Adapter):
            raise MisconfigurationException(
                f"DeltaExport writes the entries of the base that changed, and method={adapter.method!r} changes none: "
                "use lift_lightning.callbacks.AdapterExport in its place"
            )
        model, (base, revision) = _model_of(pl_module), self._base_of(pl_module)
        new = getattr(pl_module, "new_parameters", None)
        target = folder_of(trainer, self.output, "delta")

        def check() -> None:
            check_delta_folder(target, overwrite=self.overwrite)
            with open_folder(base, revision) as source:
                check_names_in_base(model, source.names(), new)

        on_first(check)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it. All callbacks that change weights at the end of the training have done so."""
        model, (base, revision) = _model_of(pl_module), self._base_of(pl_module)
        target = folder_of(trainer, self.output, "delta")
        split = any(owned(parameter).group is not None for parameter in model.parameters())
        weights = whole_weights(model) if split else model  # every rank has a part in it
        bar = trainer.progress_bar_callback
        show = bar is not None and bar.is_enabled

        def write() -> str:
            with open_folder(base, revision) as source:
                delta = extract(
                    source,
                    ModelSource(weights, source.names()),
                    base_name=self.base_name,
                    recipe=_recipe(trainer, pl_module),
                    model_config=_config_of(model),
                    store_base_values=self.store_base_values,
                    progress=lambda names: track(names, "Writing the delta", disable=not show),
                )
            rank_zero_info(_summary(delta, target))
            return str(delta.save_pretrained(target, overwrite=self.overwrite))

        self.folder = Path(on_first(write))

    # ---------------------------------------------------------------- what they do

    def _base_of(self, module: pl.LightningModule) -> tuple[str, str | None]:
        if self.base is not None:
            return self.base, self.revision
        base = getattr(module, "model_name_or_path", None)
        if base is None:
            raise MisconfigurationException(
                f"{type(module).__name__} does not say which model it began from: DeltaExport(base=...) does"
            )
        return base, self.revision or module.hparams.get("revision")


def _model_of(module: pl.LightningModule) -> PreTrainedModel:
    found = next((part for part in module.modules() if isinstance(part, PreTrainedModel)), None)
    if found is None:
        raise MisconfigurationException(
            f"{type(module).__name__} has no model of transformers, whose base DeltaExport could compare it with"
        )
    return found


def _config_of(model: PreTrainedModel) -> dict[str, Any]:
    """As `save_pretrained` would write it."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # which fully_shard puts before it
    config.dtype = model.dtype
    return dict(json.loads(config.to_json_string()))


def _recipe(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    selections = [c for c in trainer.callbacks if isinstance(c, MaskRefreshCallback)]
    data = getattr(trainer, "datamodule", None)
    settings = {
        "model": dict(module.hparams),
        "lift": [{"interval": c.interval, **asdict(c.config)} for c in selections],
        "data": None if data is None else {"class": type(data).__name__, "path": getattr(data, "path", None)},
        "steps": trainer.global_step,
        "precision": trainer.precision,
        "devices": trainer.world_size,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }
    return dict(json.loads(json.dumps(settings, default=str)))


def _summary(delta: Delta, folder: Path) -> str:
    changed = sum(record.changed for record in delta.description.tensors.values())
    return f"the delta of {changed:,} changed entries takes {delta.nbytes / 2**20:,.2f} MiB, in {folder}"
