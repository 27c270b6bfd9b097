"""The weights of a model folder, read in rows: each rank takes what it owns, and no process has the whole."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lift_lightning.sharding import local, owned


class WeightLayoutError(ValueError):
    """The files of a model do not hold its parameters one by one, under the names that they have in the model."""


class WeightFiles:
    """The safetensors of one model, open for reading.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and what it names.

    Raises:
        WeightLayoutError: if there are none.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        self._handles = ExitStack()
        self._slices: dict[str, Any] = {}
        self._file_of: dict[str, Any] = {}
        for name in names:
            if not (folder / name).is_file():
                raise WeightLayoutError(f"{folder} has no {name}")
            file = self._handles.enter_context(safe_open(folder / name, framework="pt"))
            self._slices.update((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118  # not a dict
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def names(self) -> list[str]:
        """Of all tensors, in the files' order."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory."""
        return self._file_of[name].get_tensor(name)

    def match(self, model: nn.Module) -> None:
        """Find each parameter in the files, a tied one under any of its names.

        Raises:
            WeightLayoutError: if one is not there, or in another shape: transformers knows how to convert it.
        """
        self._key_of: dict[str, str] = {}
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        for parameter in model.parameters():
            names = aliases[id(parameter)]
            key = next((name for name in names if name in self._slices), None)
            if key is None:
                raise WeightLayoutError(f"the files have no {names[0]}")
            if self._slices[key].get_shape() != list(parameter.shape):
                raise WeightLayoutError(f"{key} has another shape in the files than in the model")
            self._key_of.update(dict.fromkeys(names, key))

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Read what this rank owns of each parameter into it."""
        for name, parameter in model.named_parameters():
            mine = owned(parameter)
            row = mine.shape[1:].numel()
            rows: Tensor = self._slices[self._key_of[name]][mine.start // row : mine.stop // row]
            local(parameter).copy_(rows)

    def close(self) -> None:
        """The files."""
        self._slices.clear()
        self._file_of.clear()
        self._handles.close()
