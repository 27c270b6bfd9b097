"""An adapter on a model: what of it is trained, how it is written and read, and how it becomes plain weights."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lift_lightning.adapters.budget import Targets, adapter_targets
from lift_lightning.adapters.by_peft import (
    load_by_peft,
    merge_by_peft,
    method_in,
    put_on_by_peft,
    require_peft,
    tuner_layers,
    write_by_peft,
)
from lift_lightning.adapters.methods import METHODS, AdapterName, check_rank, trained_entries
from lift_lightning.adapters.spectral import SpectralLinear, put_on_spectral
from lift_lightning.errors import CheckpointError, ConfigError
from lift_lightning.models import move_into_place

PEFT_FILE = "adapter_config.json"
SPECTRAL_FILES = ("spectral.json", "spectral.safetensors")


@dataclass(frozen=True)
class Adapter:
    """An adapter that `put_on` has put on a model, to be trained.

    Attributes:
        method: its name.
        rank: r.
        alpha: its scale; None where the method has none.
        model: that carries it, itself and not a copy.
        entries: numbers of it that are trained, by the method's formula; what `dense` names is not among them.
        trained: names of all trained parameters in the model.
        dense: those of them that are no part of the adapter, such as a new classifier head.
    """

    method: AdapterName
    rank: int
    alpha: float | None
    model: nn.Module
    entries: int
    trained: tuple[str, ...]
    dense: tuple[str, ...]

    def param_groups(self) -> list[dict[str, Any]]:
        """One dense group for `SparseAdamW`; every other parameter is frozen."""
        wanted, members = set(self.trained), []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in wanted)
            if name in wanted:
                members.append((name, parameter))
        return [{"params": members, "sparse": False, "halves": None}]

    def check_writable(self) -> None:
        """Whether the folder would give the trained model back.

        Raises:
            ConfigError: if a parameter that is trained whole is tied to another: the reader's copy would not be.
        """
        known: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            known.setdefault(id(parameter), []).append(name)
        for names in known.values():
            if len(names) > 1 and set(names) & set(self.dense):
                raise ConfigError(
                    f"modules_to_train has {names[0]}, which is tied to {names[1]}: an adapter's folder cannot hold "
                    "it; export the checkpoint instead, or leave it out of modules_to_train"
                )

    def save_pretrained(self, folder: str | Path, *, base: str = "", overwrite: bool = False) -> Path:
        """Write the adapter: safetensors and JSON, nothing pickled.

        For peft's methods the folder is peft's, and `peft.PeftModel.from_pretrained(model, folder)` reads it; PiSSA is
        written as the LoRA of rank 2r that stands for its change. `load_adapter` reads all of them.

        Args:
            folder: the target, which has its name only when it is complete; its parents are made.
            base: what the files call the model that the adapter is for.
            overwrite: replace an adapter that is there.

        Returns:
            The folder, as an absolute path.

        Raises:
            FileExistsError: as `check_adapter_folder` does.
            ConfigError: as `check_writable` does.
        """
        target = check_adapter_folder(folder, overwrite=overwrite)
        self.check_writable()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
        try:
            if METHODS[self.method].by_peft:
                write_by_peft(self.model, self.method, partial, self._dense_modules(), base)
            else:
                self._write_spectral(partial, base)
            move_into_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _dense_modules(self) -> dict[str, Tensor]:
        """All that the modules of densely trained parameters hold themselves: peft reads whole modules."""
        found: dict[str, Tensor] = {}
        for module_name in dict.fromkeys(name.rpartition(".")[0] for name in self.dense):
            module = self.model.get_submodule(module_name)
            found |= {f"{module_name}.{name}": value for name, value in module.state_dict().items()}
        return found

    def _write_spectral(self, folder: Path, base: str) -> None:
        layers = [name for name, module in self.model.named_modules() if isinstance(module, SpectralLinear)]
        state = {name: value for name, value in self.model.state_dict().items() if ".spectral_" in name}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in (state | self._dense()).items()}
        save_file(tensors, folder / SPECTRAL_FILES[1], metadata={"format": "pt"})
        content = {"method": self.method, "base": base, "rank": self.rank, "layers": layers, "dense": self.dense}
        (folder / SPECTRAL_FILES[0]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _dense(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name) for name in self.dense}


def put_on(
    model: nn.Module,
    method: AdapterName,
    rank: int,
    *,
    alpha: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_train: str | Sequence[str] = (),
    targets: Targets | None = None,
) -> Adapter:
    """Put a new adapter on a model, in place; all else is frozen.

    Args:
        model: without an adapter. Its weights stay as they are, but for PiSSA, which takes its start out of them.
        method: `lora`, `rslora`, `dora`, `pissa`, `shira` or `spectral`.
        rank: r, the same for every matrix.
        alpha: scale; twice the rank if not given, for PiSSA the rank.
        target_modules: presets and regular expressions, as `build_param_groups` takes them.
        modules_to_train: what is trained whole, in the same notation.
        targets: of `adapter_targets`, where they are known already; the patterns are not looked at then.

    Raises:
        ConfigError: for a rank that a matrix does not allow, an alpha of a method that has none, a pattern that matches
            nothing, a layer that the method does not serve, or where peft is missing.
    """
    if METHODS[method].by_peft:
        require_peft(method)
    if METHODS[method].alpha is None and alpha is not None:
        raise ConfigError(f"adapter_alpha={alpha}: method={method!r} has no alpha; leave it null")
    if alpha is not None and not alpha > 0:
        raise ConfigError(f"adapter_alpha must be above 0, or null for the method's own, got {alpha}")
    found = adapter_targets(model, method, target_modules, modules_to_train) if targets is None else targets
    check_rank(method, found.shapes, rank)
    default = METHODS[method].alpha
    scale = alpha if alpha is not None or default is None else default(rank)
    dense = {id(model.get_parameter(name)) for name in found.dense}
    names = list(found.shapes)
    if METHODS[method].by_peft:
        put_on_by_peft(model, method, names, rank, scale)
    else:
        put_on_spectral(model, names, rank)
    named = list(model.named_parameters())
    marked = [name for name, parameter in named if METHODS[method].marks in name and id(parameter) not in dense]
    kept = [name for name, parameter in named if id(parameter) in dense]
    counted = sum(model.get_parameter(name).numel() for name in marked)
    entries = trained_entries(method, found.shapes.values(), rank)
    assert counted == entries, f"{method} trains {counted} numbers, its formula says {entries}"
    adapter = Adapter(method, rank, scale, model, entries, (*marked, *kept), tuple(kept))
    adapter.param_groups()
    return adapter


def load_adapter(model: nn.Module, folder: str | Path) -> str:
    """Put a written adapter on its base, in place, for inference.

    Args:
        model: the base, without an adapter.
        folder: that `Adapter.save_pretrained`, or peft, wrote.

    Returns:
        The method; PiSSA's folder is one of `lora`.

    Raises:
        CheckpointError: if it is no folder of an adapter, or of another model.
    """
    path = Path(folder).expanduser()
    if (path / PEFT_FILE).is_file():
        require_peft("lora")
        load_by_peft(model, path)
        return method_in(json.loads((path / PEFT_FILE).read_text(encoding="utf-8")))
    if not (path / SPECTRAL_FILES[0]).is_file():
        raise CheckpointError(f"{str(path)!r} is no adapter: it has neither {PEFT_FILE} nor {SPECTRAL_FILES[0]}")
    content = json.loads((path / SPECTRAL_FILES[0]).read_text(encoding="utf-8"))
    tensors = load_file(path / SPECTRAL_FILES[1])
    modules = dict(model.named_modules())
    for name in content["layers"]:
        layer, u, v = modules.get(name), tensors[f"{name}.spectral_u"], tensors[f"{name}.spectral_v"]
        if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != (len(u), len(v)):
            raise CheckpointError(
                f"{str(path)!r} has an adapter for {name}, a linear layer of {len(u)} x {len(v)}, which the model does "
                f"not have: load it on its base, {content['base']!r}"
            )
    put_on_spectral(model, content["layers"], content["rank"], decompose=False)
    model.load_state_dict(tensors, strict=False)
    model.requires_grad_(False)
    return str(content["method"])


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Fold the adapter of a model into its weights, in place: plain layers of the same names as the base's remain.

    Raises:
        ConfigError: if it has none.
    """
    spectral = [(name, module) for name, module in model.named_modules() if isinstance(module, SpectralLinear)]
    if spectral:
        for name, module in spectral:
            model.set_submodule(name, module.merged())
        return
    if not hasattr(model, "peft_config") or not tuner_layers(model):
        raise ConfigError(f"{type(model).__name__} has no adapter that could be merged")
    merge_by_peft(model)


def check_adapter_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute path of a folder that an adapter may be written to; touches nothing.

    Raises:
        FileExistsError: if it is a file or not empty, unless it holds an adapter and `overwrite` is on.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not any((target / name).is_file() for name in (PEFT_FILE, SPECTRAL_FILES[0])):
        raise FileExistsError(f"{target} is there and is no adapter, so it is not replaced; choose another folder")
    if not overwrite:
        raise FileExistsError(f"{target} holds an adapter; choose another folder, or set overwrite to true")
    return target
