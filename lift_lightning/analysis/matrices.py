"""The weight matrices of a model that is on disk, read one at a time: no model is ever in memory as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lift_lightning.errors import ConfigError
from lift_lightning.models import load_empty_model
from lift_lightning.param_groups import Target, match_targets
from lift_lightning.weight_files import WeightFiles, WeightLayoutError


@dataclass(frozen=True)
class Place:
    """Where a matrix is.

    Attributes:
        name: of its parameter; with the number of the matrix in brackets where several share one (experts, halves).
        layer: its type, such as `q_proj`; with what it is a part of, as in `attn.c_proj`, where others have that name.
        depth: number of its block, counted from 0; -1 outside of blocks.
        shape: (M, N), outputs and inputs, whichever way the model keeps it.
    """

    name: str
    layer: str
    depth: int
    shape: tuple[int, int]


Progress = Callable[[Iterable[Place]], Iterable[Place]]  # wraps what is read, such as `rich.progress.track`


class Checkpoint:
    """The matrices of one model folder that LIFT would train.

    Attributes:
        label: as the folder was asked for.
        places: of the matrices, in the model's order.
    """

    def __init__(self, label: str, files: WeightFiles, model: nn.Module, target_modules: str | Sequence[str]) -> None:
        self.label, self._files = label, files
        targets = match_targets(model, target_modules)
        self._parts = {place: (target, i) for target, i, place in places_of(targets)}
        self.places = list(self._parts)

    def read(self, place: Place) -> Tensor:
        """(M, N) float32, on the CPU. One parameter is in memory in its own dtype meanwhile.

        Raises:
            ConfigError: if it holds NaN or infinity.
        """
        target, i = self._parts[place]
        matrix = target.matrices(self._files.read(target.name))[i].float()
        if not matrix.isfinite().all():
            raise ConfigError(f"{place.name} of {self.label!r} holds NaN or infinity: the run that wrote it diverged")
        return matrix

    def dtype(self, place: Place) -> torch.dtype:
        """In which the file keeps it."""
        return self._files.read(self._parts[place][0].name).dtype


def places_of(targets: Sequence[Target]) -> Iterator[tuple[Target, int, Place]]:
    """Every matrix of the targets: its target, its number in that, and where it is."""
    layers = layer_types([target.name for target in targets])
    for target in targets:
        views = target.matrices()
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", target.name)
        for i, view in enumerate(views):
            name = target.name if len(views) == 1 else f"{target.name}[{i}]"
            layer = layers[target.name] if target.halves is None else f"{layers[target.name]} ({('gate', 'up')[i % 2]})"
            yield target, i, Place(name, layer, int(numbers[0]) if numbers else -1, (view.shape[0], view.shape[1]))


def layer_types(names: Sequence[str]) -> dict[str, str]:
    """`q_proj` for `model.layers.0.self_attn.q_proj.weight`; `attn.c_proj` where there is another kind of `c_proj`."""
    starred = {}
    for name in names:
        *within, own = name.removesuffix(".weight").split(".")
        starred[name] = ["*" if part.isdigit() else part for part in within] + [own]
    kinds = {tuple(parts) for parts in starred.values()}

    def shortest(parts: list[str]) -> str:
        for length in range(1, len(parts)):
            end = tuple(parts[-length:])
            if sum(kind[-length:] == end for kind in kinds) == 1:
                return ".".join(end)
        return ".".join(parts)

    return {name: shortest(parts) for name, parts in starred.items()}


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
