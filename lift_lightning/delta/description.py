"""What `delta.json` says: of which base, what of each tensor is stored, and how it was trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lift_lightning.errors import DeltaError

FORMAT = "lift-lightning-delta"
VERSION = 1

# same: as in the base. sparse: positions and values of what differs. whole: the tensor as it is now, where that is
# shorter or the shape is another. added, removed: in the trained checkpoint only, in the base only.
Kind = Literal["same", "sparse", "whole", "added", "removed"]


@dataclass(frozen=True)
class Record:
    """One tensor.

    Attributes:
        kind: what is stored of it.
        shape: as it is in the trained checkpoint; of one that is removed, in the base.
        dtype: likewise, such as `bfloat16`.
        changed: entries that differ from the base; all of one that is added or has another shape, 0 of one removed.
        base_sha256: of the base's bytes in this dtype; None if it is added.
        base_shape: where that is another.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    changed: int = 0
    base_sha256: str | None = None
    base_shape: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Description:
    """Everything that is not a tensor.

    Attributes:
        base: hub id, or the folder, of the model that the delta is of.
        revision: its commit on the hub, where it is known.
        tensors: every tensor of either checkpoint, by name.
        recipe: how it was trained, as far as it is known.
        model_config: the trained checkpoint's `config.json`.
        base_values: whether what the base has at the changed entries is stored too.
    """

    base: str
    revision: str | None
    tensors: dict[str, Record]
    recipe: dict[str, Any] | None = None
    model_config: dict[str, Any] | None = None
    base_values: bool = False
    written_by: str = field(default="", compare=False)

    @property
    def base_label(self) -> str:
        """The base as messages name it."""
        return f"{self.base!r}" if self.revision is None else f"{self.base!r} at revision {self.revision}"

    def of_kind(self, *kinds: Kind) -> list[str]:
        """Names of tensors."""
        return [name for name, record in self.tensors.items() if record.kind in kinds]

    def to_json(self) -> dict[str, Any]:
        """As it is written, without what concerns the file of tensors."""
        tensors = {
            name: {key: value for key, value in asdict(record).items() if value is not None}
            for name, record in self.tensors.items()
        }
        return {"format": FORMAT, "format_version": VERSION, **asdict(self), "tensors": tensors}


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a description as JSON, whatever its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def from_json(content: Mapping[str, Any], label: str) -> Description:
    """The description that a file holds.

    Args:
        content: as `to_json` returns it.
        label: what messages call the file.

    Raises:
        DeltaError: if it is of another format or a later version, or a value is missing or not what it should be.
    """
    if content.get("format") != FORMAT:
        raise DeltaError(f"{label} is no description of a delta: its format is {content.get('format')!r}, not {FORMAT}")
    if content.get("format_version") != VERSION:
        raise DeltaError(
            f"{label} is of version {content.get('format_version')!r}, and version {VERSION} is what this release "
            "reads: install the release that wrote it"
        )
    try:
        tensors = {name: _record(values) for name, values in content["tensors"].items()}
        known = ("base", "revision", "recipe", "model_config", "base_values", "written_by")
        return Description(tensors=tensors, **{key: content[key] for key in known})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DeltaError(
            f"{label} is not as a delta describes itself ({type(error).__name__}: {error}): fetch or extract it again"
        ) from error


def _record(values: Mapping[str, Any]) -> Record:
    if values["kind"] not in get_args(Kind):
        raise ValueError(f"kind {values['kind']!r} is none of {', '.join(get_args(Kind))}")
    shapes = {key: tuple(values[key]) for key in ("shape", "base_shape") if key in values}
    return Record(**{**values, **shapes})
