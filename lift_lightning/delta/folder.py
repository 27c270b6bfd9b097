"""A base and a delta become a model folder that transformers loads, one tensor at a time."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lift_lightning.delta.bits import bits
from lift_lightning.delta.format import Delta, Progress, stored_dtype
from lift_lightning.delta.live import check_base
from lift_lightning.delta.sources import FolderSource, Source, in_dtype_of
from lift_lightning.errors import DeltaError
from lift_lightning.indices import scatter
from lift_lightning.models import check_export_folder, move_into_place

# As transformers splits its files, and the most that is in memory at one time.
SHARD_BYTES = 5 * 10**9


def applied(base: Source, delta: Delta, *, progress: Progress[str] = iter) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the trained checkpoint, one after the other.

    Args:
        base: what the delta was made from; compared with its checksums.
        delta: what is applied.
        progress: shows how far it is.

    Yields:
        Names and tensors, in the dtypes that the trained checkpoint has.

    Raises:
        DeltaError: if the base is another one. Tensors before the one that tells have been yielded by then.
    """
    check_names(base, delta)
    for name in progress(list(delta.description.tensors)):
        record = delta.description.tensors[name]
        if record.kind == "added":
            yield name, delta.tensors[f"{name}.whole"]
            continue
        before = base.read(name)
        if tuple(before.shape) != (record.base_shape or record.shape):
            raise DeltaError(
                f"{name} is {tuple(before.shape)} in {base.label!r} and {record.base_shape or record.shape} in the "
                f"base of {delta.label}: name that base, {delta.description.base_label}"
            )
        tensor = in_dtype_of(before, before.new_empty(0, dtype=stored_dtype(record)), name)
        check_base(tensor, name, delta)
        if record.kind == "whole":
            tensor = delta.tensors[f"{name}.whole"]
        elif record.kind == "sparse":
            indices, values = delta.entries(name)
            tensor = tensor.clone()  # what was read may be memory of the file, and would be read so again
            scatter(bits(tensor), indices, bits(values))
        if record.kind != "removed":
            yield name, tensor


def check_names(base: Source, delta: Delta) -> None:
    """Whether a base has the tensors that the delta's base had.

    Raises:
        DeltaError: if it has others.
    """
    expected = set(delta.description.tensors) - set(delta.description.of_kind("added"))
    if wrong := sorted(expected ^ set(base.names())):
        has = "has no" if wrong[0] in expected else "has a tensor that it should not have,"
        raise DeltaError(
            f"{base.label!r} is not the base of {delta.label}: it {has} {wrong[0]}; name {delta.description.base_label}"
        )


def write_model(
    base: FolderSource,
    delta: Delta,
    folder: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress[str] = iter,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the trained checkpoint as a model folder: safetensors, the trained config, the base's tokenizer.

    Args:
        base: what the delta was made from.
        delta: what is applied.
        folder: the target, which has its name only when it is complete; its parents are made.
        overwrite: replace a model folder that is there.
        progress: shows how far it is.
        shard_bytes: of one file, and about what is in memory at one time.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written, see `check_export_folder`.
        DeltaError: if the base is another one; nothing is written then.
    """
    target = check_export_folder(folder, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        _write_shards(applied(base, delta, progress=progress), partial, shard_bytes)
        for file in sorted(base.folder.iterdir()):
            if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
                shutil.copy(file, partial)
        if delta.description.model_config is not None:
            text = json.dumps(delta.description.model_config, indent=2, sort_keys=True)
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        move_into_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """`model.safetensors`, or numbered files and the index that transformers reads."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > shard_bytes:
            write()
        shard[name] = tensor
        total += tensor.nbytes
    write()
    # How many there are is part of their names.
    many = len(shards) > 1
    names = [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        for i, _ in enumerate(shards)
    ]
    for i, name in enumerate(names):
        (folder / f"{i}.safetensors").rename(folder / name)
    if many:
        where = {tensor: name for name, tensors_in in zip(names, shards, strict=True) for tensor in tensors_in}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
