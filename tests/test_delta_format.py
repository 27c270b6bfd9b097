"""A delta as a folder: it comes back as it was, or is refused with what is wrong and what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, changed
from huggingface_hub import CommitInfo, HfApi
from safetensors.torch import load_file, save_file

from lift_lightning.delta import Delta, extract
from lift_lightning.delta.description import Record
from lift_lightning.delta.format import DESCRIPTION_FILE, TENSORS_FILE, file_checksum, stored_dtype
from lift_lightning.delta.sources import DictSource
from lift_lightning.errors import DeltaError


@pytest.fixture
def delta() -> Delta:
    base = {
        "w": torch.randn(30, 20, generator=torch.Generator().manual_seed(0)),
        "b": torch.ones(4),
        "s": torch.ones(2),
    }
    trained = {**base, "w": changed(base["w"], [2, 3, 599]), "b": torch.zeros(4), "new": torch.arange(3.0)}
    recipe = {"lr": 2e-4, "lift": {"rank": 4, "betas": [0.9, 0.95]}}
    return extract(
        DictSource(base, "user/base"),
        DictSource(trained, "trained"),
        revision="abc",
        recipe=recipe,
        model_config={"a": 1},
    )


@pytest.fixture
def folder(delta: Delta, tmp_path: Path) -> Path:
    return delta.save_pretrained(tmp_path / "delta")


def test_it_comes_back_as_it_was(delta: Delta, folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION_FILE, TENSORS_FILE]
    back = Delta.from_pretrained(folder)
    assert back.description == delta.description
    assert_same_bits(back.tensors, delta.tensors)
    assert back.nbytes == delta.nbytes
    assert back.label == str(folder)


def test_the_same_delta_is_the_same_file(delta: Delta, folder: Path, tmp_path: Path):
    again = Delta.from_pretrained(folder).save_pretrained(tmp_path / "parents" / "again")
    for name in (DESCRIPTION_FILE, TENSORS_FILE):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_description_is_plain_json(folder: Path):
    content = json.loads((folder / DESCRIPTION_FILE).read_text())
    assert content["base"] == "user/base"
    assert content["revision"] == "abc"
    assert content["recipe"]["lift"]["betas"] == [0.9, 0.95]
    assert set(content["tensors"]["w"]) == {"kind", "shape", "dtype", "changed", "base_sha256"}
    assert content["tensors"]["w"]["changed"] == 3


def test_nothing_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_, **__):
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    Delta.from_pretrained(folder)


def test_nothing_is_replaced_unasked(delta: Delta, folder: Path, tmp_path: Path):
    with pytest.raises(FileExistsError, match="holds a delta; choose another folder, or set overwrite to true"):
        delta.save_pretrained(folder)
    assert delta.save_pretrained(folder, overwrite=True) == folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is there and is no delta, so it is not replaced"):
        delta.save_pretrained(tmp_path / "other", overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ---------------------------------------------------------------- what is broken


def test_a_file_that_is_cut_off_is_refused(folder: Path):
    content = (folder / TENSORS_FILE).read_bytes()
    (folder / TENSORS_FILE).write_bytes(content[:-1])
    with pytest.raises(
        DeltaError, match=rf"has {len(content) - 1:,} bytes, delta.json says {len(content)}: it is cut off"
    ):
        Delta.from_pretrained(folder)
    (folder / DESCRIPTION_FILE).write_text((folder / DESCRIPTION_FILE).read_text()[:100])
    with pytest.raises(DeltaError, match="delta.json is broken or cut off"):
        Delta.from_pretrained(folder)


@pytest.mark.parametrize("place", [9, 200, -1])
def test_a_file_that_was_changed_is_refused(folder: Path, place: int):
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[place] ^= 1
    (folder / TENSORS_FILE).write_bytes(content)
    with pytest.raises(DeltaError, match=r"delta.safetensors was changed: its checksum is [0-9a-f]{64}, .*extract it"):
        Delta.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(base="user/other"),
        lambda content: content["tensors"]["w"].update(base_sha256="0" * 64),
        lambda content: content["tensors"].pop("s"),
        lambda content: content["recipe"].update(lr=1.0),
        lambda content: content.update(more=1),
    ],
)
def test_a_description_that_was_changed_is_refused(folder: Path, change):
    content = json.loads((folder / DESCRIPTION_FILE).read_text())
    change(content)
    (folder / DESCRIPTION_FILE).write_text(json.dumps(content))
    with pytest.raises(DeltaError, match="delta.json was changed: its checksum is"):
        Delta.from_pretrained(folder)


def test_files_of_two_deltas_are_refused(delta: Delta, folder: Path, tmp_path: Path):
    """Both whole, and of the same size."""
    base = {"w": torch.zeros(30, 20)}
    names = [extract(DictSource(base, "b"), DictSource({"w": changed(base["w"], [i])}, "t")) for i in (1, 2)]
    one, two = (one.save_pretrained(tmp_path / f"{i}") for i, one in enumerate(names))
    (two / TENSORS_FILE).rename(one / TENSORS_FILE)
    with pytest.raises(DeltaError, match="delta.safetensors was changed"):
        Delta.from_pretrained(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="other"), "its format is 'other', not lift-lightning-delta"),
        (lambda content: content.update(format_version=2), "is of version 2, and version 1 is what this release reads"),
        (lambda content: content.pop("base"), r"not as a delta describes itself \(KeyError: 'base'\)"),
        (lambda content: content["tensors"]["w"].update(kind="odd"), "kind 'odd' is none of same, sparse"),
        (lambda content: content["tensors"]["w"].pop("shape"), "not as a delta describes itself"),
        (lambda content: content.update(tensors=[]), "not as a delta describes itself"),
    ],
)
def test_a_description_of_another_kind_is_refused(folder: Path, change, message: str):
    content = json.loads((folder / DESCRIPTION_FILE).read_text())
    change(content)
    (folder / DESCRIPTION_FILE).write_text(json.dumps(content))
    with pytest.raises(DeltaError, match=message):
        Delta.from_pretrained(folder)


def test_what_is_no_delta_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DeltaError, match="there is no delta folder '/no/where', and it is no hub id"):
        Delta.from_pretrained("/no/where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeltaError, match=r"is no delta: it has no delta\.json"):
        Delta.from_pretrained(tmp_path / "empty")
    (folder / DESCRIPTION_FILE).write_text("[]")
    with pytest.raises(DeltaError, match="it holds a list"):
        Delta.from_pretrained(folder)
    (folder / TENSORS_FILE).unlink()
    with pytest.raises(DeltaError, match=r"is no delta: it has no delta\.safetensors"):
        Delta.from_pretrained(folder)
    monkeypatch.setattr(
        "lift_lightning.delta.format.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(DeltaError, match="as a hub id it cannot be fetched: OSError: no network"):
        Delta.from_pretrained("user/delta")


def with_right_checksums(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """As a faulty program would write it: the files agree, and what is in them does not."""
    save_file(tensors, folder / TENSORS_FILE, metadata=metadata)
    content = json.loads((folder / DESCRIPTION_FILE).read_text())
    content["file_bytes"] = (folder / TENSORS_FILE).stat().st_size
    content["file_sha256"] = file_checksum(folder / TENSORS_FILE)
    (folder / DESCRIPTION_FILE).write_text(json.dumps(content))


def test_tensors_that_are_not_as_described_are_refused(folder: Path):
    from safetensors import safe_open

    with safe_open(folder / TENSORS_FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / TENSORS_FILE)
    with_right_checksums(folder, {**tensors, "w.values": tensors["w.values"][:2].clone()}, metadata)
    with pytest.raises(
        DeltaError, match=r"w.values is \(\(2,\), 'float32'\), its description says \(\(3,\), 'float32'\)"
    ):
        Delta.from_pretrained(folder)
    with_right_checksums(folder, {**tensors, "odd.whole": torch.zeros(1)}, metadata)
    with pytest.raises(DeltaError, match="odd.whole is .* its description says that there is none"):
        Delta.from_pretrained(folder)
    with_right_checksums(folder, {**tensors, "w.indices": torch.zeros_like(tensors["w.indices"])}, metadata)
    with pytest.raises(DeltaError, match="is broken at w: the code has 0 indices, 3 are said to be in it"):
        Delta.from_pretrained(folder).entries("w")
    with_right_checksums(folder, tensors, {})
    with pytest.raises(DeltaError, match="delta.json was changed"):
        Delta.from_pretrained(folder)
    content = b"no tensors"
    (folder / TENSORS_FILE).write_bytes(content)
    description = json.loads((folder / DESCRIPTION_FILE).read_text())
    description |= {"file_bytes": len(content), "file_sha256": file_checksum(folder / TENSORS_FILE)}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description))
    with pytest.raises(DeltaError, match="is no safetensors file"):
        Delta.from_pretrained(folder)


def test_a_dtype_that_torch_does_not_have_is_named():
    assert stored_dtype(Record("same", (2,), "bfloat16")) == torch.bfloat16
    with pytest.raises(DeltaError, match="'float2' is no dtype that this torch has"):
        stored_dtype(Record("same", (2,), "float2"))


# ---------------------------------------------------------------- the hub, without one


def test_push_uploads_what_from_pretrained_reads(delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = {}

    def create_repo(self, repo_id: str, **options):
        calls["create"] = (repo_id, options)

    def upload_folder(self, *, folder_path: Path, **options):
        calls["upload"] = options
        Path(folder_path).rename(tmp_path / "hub")
        return CommitInfo("https://huggingface.co/user/delta/commit/1", "message", "", "1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    url = delta.push_to_hub("user/delta", private=True, revision="dev", commit_message="First", create_pr=True)
    assert url == "https://huggingface.co/user/delta/commit/1"
    assert calls["create"] == ("user/delta", {"private": True, "exist_ok": True})
    assert calls["upload"] == {
        "repo_id": "user/delta",
        "revision": "dev",
        "commit_message": "First",
        "create_pr": True,
    }
    card = (tmp_path / "hub/README.md").read_text()
    assert "base_model: user/base" in card
    assert "library_name: lift-lightning" in card
    fetched = {}

    def snapshot_download(name: str, **options) -> str:
        fetched.update(options, name=name)
        return str(tmp_path / "hub")

    monkeypatch.setattr("lift_lightning.delta.format.snapshot_download", snapshot_download)
    back = Delta.from_pretrained("user/delta", "dev")
    assert fetched["name"] == "user/delta"
    assert fetched["revision"] == "dev"
    assert sorted(fetched["allow_patterns"]) == [DESCRIPTION_FILE, TENSORS_FILE]
    assert_same_bits(back.tensors, delta.tensors)


def test_a_base_in_a_folder_is_not_named_as_one_of_the_hub(tmp_path: Path):
    base = {"w": torch.zeros(30)}
    found = extract(DictSource(base, "/models/base"), DictSource({"w": changed(base["w"], [1])}, "trained"))
    assert "base_model" not in str(found._card("user/delta"))
