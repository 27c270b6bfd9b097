"""A state dict without what its base has already, for checkpoints of a training, and the whole one again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lift_lightning.delta.description import from_json
from lift_lightning.delta.extract import extract
from lift_lightning.delta.folder import applied
from lift_lightning.delta.format import Delta
from lift_lightning.delta.sources import ModelSource, Source, tied


def without_base(weights: Mapping[str, Tensor], base: Source) -> dict[str, Any]:
    """What of a model's state dict the base does not have: strings, numbers and tensors of its own.

    Args:
        weights: by name; tied ones share their memory.
        base: what training began from.

    Raises:
        DeltaError: if the base has none of the names.
    """
    known = ModelSource(weights, base.names())
    delta = extract(base, known)
    # Under which of its names a tensor is in the delta.
    stored = set(known.names())
    names = {name: next(one for one in group if one in stored) for group, _ in tied(weights) for name in group}
    return {"description": delta.description.to_json(), "tensors": delta.tensors, "names": names}


def with_base(content: Mapping[str, Any], base: Source, label: str) -> dict[str, Tensor]:
    """The state dict that `without_base` was given, to the last bit.

    Args:
        content: what `without_base` returned.
        base: what it was given; compared by its checksums.
        label: what messages call it.

    Raises:
        DeltaError: if the base is another one, or the content is broken.
    """
    description = from_json(content["description"], label)
    tensors = dict(applied(base, Delta(description, content["tensors"], label)))
    return {name: tensors[stored] for name, stored in content["names"].items()}
