"""What the tests of deltas share: checkpoints that differ in known ways, written as safetensors."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lift_lightning.delta import Delta, extract, open_folder
from lift_lightning.delta.bits import bits


def write(folder: Path, tensors: dict[str, Tensor], *, shards: int = 1, config: str = "{}") -> Path:
    """A model folder of these tensors, in one file or several."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    where = {}
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / f"model-{i}.safetensors")
        where.update(dict.fromkeys(part, f"model-{i}.safetensors"))
    quoted = ", ".join(f'"{name}": "{file}"' for name, file in where.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{quoted}}}}}')
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    with open_folder(str(folder)) as source:
        return {name: source.read(name).clone() for name in source.names()}


def delta_of(base: Path, trained: Path, **options) -> Delta:
    with ExitStack() as stack:
        before = stack.enter_context(open_folder(str(base)))
        after = stack.enter_context(open_folder(str(trained), option="trained"))
        return extract(before, after, **options)


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same tensors in the same shapes and dtypes, to the last bit."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(bits(tensor.cpu().contiguous()), bits(other.cpu().contiguous())), name


def changed(tensor: Tensor, positions: list[int], seed: int = 0) -> Tensor:
    """A copy with other bits at these flat positions."""
    generator = torch.Generator().manual_seed(seed)
    copy = tensor.clone()
    entries = bits(copy)
    flips = torch.randint(1, 100, (len(positions),), generator=generator).to(entries.dtype)
    entries[positions] = entries[positions] ^ flips
    return copy
