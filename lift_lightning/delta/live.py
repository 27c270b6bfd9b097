"""A delta on a model in memory: put on, taken off, and switched with others, to the last bit."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor, nn

from lift_lightning.delta.bits import bits, checksum, same_bits
from lift_lightning.delta.description import Record
from lift_lightning.delta.format import Delta, Progress
from lift_lightning.delta.sources import dtype_name, tensors_of
from lift_lightning.errors import DeltaError
from lift_lightning.indices import gather, scatter

# Which delta is on which model.
_APPLIED: weakref.WeakKeyDictionary[nn.Module, AttachedDelta] = weakref.WeakKeyDictionary()


@dataclass
class _Change:
    """What a delta does to one tensor of the model.

    Attributes:
        name: in the delta.
        target: the model's own tensor.
        indices: (K,) flat positions; None for all entries.
        values: (K,) or of the tensor's shape, as integers of its size.
    """

    name: str
    target: Tensor
    indices: Tensor | None
    values: Tensor

    def current(self) -> Tensor:
        """A copy of what the model has there."""
        whole = bits(self.target)
        return whole.clone() if self.indices is None else gather(whole, self.indices)

    def write(self, values: Tensor) -> None:
        """Put values there; all other entries keep their bits."""
        if self.indices is None:
            bits(self.target).copy_(values)
        else:
            scatter(bits(self.target), self.indices, values)


class AttachedDelta:
    """A delta that was found to fit a model, with its positions decoded and on the model's devices.

    Of several deltas that are attached to one model, one is on at a time: `revert` it, then `apply` another. Neither
    checks the base again; `attach` did. The values that the base has at the changed entries are kept while it is on.

    Attributes:
        delta: what is attached.
        applied: whether it is on.
    """

    def __init__(self, model: nn.Module, delta: Delta, changes: list[_Change]) -> None:
        self.delta, self._changes = delta, changes
        self._model = weakref.ref(model)  # the table of what is on would keep the model alive
        self._before: list[Tensor] = []
        self.applied = False

    def apply(self) -> None:
        """Write the values of the delta into the model.

        Raises:
            DeltaError: if a delta is on the model already.
        """
        model = self._living()
        if (other := _APPLIED.get(model)) is not None:
            raise DeltaError(f"{other.delta.label} is on this model already: revert it first")
        self._before = [change.current() for change in self._changes]
        for change in self._changes:
            change.write(change.values)
        self.applied = True
        _APPLIED[model] = self

    def revert(self) -> None:
        """Write back what was there before, to the last bit.

        Raises:
            DeltaError: if the delta is not on the model, or its entries were changed since.
        """
        model = self._living()
        if not self.applied:
            raise DeltaError(f"{self.delta.label} is not on this model: there is nothing to revert")
        _check_current(self._changes, self.delta)
        for change, before in zip(self._changes, self._before, strict=True):
            change.write(before)
        self._before, self.applied = [], False
        del _APPLIED[model]

    def _living(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise DeltaError(f"the model that {self.delta.label} was attached to is gone: attach it to another")
        return model


def attach(model: nn.Module, delta: Delta, *, check: bool = True, progress: Progress[str] = iter) -> AttachedDelta:
    """Find out whether a delta fits a model, and make it ready to be put on and taken off in a moment.

    Args:
        model: the base as it was loaded, in the delta's dtype, on any device, not split over several.
        delta: what is to be applied.
        check: compare the checksums of all tensors with those of the delta's base; False leaves it at names, shapes
            and dtypes.
        progress: shows how far the check is.

    Raises:
        DeltaError: if the model is not the delta's base or in another dtype, has not the tensors that the trained
            checkpoint had, ties what the delta tells apart, or has a delta on it. The model is as it was.
    """
    if (other := _APPLIED.get(model)) is not None:
        raise DeltaError(f"{other.delta.label} is on this model: revert it before another one is attached")
    changes, unchanged = _matched(model, delta)
    if check:
        tensors = {change.name: change.target for change in changes} | unchanged
        for name in progress(list(tensors)):
            check_base(tensors[name], name, delta)
    return AttachedDelta(model, delta, changes)


def apply(model: nn.Module, delta: Delta, *, check: bool = True, progress: Progress[str] = iter) -> AttachedDelta:
    """`attach` a delta to a model and put it on; `revert` of what is returned takes it off.

    Args:
        model: as for `attach`.
        delta: likewise.
        check: likewise.
        progress: likewise.

    Raises:
        DeltaError: as `attach` does.
    """
    attached = attach(model, delta, check=check, progress=progress)
    attached.apply()
    return attached


def revert(model: nn.Module, delta: Delta) -> None:
    """Make the base of a model that has a delta in it for good, such as one that `delta apply` wrote.

    Args:
        model: in the delta's dtype.
        delta: with the base's values (`store_base_values`).

    Raises:
        DeltaError: if it has no base values, has added or reshaped a tensor, its entries are not in the model, or
            `apply` put one on the model, which is the one that takes it off.
    """
    if (other := _APPLIED.get(model)) is not None:
        raise DeltaError(f"{other.delta.label} is on this model: call revert() of what apply returned")
    if not delta.description.base_values:
        raise DeltaError(
            f"{delta.label} has no values of the base: extract it with store_base_values, or load the base itself, "
            f"{delta.description.base_label}"
        )
    if names := delta.description.of_kind("added"):
        raise DeltaError(f"the base of {delta.label} has no {names[0]}: load {delta.description.base_label} itself")
    changes, _ = _matched(model, delta)
    _check_current(changes, delta)
    before = {True: "base_whole", False: "base_values"}
    for change in changes:
        values = delta.tensors[f"{change.name}.{before[change.indices is None]}"]
        change.write(bits(values).to(change.target.device))


def check_base(tensor: Tensor, name: str, delta: Delta) -> None:
    """Whether a tensor of the base, in the delta's dtype, is the one that the delta was made from.

    Raises:
        DeltaError: if it is not.
    """
    expected = delta.description.tensors[name].base_sha256
    if expected is not None and (found := checksum(tensor)) != expected:
        raise DeltaError(
            f"{name} is not that of the base of {delta.label}: its checksum is {found}, that of the base {expected}; "
            f"load {delta.description.base_label}"
        )


def _check_current(changes: list[_Change], delta: Delta) -> None:
    for change in changes:
        if not same_bits(change.current(), change.values.to(change.target.device)):
            raise DeltaError(
                f"{change.name} has not the values of {delta.label} at all of its entries: it was trained, cast or "
                f"loaded since, or never had them; load {delta.description.base_label} anew"
            )


def _matched(model: nn.Module, delta: Delta) -> tuple[list[_Change], dict[str, Tensor]]:
    """What the delta does to each tensor of the model, and which tensors it leaves alone, by name."""
    records = delta.description.tensors
    changes, unchanged, found = [], {}, set()
    for names, target in tensors_of(model):
        known = [name for name in names if name in records and records[name].kind != "removed"]
        found.update(names)
        if not known:
            raise DeltaError(
                f"the model has {names[0]}, the checkpoint that {delta.label} was made from has not: load the model "
                f"with the class that was trained{_architecture(delta)}"
            )
        name = known[0]
        for other in known[1:]:
            if not _same_change(delta, name, other):
                raise DeltaError(
                    f"{name} and {other} are one tensor in this model, and {delta.label} changes them differently: "
                    "load the model with tie_word_embeddings=False"
                )
        _check_fit(target, name, delta)
        if records[name].kind == "same":
            unchanged[name] = target
        else:
            changes.append(_change(target, name, delta))
    missing = [name for name, record in records.items() if record.kind != "removed" and name not in found]
    if missing:
        raise DeltaError(
            f"the model has no {missing[0]}, the checkpoint that {delta.label} was made from has: load the model with "
            f"the class that was trained{_architecture(delta)}"
        )
    return changes, unchanged


def _architecture(delta: Delta) -> str:
    known = (delta.description.model_config or {}).get("architectures")
    return f", {known[0]}" if known else ""


def _same_change(delta: Delta, one: str, other: str) -> bool:
    """Whether two tensors of a delta that have the same base come to be the same."""
    first, second = delta.description.tensors[one], delta.description.tensors[other]
    keys = [key.rpartition(".")[2] for key in delta.tensors if key.rpartition(".")[0] == one]
    return first == second and all(
        same_bits(delta.tensors[f"{one}.{key}"], delta.tensors[f"{other}.{key}"]) for key in keys
    )


def _check_fit(target: Tensor, name: str, delta: Delta) -> None:
    record: Record = delta.description.tensors[name]
    if tuple(target.shape) != record.shape:
        raise DeltaError(
            f"{name} is {tuple(target.shape)} in the model and {record.shape} in {delta.label}: load the model with "
            f"the config that was trained{_architecture(delta)}"
        )
    if record.base_shape is not None:
        raise DeltaError(
            f"{name} has another shape in the base, {record.base_shape}, than in {delta.label}, {record.shape}: make a "
            "model folder of both with delta apply, and load that"
        )
    if dtype_name(target.dtype) != record.dtype:
        raise DeltaError(
            f"{name} is {dtype_name(target.dtype)} in the model and {record.dtype} in {delta.label}: load the model "
            f"with dtype=torch.{record.dtype}"
        )


def _change(target: Tensor, name: str, delta: Delta) -> _Change:
    if delta.description.tensors[name].kind != "sparse":
        return _Change(name, target, None, bits(delta.tensors[f"{name}.whole"]).to(target.device))
    indices, values = delta.entries(name)
    return _Change(name, target, indices.to(target.device), bits(values).to(target.device))
