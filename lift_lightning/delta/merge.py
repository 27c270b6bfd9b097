"""Several deltas of one base become one.

Letters: K entries that a delta changes in a tensor, U entries that any of them changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lift_lightning.delta.bits import bits, differing, positions
from lift_lightning.delta.coding import encode
from lift_lightning.delta.description import Record
from lift_lightning.delta.extract import Parts
from lift_lightning.delta.format import Delta, Progress, stored_dtype
from lift_lightning.delta.live import check_base
from lift_lightning.delta.sources import Source, in_dtype_of
from lift_lightning.errors import ConfigError, DeltaError
from lift_lightning.indices import scatter

# What becomes of an entry that several deltas change.
Overlap = Literal["refuse", "last", "mean", "sum"]


def merge(
    deltas: Sequence[Delta],
    overlap: Overlap = "refuse",
    *,
    base: Source | None = None,
    progress: Progress[str] = iter,
) -> Delta:
    """One delta that changes what any of several does.

    An entry that one of them changes gets the value that it has there, to the last bit, whatever `overlap` is.

    Args:
        deltas: two or more, of the same base and in the same dtype.
        overlap: of entries that several change: `refuse` them, take the value of the `last` delta that does, or add
            the `mean` or the `sum` of the differences that those make to the base's value, in float64.
        base: needed for `mean` and `sum`. With it, tensors that are stored whole are looked at entry by entry too;
            without, they count as changed everywhere.
        progress: shows how far it is.

    Returns:
        The delta; entries whose mean or sum of differences is nothing are not in it.

    Raises:
        ConfigError: if there is one delta only, `overlap` is unknown, or its base is not given.
        DeltaError: if the bases or dtypes differ, entries overlap that may not, or the deltas do not agree about which
            tensors there are.
    """
    if len(deltas) < 2:
        raise ConfigError(f"merging takes at least 2 deltas, got {len(deltas)}")
    if overlap not in get_args(Overlap):
        raise ConfigError(f"overlap must be one of {', '.join(get_args(Overlap))}, got {overlap!r}")
    if overlap in ("mean", "sum") and base is None:
        raise ConfigError(f"overlap={overlap!r} adds differences to the base's values: give the base")
    _check_same_base(deltas)
    parts = Parts(base_values=all(delta.description.base_values for delta in deltas))
    names = dict.fromkeys(name for delta in deltas for name in delta.description.tensors)
    for name in progress(list(names)):
        _merge_tensor(parts, name, deltas, overlap, base)
    first = deltas[0].description
    recipe = {
        "overlap": overlap,
        "merged": [{"delta": delta.label, "recipe": delta.description.recipe} for delta in deltas],
    }
    return parts.delta(first.base, first.revision, recipe, first.model_config)


def _check_same_base(deltas: Sequence[Delta]) -> None:
    first = deltas[0]
    for other in deltas[1:]:
        for name in first.description.tensors.keys() | other.description.tensors.keys():
            one, two = first.description.tensors.get(name), other.description.tensors.get(name)
            if one is not None and two is not None and one.dtype != two.dtype:
                raise DeltaError(
                    f"{name} is {one.dtype} in {first.label} and {two.dtype} in {other.label}: extract both from "
                    "checkpoints of one dtype"
                )
            if (one and one.base_sha256) != (two and two.base_sha256):
                raise DeltaError(
                    f"{first.label} and {other.label} are of different bases, {first.description.base_label} and "
                    f"{other.description.base_label}: they differ in {name}; merge deltas of one base"
                )


def _merge_tensor(parts: Parts, name: str, deltas: Sequence[Delta], overlap: Overlap, base: Source | None) -> None:
    having = [delta for delta in deltas if name in delta.description.tensors]
    records = [delta.description.tensors[name] for delta in having]
    removing = [record.kind == "removed" for record in records]
    if any(removing) and not all(removing):
        raise DeltaError(
            f"{having[removing.index(True)].label} removes {name}, {having[removing.index(False)].label} keeps it: "
            "merge deltas that agree"
        )
    changing = [delta for delta in having if delta.description.tensors[name].kind not in ("same", "removed")]
    if len(changing) < 2:
        _copy(parts, name, (changing or having)[0])
        return
    kinds = {delta.description.tensors[name].kind for delta in changing}
    reshaped = any(delta.description.tensors[name].base_shape for delta in changing)
    if "added" in kinds or reshaped:
        if overlap != "last":
            how = "reshape" if reshaped else "add"
            raise DeltaError(
                f"{len(changing)} deltas {how} {name}, whose entries cannot be told apart: leave one of them out, or "
                "take the last with overlap=last"
            )
        _copy(parts, name, changing[-1])
        return
    before = None if base is None else _base_tensor(base, name, changing[0])
    touched = [_touched(delta, name, before) for delta in changing]
    where, count = _union([indices for indices, _ in touched], records[0].numel)
    if overlap == "refuse" and (twice := int(torch.count_nonzero(count > 1))):
        raise DeltaError(
            f"{twice:,} of the {where.numel():,} changed entries of {name} are changed by more than one of "
            f"{', '.join(delta.label for delta in changing)}: choose overlap=last, mean or sum"
        )
    values = _merged_values(touched, where, count, overlap, before)
    _store(parts, name, changing, where, values, before)


def _copy(parts: Parts, name: str, delta: Delta) -> None:
    """A tensor as one delta has it."""
    parts.records[name] = delta.description.tensors[name]
    for key, tensor in delta.tensors.items():
        owner, _, what = key.rpartition(".")
        if owner == name and (parts.base_values or not what.startswith("base_")):
            parts.tensors[key] = tensor


def _base_tensor(base: Source, name: str, delta: Delta) -> Tensor:
    record = delta.description.tensors[name]
    if name not in base.names():
        raise DeltaError(f"{base.label!r} has no {name}: give the base, {delta.description.base_label}")
    read = base.read(name)
    tensor = in_dtype_of(read, read.new_empty(0, dtype=stored_dtype(record)), name)
    check_base(tensor, name, delta)
    return tensor


def _touched(delta: Delta, name: str, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """(K,) ascending int64 positions that a delta changes in a tensor, and its values there."""
    if delta.description.tensors[name].kind == "sparse":
        indices, values = delta.entries(name)
        return indices.long(), values
    whole = delta.tensors[f"{name}.whole"]
    where = torch.arange(whole.numel()) if base is None else positions(differing(base, whole))
    return where, bits(whole)[where].view(whole.dtype)


def _union(selections: list[Tensor], numel: int) -> tuple[Tensor, Tensor]:
    """(U,) ascending positions that any has, and how many have each."""
    where, count = np.unique(np.concatenate([one.numpy() for one in selections]), return_counts=True)
    assert not where.size or where[-1] < numel, "they were checked when they were decoded"
    return torch.from_numpy(where), torch.from_numpy(count)


def _merged_values(
    touched: list[tuple[Tensor, Tensor]], where: Tensor, count: Tensor, overlap: Overlap, base: Tensor | None
) -> Tensor:
    """(U,) values: where one delta changes the entry, its own bits.

    Args:
        touched: of each delta (K,) positions and values.
        where: (U,) positions.
        count: (U,) how many deltas change each.
        overlap: what becomes of those that several do.
        base: the whole tensor, for `mean` and `sum`.
    """
    dtype = touched[0][1].dtype
    values = torch.empty(where.numel(), dtype=dtype)
    places = [torch.searchsorted(where, indices) for indices, _ in touched]
    for place, (_, own) in zip(places, touched, strict=True):
        bits(values)[place] = bits(own)  # the last one's stay
    if overlap not in ("mean", "sum"):
        return values
    assert base is not None, "checked by merge"
    if not dtype.is_floating_point:
        raise DeltaError(f"differences of {dtype} are not added: choose overlap=last")
    before = base.reshape(-1)[where].double()
    total = torch.zeros(where.numel(), dtype=torch.float64)
    for place, (_, own) in zip(places, touched, strict=True):
        total[place] += own.double() - before[place]
    if overlap == "mean":
        total /= count
    several = positions(count > 1)
    bits(values)[several] = bits((before + total)[several].to(dtype))
    return values


def _store(parts: Parts, name: str, changing: list[Delta], where: Tensor, values: Tensor, base: Tensor | None) -> None:
    if base is not None:
        merged = base.clone()
        scatter(bits(merged), where, bits(values))
        parts.compare(name, base, merged)
        return
    first: Record = changing[0].description.tensors[name]
    if where.numel() == first.numel:
        whole = values.view(first.shape)
        parts.records[name] = Record("whole", first.shape, first.dtype, where.numel(), first.base_sha256)
        parts.tensors[f"{name}.whole"] = whole
    else:
        parts.records[name] = Record("sparse", first.shape, first.dtype, where.numel(), first.base_sha256)
        parts.tensors[f"{name}.indices"] = encode(where, first.numel)
        parts.tensors[f"{name}.values"] = values
    if parts.base_values:
        _store_base_values(parts, name, changing, where)


def _store_base_values(parts: Parts, name: str, changing: list[Delta], where: Tensor) -> None:
    """What the deltas know of the base at the entries that any changes."""
    record = parts.records[name]
    old = torch.empty(where.numel(), dtype=stored_dtype(record))
    for delta in changing:
        if delta.description.tensors[name].kind == "sparse":
            place = torch.searchsorted(where, delta.entries(name)[0].long())
            bits(old)[place] = bits(delta.tensors[f"{name}.base_values"])
        else:
            bits(old).copy_(bits(delta.tensors[f"{name}.base_whole"])[where])
    key = "base_whole" if record.kind == "whole" else "base_values"
    parts.tensors[f"{name}.{key}"] = old.view(record.shape) if record.kind == "whole" else old
