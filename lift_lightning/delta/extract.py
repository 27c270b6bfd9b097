"""What of a checkpoint differs from another one: tensor by tensor, so that no two whole models are in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lift_lightning import __version__
from lift_lightning.delta.bits import bits, checksum, differing, positions
from lift_lightning.delta.coding import coded_bytes, encode
from lift_lightning.delta.description import Description, Record
from lift_lightning.delta.format import Delta, Progress
from lift_lightning.delta.sources import FolderSource, Source, dtype_name, in_dtype_of
from lift_lightning.errors import DeltaError


def extract(
    base: Source,
    trained: Source,
    *,
    base_name: str | None = None,
    revision: str | None = None,
    recipe: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    store_base_values: bool = False,
    progress: Progress[str] = iter,
) -> Delta:
    """The delta that makes one checkpoint of another.

    A tensor of another dtype than the base's is compared with the base cast to it, as loading casts it. Tensors that
    are in one checkpoint only become `added` or `removed`. In memory are one tensor of each checkpoint and what is
    stored.

    Args:
        base: what training began from.
        trained: what came of it.
        base_name: where users find the base; its label if not given.
        revision: of the base on the hub; that of its folder in the hub's cache if not given.
        recipe: how it was trained: strings, numbers, lists and mappings.
        model_config: the trained `config.json`; that of its folder if not given.
        store_base_values: keep what the base has at the changed entries, so that what the delta was applied to can be
            reverted where the base is not at hand. Values then take twice the bytes.
        progress: shows how far it is.

    Returns:
        The delta, in memory.

    Raises:
        DeltaError: if the checkpoints have no tensor in common, or one's dtype cannot be compared.
    """
    parts = Parts(store_base_values)
    for name, before, after in _pairs(base, trained, progress):
        parts.compare(name, before, after)
    if model_config is None and isinstance(trained, FolderSource) and (trained.folder / "config.json").is_file():
        model_config = json.loads((trained.folder / "config.json").read_text(encoding="utf-8"))
    if revision is None and isinstance(base, FolderSource):
        revision = base.revision
    return parts.delta(base_name or base.label, revision, recipe, model_config)


def _pairs(left: Source, right: Source, progress: Progress[str]) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Each tensor of two checkpoints, None where one does not have it."""
    names_left, names_right = set(left.names()), set(right.names())
    for name in progress(common_names(left, right)):
        one = left.read(name) if name in names_left else None
        yield name, one, right.read(name) if name in names_right else None


def common_names(base: Source, trained: Source) -> list[str]:
    """Names of all tensors of two checkpoints, the base's first.

    Raises:
        DeltaError: if they have none in common.
    """
    known = set(base.names())
    added = [name for name in trained.names() if name not in known]
    if known and len(added) == len(trained.names()):
        raise DeltaError(
            f"{base.label!r} and {trained.label!r} have no tensor of the same name (such as {base.names()[0]!r} and "
            f"{next(iter(added), None)!r}): compare two checkpoints of one model, both written by save_pretrained"
        )
    return [*base.names(), *added]


@dataclass
class Parts:
    """A delta that is being put together.

    Attributes:
        base_values: whether to store those.
        records: of the tensors so far.
        tensors: what is stored of them.
    """

    base_values: bool = False
    records: dict[str, Record] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def compare(self, name: str, base: Tensor | None, trained: Tensor | None) -> None:
        """Add what there is to one tensor, of either checkpoint or both."""
        if trained is None:
            assert base is not None, "it is in one of them"
            record = Record("removed", tuple(base.shape), dtype_name(base.dtype), base_sha256=checksum(base))
            self.records[name] = record
        elif base is None:
            self.add(name, trained)
        elif base.shape != trained.shape:
            self.replace(name, in_dtype_of(base, trained, name), trained)
        else:
            base = in_dtype_of(base, trained, name)
            mask = differing(base, trained)
            changed = int(torch.count_nonzero(mask))
            if changed == 0:
                self.keep(name, base)
            elif sparse_bytes(changed, base) >= base.nbytes:
                self.replace(name, base, trained, changed)
            else:
                where = positions(mask)
                values = bits(trained)[where].view(trained.dtype)
                self.sparse(name, base, where, values)

    def keep(self, name: str, base: Tensor) -> None:
        """A tensor as it is in the base."""
        self.records[name] = Record("same", tuple(base.shape), dtype_name(base.dtype), base_sha256=checksum(base))

    def add(self, name: str, trained: Tensor) -> None:
        """One that the base does not have."""
        self.records[name] = Record("added", tuple(trained.shape), dtype_name(trained.dtype), trained.numel())
        self.tensors[f"{name}.whole"] = trained.clone()

    def replace(self, name: str, base: Tensor, trained: Tensor, changed: int | None = None) -> None:
        """One that is stored whole; without `changed` it has another shape than in the base, in the same dtype."""
        shape, dtype = tuple(trained.shape), dtype_name(trained.dtype)
        before = None if changed is not None else tuple(base.shape)
        count = trained.numel() if changed is None else changed
        self.records[name] = Record("whole", shape, dtype, count, checksum(base), before)
        self.tensors[f"{name}.whole"] = trained.clone()
        if self.base_values:
            self.tensors[f"{name}.base_whole"] = base.clone()

    def sparse(self, name: str, base: Tensor, where: Tensor, values: Tensor) -> None:
        """(K,) positions and values in one that has the base's shape and dtype."""
        record = Record("sparse", tuple(base.shape), dtype_name(base.dtype), where.numel(), checksum(base))
        self.records[name] = record
        self.tensors[f"{name}.indices"] = encode(where, base.numel())
        self.tensors[f"{name}.values"] = values
        if self.base_values:
            self.tensors[f"{name}.base_values"] = bits(base)[where].view(base.dtype)

    def delta(
        self,
        base: str,
        revision: str | None,
        recipe: dict[str, Any] | None,
        model_config: dict[str, Any] | None,
    ) -> Delta:
        """What has come together."""
        written_by = f"lift-lightning {__version__}"
        description = Description(
            base, revision, self.records, recipe, model_config, self.base_values, written_by=written_by
        )
        return Delta(description, self.tensors)


def sparse_bytes(changed: int, tensor: Tensor) -> int:
    """What K changed entries of a tensor take as positions and values."""
    return changed * tensor.dtype.itemsize + coded_bytes(changed, tensor.numel())


@dataclass(frozen=True)
class Difference:
    """How one tensor of two checkpoints differs.

    Attributes:
        name: of the tensor.
        kind: `same`, `changed`, `reshaped`, or which checkpoint alone has it: `left only`, `right only`.
        entries: of the right one; of the left one where there is no right one.
        changed: entries whose bits differ.
        largest: the largest absolute difference; None where there is none to be taken.
    """

    name: str
    kind: Literal["same", "changed", "reshaped", "left only", "right only"]
    entries: int
    changed: int
    largest: float | None = None


def diff(left: Source, right: Source, *, progress: Progress[str] = iter) -> Iterator[Difference]:
    """How any two checkpoints differ, tensor by tensor. Other dtypes are compared as `extract` does.

    Raises:
        DeltaError: as `extract` does.
    """
    for name, one, other in _pairs(left, right, progress):
        if one is None or other is None:
            only = one if other is None else other
            assert only is not None, "it is in one of them"
            yield Difference(name, "left only" if other is None else "right only", only.numel(), only.numel())
        elif one.shape != other.shape:
            yield Difference(name, "reshaped", other.numel(), other.numel())
        else:
            yield _difference(name, in_dtype_of(one, other, name), other)


def _difference(name: str, left: Tensor, right: Tensor) -> Difference:
    where = positions(differing(left, right))
    if not where.numel():
        return Difference(name, "same", right.numel(), 0)
    largest = None
    if right.is_floating_point():
        apart = left.reshape(-1)[where].double() - right.reshape(-1)[where].double()
        largest = apart.abs().max().item()
    return Difference(name, "changed", right.numel(), where.numel(), largest)
