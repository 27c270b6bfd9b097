"""A delta in memory, and as a folder of one safetensors file and one JSON file."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lift_lightning.delta.coding import coded_bytes, decode
from lift_lightning.delta.description import Description, Record, digest, from_json
from lift_lightning.errors import DeltaError
from lift_lightning.models import move_into_place

TENSORS_FILE = "delta.safetensors"
DESCRIPTION_FILE = "delta.json"

T = TypeVar("T")
# Shows how far long work is: wraps what is gone through, as `rich.progress.track` does.
Progress = Callable[[Iterable[T]], Iterable[T]]


class Delta:
    """What of a checkpoint differs from its base, in the manner of a peft adapter.

    Args:
        description: of which base, and what there is of each tensor.
        tensors: what is stored, by the name of the tensor and one of `.indices` (coded positions, uint8), `.values`,
            `.whole`, and where the base's are stored too `.base_values`, `.base_whole`.
        label: what messages call it.

    Raises:
        DeltaError: if the tensors are not those of the description.
    """

    def __init__(self, description: Description, tensors: dict[str, Tensor], label: str = "the delta") -> None:
        self.description, self.tensors, self.label = description, tensors, label
        _check_tensors(description, tensors, label)

    def entries(self, name: str) -> tuple[Tensor, Tensor]:
        """Positions and values of what differs in one sparse tensor.

        Returns:
            (K,) flat indices, ascending, int32 below 2^31 entries, and (K,) values in the tensor's dtype.

        Raises:
            DeltaError: if the positions cannot be decoded.
        """
        record = self.description.tensors[name]
        try:
            indices = decode(self.tensors[f"{name}.indices"], record.changed, record.numel)
        except ValueError as error:
            raise DeltaError(f"{self.label} is broken at {name}: {error}; fetch or extract it again") from error
        return indices, self.tensors[f"{name}.values"]

    @property
    def nbytes(self) -> int:
        """Of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    # ---------------------------------------------------------------- folders and the hub

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `delta.safetensors` and `delta.json` into a folder, which has its name only when it is complete.

        Args:
            folder: its parents are made.
            overwrite: replace a delta that is there.

        Returns:
            The folder, as an absolute path.

        Raises:
            FileExistsError: if something is there that may not be replaced.
        """
        target = check_delta_folder(folder, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
        try:
            content = json.loads(json.dumps(self.description.to_json()))
            # Each file holds the other's checksum, so that neither can be changed alone. It is the only key:
            # safetensors writes several in no order, and the same delta would be another file each time.
            save_file(self.tensors, partial / TENSORS_FILE, metadata={"description_sha256": digest(content)})
            content["file_bytes"] = (partial / TENSORS_FILE).stat().st_size
            content["file_sha256"] = file_checksum(partial / TENSORS_FILE)
            (partial / DESCRIPTION_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            move_into_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None, token: str | None = None) -> Delta:
        """Read a delta that `save_pretrained` or `push_to_hub` wrote, after its checksums.

        Args:
            name_or_path: a folder, or a hub id.
            revision: branch, tag or commit on the hub.
            token: for the hub.

        Raises:
            DeltaError: if there is no delta, or a file is cut off, changed or of a later version.
        """
        folder = _fetched(str(name_or_path), revision, token)
        for name in (DESCRIPTION_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                raise DeltaError(f"{str(name_or_path)!r} is no delta: it has no {name}; delta extract makes one")
        content = _read_json(folder / DESCRIPTION_FILE)
        description = from_json(content, str(folder / DESCRIPTION_FILE))
        _check_file(folder / TENSORS_FILE, content)
        return cls(description, _read_tensors(folder / TENSORS_FILE, content), label=str(name_or_path))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload delta",
        create_pr: bool = False,
    ) -> str:
        """Upload it to the hub, into a repository that is made if there is none, with a model card that names the base.

        Args:
            repo_id: such as `user/name`.
            private: whether a new repository is private; None leaves it to the account.
            token: for the hub; None takes that of `hf auth login`.
            revision: branch to upload to.
            commit_message: of the upload.
            create_pr: propose it instead of uploading it.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            folder = self.save_pretrained(Path(parent) / "delta")
            self._card(repo_id).save(folder / "README.md")
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        return str(commit.commit_url)

    def _card(self, repo_id: str) -> ModelCard:
        base = self.description.base
        data = ModelCardData(library_name="lift-lightning", tags=["lift", "sparse-delta"])
        if _is_repo_id(base):
            data.base_model = base
        changed = sum(record.changed for record in self.description.tensors.values())
        text = (
            f"# {repo_id.split('/')[-1]}\n\nThe entries that differ from {self.description.base_label} after sparse "
            f"fine-tuning: {changed:,} of them.\n\n```python\nfrom lift_lightning.delta import Delta, apply\n\n"
            f'applied = apply(model, Delta.from_pretrained("{repo_id}"))\n```\n'
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def check_delta_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute path of a folder that a delta may be written to; touches nothing.

    Raises:
        FileExistsError: if it is a file or not empty, unless it holds a delta and `overwrite` is on.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not (target / DESCRIPTION_FILE).is_file():
        raise FileExistsError(f"{target} is there and is no delta, so it is not replaced; choose another folder")
    if not overwrite:
        raise FileExistsError(f"{target} holds a delta; choose another folder, or set overwrite to true")
    return target


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()


def _fetched(name: str, revision: str | None, token: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not _is_repo_id(name):
        raise DeltaError(f"there is no delta folder {name!r}, and it is no hub id")
    try:
        return Path(
            snapshot_download(name, revision=revision, token=token, allow_patterns=[TENSORS_FILE, DESCRIPTION_FILE])
        )
    except Exception as error:  # huggingface_hub's, and those of whichever HTTP library it uses
        reason = str(error).strip().splitlines()
        raise DeltaError(
            f"there is no delta folder {name!r}, and as a hub id it cannot be fetched: {type(error).__name__}"
            f"{': ' + reason[0] if reason else ''}"
        ) from error


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of what is no text
        raise DeltaError(f"{path} is broken or cut off: {error}; fetch or extract the delta again") from error
    if not isinstance(content, dict):
        raise DeltaError(f"{path} is no description of a delta: it holds a {type(content).__name__}")
    return content


def _check_file(path: Path, content: dict[str, Any]) -> None:
    size, expected = path.stat().st_size, content.get("file_bytes")
    if size != expected:
        raise DeltaError(
            f"{path} has {size:,} bytes, {DESCRIPTION_FILE} says {expected}: it is cut off, or of another delta; fetch "
            "or extract it again"
        )
    found = file_checksum(path)
    if found != content.get("file_sha256"):
        raise DeltaError(
            f"{path} was changed: its checksum is {found}, {DESCRIPTION_FILE} says {content.get('file_sha256')}; fetch "
            "or extract it again"
        )


def _read_tensors(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("description_sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise DeltaError(f"{path} is no safetensors file ({error}); fetch or extract the delta again") from error
    described = {key: value for key, value in content.items() if key not in ("file_bytes", "file_sha256")}
    if said != (found := digest(described)):
        raise DeltaError(
            f"{path.with_name(DESCRIPTION_FILE)} was changed: its checksum is {found}, {path.name} says {said}; fetch "
            "or extract it again"
        )
    return tensors


def _check_tensors(description: Description, tensors: dict[str, Tensor], label: str) -> None:
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, record in description.tensors.items():
        expected.update(_stored(name, record, description.base_values))
    found = {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise DeltaError(
            f"{label} is broken: {wrong[0]} is {found.get(wrong[0], 'not there')}, its description says "
            f"{expected.get(wrong[0], 'that there is none')}; fetch or extract it again"
        )


def _stored(name: str, record: Record, base_values: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor that is stored of one."""
    if record.kind == "sparse":
        values = {f"{name}.{key}" for key in ("values", *(["base_values"] if base_values else []))}
        coded = ((coded_bytes(record.changed, record.numel),), "uint8")
        return {f"{name}.indices": coded, **{key: ((record.changed,), record.dtype) for key in values}}
    if record.kind in ("whole", "added"):
        found = {f"{name}.whole": (record.shape, record.dtype)}
        if base_values and record.kind == "whole":
            found[f"{name}.base_whole"] = (record.base_shape or record.shape, record.dtype)
        return found
    return {}


def stored_dtype(record: Record) -> torch.dtype:
    """The dtype that a record names."""
    found = getattr(torch, record.dtype, None)
    if not isinstance(found, torch.dtype):
        raise DeltaError(f"{record.dtype!r} is no dtype that this torch has; install a newer one")
    return found
