"""Where tensors are read from, one at a time: the safetensors of a model's folder, or a model in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lift_lightning.errors import DeltaError
from lift_lightning.models import ModelUnavailableError, model_folder
from lift_lightning.param_groups import clean_name
from lift_lightning.sharding import owned
from lift_lightning.weight_files import WeightFiles, WeightLayoutError


class Source(Protocol):
    """Tensors by name.

    Attributes:
        label: what messages call it.
    """

    label: str

    def names(self) -> list[str]:
        """Of all its tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """One of them, whole, contiguous and on the CPU."""
        ...


class FolderSource:
    """The safetensors of a folder, in one file or several.

    Attributes:
        label: as the folder was asked for.
        folder: where it is.
        revision: the commit that the hub's name stood for; None for a folder of the user's own.
    """

    def __init__(self, label: str, folder: Path, files: WeightFiles) -> None:
        self.label, self.folder, self._files = label, folder, files
        self.revision = folder.name if re.search(r"/snapshots/[0-9a-f]{40}$", folder.as_posix()) else None

    def names(self) -> list[str]:
        """Of all its tensors."""
        return self._files.names()

    def read(self, name: str) -> Tensor:
        """One of them."""
        return self._files.read(name)


@contextmanager
def open_folder(name_or_path: str, revision: str | None = None, *, option: str = "base") -> Iterator[FolderSource]:
    """The weights of a model as a source, while the context lasts.

    Args:
        name_or_path: a folder with safetensors, or a hub id.
        revision: branch, tag or commit on the hub.
        option: what the user calls this argument.

    Raises:
        ModelUnavailableError: if there is no such model, or it cannot be reached.
        DeltaError: if it has no safetensors, or they cannot be read.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise DeltaError(
            f"--{option} {name_or_path!r} is a file: name the folder that holds the model's safetensors; of a training "
            "checkpoint, export makes one"
        )
    try:
        folder = path if path.is_dir() and any(path.glob("*.safetensors")) else model_folder(name_or_path, revision)
        files = WeightFiles(folder)
    except ModelUnavailableError as error:
        raise ModelUnavailableError(str(error).replace("--model.model_name_or_path", f"--{option}")) from error
    except WeightLayoutError as error:
        raise DeltaError(
            f"--{option} {name_or_path!r} has no weights that can be read: {error}; save the model as safetensors"
        ) from error
    except SafetensorError as error:
        raise DeltaError(
            f"--{option} {name_or_path!r}: its safetensors are broken or cut off ({error}); fetch or write them again"
        ) from error
    try:
        yield FolderSource(name_or_path, folder.resolve(), files)
    finally:
        files.close()


class ModelSource:
    """The parameters and buffers of a model in memory, as its checkpoint would have them.

    Of tied parameters the names that the base has are taken, all of them: old checkpoints hold a tied head as well.

    Args:
        model: not split over devices; or its state dict.
        names_in_base: of the checkpoint that it is compared with.
        label: what messages call it.

    Raises:
        DeltaError: if its parameters are split over devices.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        names_in_base: Iterable[str],
        label: str = "the model in memory",
    ) -> None:
        self.label = label
        known = set(names_in_base)
        self._tensors: dict[str, Tensor] = {}
        for names, tensor in tensors_of(model) if isinstance(model, nn.Module) else tied(model):
            kept = [name for name in names if name in known] or names[:1]
            self._tensors.update(dict.fromkeys(kept, tensor))

    def names(self) -> list[str]:
        """Of all its tensors."""
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """One of them; shares the memory of a parameter that is on the CPU."""
        return self._tensors[name].detach().cpu().contiguous()


class DictSource:
    """Tensors that are in memory already, by name."""

    def __init__(self, tensors: dict[str, Tensor], label: str) -> None:
        self.label, self._tensors = label, tensors

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """One of them."""
        return self._tensors[name].detach().cpu().contiguous()


def tensors_of(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Parameters and persistent buffers with all the names that each has, cleaned of what wrappers put into them.

    Raises:
        DeltaError: if a parameter is split over devices.
    """
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(clean_name(name))
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full = clean_name(f"{prefix}.{name}" if prefix else name)
                found.setdefault(id(buffer), ([], buffer))[0].append(full)
    for names, tensor in found.values():
        if owned(tensor).group is not None:
            raise DeltaError(
                f"{names[0]} is split over several devices: a delta is made of, and applied to, a model that each "
                "process has whole; load it without FSDP"
            )
    return list(found.values())


def check_names_in_base(model: nn.Module, in_base: list[str], new: Iterable[str] | None) -> None:
    """Whether the base's files hold a model's parameters under the model's names.

    What transformers fuses or renames when it loads it would all be new, and nothing of the base would be found in it.

    Args:
        model: under any strategy.
        in_base: names of the tensors in the files.
        new: parameters that the base does not have; None if that is not known.

    Raises:
        DeltaError: if others than those are not there, or none is.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(clean_name(name))
    known = set(in_base)
    unknown = [names for names in aliases.values() if known.isdisjoint(names)]
    if new is not None:
        unknown = [names for names in unknown if set(new).isdisjoint(names)]
    elif len(unknown) < len(aliases):
        unknown = []  # a head of the user's own, perhaps
    if unknown:
        raise DeltaError(
            f"the base's files have no {unknown[0][0]}: they hold the parameters under other names than the model; "
            "export the checkpoint and the base as model folders, and compare those with delta extract"
        )


def tied(tensors: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Tensors with all the names that each has: those that are one memory, as tied ones are in a state dict."""
    found: dict[object, tuple[list[str], Tensor]] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)
        found.setdefault(memory, ([], tensor))[0].append(name)
    return list(found.values())


def in_dtype_of(base: Tensor, other: Tensor, name: str) -> Tensor:
    """The base as it is loaded in the dtype of the other: training in float32 begins from a bfloat16 file widened.

    Raises:
        DeltaError: if the dtypes differ and are not both floating-point.
    """
    if base.dtype == other.dtype:
        return base
    if not (base.is_floating_point() and other.is_floating_point()):
        raise DeltaError(
            f"{name} is {base.dtype} in one checkpoint and {other.dtype} in the other: only floating-point tensors are "
            "compared in another dtype; compare checkpoints that are stored alike"
        )
    return base.to(other.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
