"""The weight matrices of a model that is on disk, read one at a time: no model is ever in memory as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lift_lightning.errors import ConfigError
from lift_lightning.models import load_empty_model
from lift_lightning.param_groups import Halves, match_targets, matrix_views
from lift_lightning.weight_files import WeightFiles, WeightLayoutError


@dataclass(frozen=True)
class Place:
    """Where a matrix is.

    Attributes:
        name: of its parameter; with the number of the matrix in brackets where several share one (experts, halves).
        layer: its type, such as `q_proj`.
        depth: number of its block, counted from 0; -1 outside of blocks.
        shape: (M, N).
    """

    name: str
    layer: str
    depth: int
    shape: tuple[int, int]


class Checkpoint:
    """The matrices of one model folder that LIFT would train.

    Attributes:
        label: as the folder was asked for.
        places: of the matrices, in the model's order.
    """

    def __init__(self, label: str, files: WeightFiles, model: nn.Module, target_modules: str | Sequence[str]) -> None:
        self.label, self._files = label, files
        self._halves: dict[str, Halves | None] = {}
        self._parts: dict[Place, tuple[str, int]] = {}
        for target in match_targets(model, target_modules):
            name, parameter, halves = target.name, target.parameter, target.halves
            self._halves[name] = halves
            views = matrix_views(parameter, halves)
            for i, view in enumerate(views):
                place = place_of(name, (view.shape[0], view.shape[1]), i if len(views) > 1 else None)
                self._parts[place] = (name, i)
        self.places = list(self._parts)

    def read(self, place: Place) -> Tensor:
        """(M, N) float32, on the CPU. One parameter is in memory in its own dtype meanwhile."""
        name, i = self._parts[place]
        return matrix_views(self._files.read(name), self._halves[name])[i].float()


def place_of(name: str, shape: tuple[int, int], part: int | None = None) -> Place:
    """The type of the layer and its depth, from the name of the parameter."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    *_, layer, last = ("", *name.split("."))
    layer = layer if last == "weight" else last
    return Place(name if part is None else f"{name}[{part}]", layer, int(numbers[0]) if numbers else -1, shape)


@contextmanager
def open_checkpoint(
    name_or_path: str,
    revision: str | None = None,
    target_modules: str | Sequence[str] = "all-linear",
) -> Iterator[Checkpoint]:
    """A model folder or hub id, while the context lasts.

    Args:
        name_or_path: a folder such as `export` writes, or a hub id.
        revision: branch, tag or commit on the hub.
        target_modules: which matrices, as for `build_param_groups`.

    Raises:
        ModelUnavailableError: if there is no such model, or it cannot be reached.
        ConfigError: if a pattern matches nothing, or the files hold the matrices under other names than the model.
    """
    try:
        model, files = load_empty_model(name_or_path, revision=revision)
    except WeightLayoutError as error:
        raise ConfigError(
            f"{name_or_path!r} cannot be read matrix by matrix: {error}; load it with transformers and write it with "
            "save_pretrained(..., save_original_format=False), as safetensors"
        ) from error
    try:
        yield Checkpoint(name_or_path, files, model, target_modules)
    finally:
        files.close()


@contextmanager
def open_together(
    names: Sequence[str], target_modules: str | Sequence[str] = "all-linear"
) -> Iterator[list[Checkpoint]]:
    """Several checkpoints of one model.

    Raises:
        ConfigError: if they have other matrices than the first.
    """
    if len(names) == 0:
        yield []
        return
    with (
        open_checkpoint(names[0], target_modules=target_modules) as first,
        open_together(names[1:], target_modules) as others,
    ):
        for other in others:
            if other.places != first.places:
                unlike = set(other.places) ^ set(first.places)
                example = min(unlike, key=lambda place: place.name)
                raise ConfigError(
                    f"{other.label!r} and {first.label!r} are not checkpoints of one model: {example.name} "
                    f"({example.shape[0]} x {example.shape[1]}) is in one of them only"
                )
        yield [first, *others]
