"""Where tensors come from: folders that can be read, and models in memory under the names of their checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, read, write
from tiny import save_tiny_llama, tiny_llama

from lift_lightning.delta import ModelSource, open_folder
from lift_lightning.delta.sources import FolderSource, tensors_of
from lift_lightning.errors import DeltaError
from lift_lightning.models import ModelUnavailableError
from lift_lightning.sharding import owned
from lift_lightning.weight_files import WeightFiles


def opened(name: str, **options) -> list[str]:
    with open_folder(name, **options) as source:
        return source.names()


def test_a_folder_is_read_tensor_by_tensor(tmp_path: Path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(1.5), "c": torch.zeros(0, 4)}
    assert_same_bits(read(write(tmp_path / "one", tensors)), tensors)
    assert_same_bits(read(write(tmp_path / "several", tensors, shards=2)), tensors)


def test_the_revision_is_that_of_the_cache(tmp_path: Path):
    tensors = {"a": torch.zeros(1)}
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "snapshots").mkdir()
    with open_folder(str(write(tmp_path / "snapshots" / commit, tensors))) as source:
        assert source.revision == commit
    folder = write(tmp_path / commit, tensors)
    files = WeightFiles(folder)
    assert FolderSource("user/model", folder, files).revision is None
    files.close()


def test_what_cannot_be_read_is_named_by_its_option(tmp_path: Path):
    with pytest.raises(
        ModelUnavailableError, match=r"'/no/where': there is no such folder.* --trained /path/to/folder"
    ):
        opened("/no/where", option="trained")
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(
        DeltaError, match=r"--base .*last.ckpt' is a file: .* of a training checkpoint, export makes one"
    ):
        opened(str(tmp_path / "last.ckpt"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DeltaError, match=r"has no weights that can be read: .* has no model.safetensors"):
        opened(str(tmp_path))
    folder = write(tmp_path / "model", {"a": torch.zeros(1000)})
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(DeltaError, match=r"its safetensors are broken or cut off \(.*\); fetch or write them again"):
        opened(str(folder))


def test_a_model_has_the_names_of_its_checkpoint(tmp_path: Path):
    """A tied head is not in a checkpoint of today; one that holds it as well has both names."""
    folder = save_tiny_llama(tmp_path / "model")
    model = tiny_llama()
    with open_folder(str(folder)) as source:
        names = source.names()
    assert "lm_head.weight" not in names
    assert sorted(ModelSource(model, names).names()) == sorted(names)
    both = ModelSource(model, [*names, "lm_head.weight"])
    assert sorted(both.names()) == sorted([*names, "lm_head.weight"])
    assert both.read("lm_head.weight").data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_names_lose_what_wrappers_put_in_and_buffers_are_there():
    class WithBuffers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.BatchNorm1d(3)
            self.register_buffer("table", torch.arange(4))
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    model = torch.nn.ModuleDict({"_orig_mod": WithBuffers()})
    names = [names for names, _ in tensors_of(model)]
    assert names == [
        ["inner.weight"],
        ["inner.bias"],
        ["table"],
        ["inner.running_mean"],
        ["inner.running_var"],
        ["inner.num_batches_tracked"],
    ]


def test_a_model_that_is_split_is_refused(monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    monkeypatch.setattr("lift_lightning.delta.sources.owned", lambda tensor: replace(owned(tensor), group=object()))
    with pytest.raises(DeltaError, match="weight is split over several devices: .* load it without FSDP"):
        tensors_of(torch.nn.Linear(2, 2))
