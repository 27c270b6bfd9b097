"""The `delta` commands: a checkpoint as what differs from its base, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from lift_lightning import delta as deltas
from lift_lightning.delta import Delta, open_folder
from lift_lightning.delta.format import check_delta_folder
from lift_lightning.delta.merge import Overlap
from lift_lightning.errors import ConfigError
from lift_lightning.models import check_export_folder


def extract(
    base: str,
    trained: str,
    output: str,
    revision: str | None = None,
    base_name: str | None = None,
    recipe: str | None = None,
    store_base_values: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write what of a trained model differs from its base, to the last bit, as a folder of a few percent of its size.

    Args:
        base: folder or hub id of the model that training began from.
        trained: folder or hub id of what came of it, such as `export` writes.
        output: the folder to write.
        revision: of the base on the hub.
        base_name: what to call the base where it is a folder here and on the hub for others, such as `user/model`.
        recipe: a YAML or JSON file that says how it was trained, such as the `config.yaml` of the run; kept in it.
        store_base_values: keep the base's values too, so that a model folder can be reverted without the base.
        overwrite: replace a delta that is there.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if the recipe cannot be read.
        ModelUnavailableError: if a model cannot be reached.
        DeltaError: if the two cannot be compared.
    """
    check_delta_folder(output, overwrite=overwrite)
    settings = None if recipe is None else read_recipe(recipe)
    with open_folder(base, revision) as before, open_folder(trained, option="trained") as after:
        delta = deltas.extract(
            before,
            after,
            base_name=base_name,
            recipe=settings,
            store_base_values=store_base_values,
            progress=_track("Comparing"),
        )
    Console().print(deltas.inspect(delta))
    return delta.save_pretrained(output, overwrite=overwrite)


def apply(
    delta: str,
    output: str,
    base: str | None = None,
    revision: str | None = None,
    delta_revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the trained model, as a folder that transformers loads, from its base and a delta.

    Args:
        delta: folder or hub id of the delta.
        output: the folder to write.
        base: folder or hub id of the base; where the delta says that it is if null.
        revision: of the base on the hub; the one that the delta says if null.
        delta_revision: of the delta on the hub.
        overwrite: replace a model folder that is there.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ModelUnavailableError: if the base cannot be reached.
        DeltaError: if the delta is broken, or of another base.
    """
    check_export_folder(output, overwrite=overwrite)
    found = Delta.from_pretrained(delta, delta_revision)
    with open_folder(*_base_of(found, base, revision)) as source:
        return deltas.write_model(source, found, output, overwrite=overwrite, progress=_track("Applying"))


def merge(
    inputs: list[str],
    output: str,
    overlap: Overlap = "refuse",
    base: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one delta that changes what any of several does.

    Args:
        inputs: folders or hub ids of deltas of one base.
        output: the folder to write.
        overlap: of entries that several change: `refuse` them, take the value of the `last`, or add the `mean` or the
            `sum` of their differences to the base's value.
        base: folder or hub id of the base, for `mean` and `sum`; where the first delta says that it is if null.
        revision: of the base on the hub.
        overwrite: replace a delta that is there.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if there is one delta only.
        ModelUnavailableError: if the base is needed and cannot be reached.
        DeltaError: if a delta is broken, they are of different bases, or they overlap and may not.
    """
    check_delta_folder(output, overwrite=overwrite)
    if not inputs:
        raise ConfigError("merging takes at least 2 deltas, got 0")
    found = [Delta.from_pretrained(one) for one in inputs]
    show = _track("Merging")
    if overlap in ("mean", "sum") or base is not None:
        with open_folder(*_base_of(found[0], base, revision)) as source:
            merged = deltas.merge(found, overlap, base=source, progress=show)
    else:
        merged = deltas.merge(found, overlap, progress=show)
    Console().print(deltas.inspect(merged))
    return merged.save_pretrained(output, overwrite=overwrite)


def inspect(delta: str, revision: str | None = None) -> None:
    """Show what is in a delta: of which base, how many entries of what, and how large.

    Args:
        delta: folder or hub id of the delta.
        revision: of the delta on the hub.

    Raises:
        DeltaError: if it is broken.
    """
    Console().print(deltas.inspect(Delta.from_pretrained(delta, revision)))


def diff(left: str, right: str, left_revision: str | None = None, right_revision: str | None = None) -> None:
    """Show how any two model folders differ, to the last bit.

    Args:
        left: folder or hub id.
        right: folder or hub id.
        left_revision: on the hub.
        right_revision: on the hub.

    Raises:
        ModelUnavailableError: if a model cannot be reached.
        DeltaError: if the two cannot be compared.
    """
    with (
        open_folder(left, left_revision, option="left") as one,
        open_folder(right, right_revision, option="right") as other,
    ):
        differences = list(deltas.diff(one, other, progress=_track("Comparing")))
    Console().print(deltas.difference_table(differences, left, right))


def push(
    delta: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload delta",
    create_pr: bool = False,
) -> str:
    """Upload a delta to the hub, after its checksums.

    Args:
        delta: its folder.
        repo_id: such as `user/name`; made if it is not there.
        private: whether a new repository is private; null leaves it to the account.
        revision: branch to upload to.
        commit_message: of the upload.
        create_pr: propose it instead of uploading it.

    Returns:
        The address of the commit.

    Raises:
        DeltaError: if the delta is broken.
    """
    found = Delta.from_pretrained(delta)
    return found.push_to_hub(
        repo_id, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr
    )


COMMANDS: dict[str, Callable[..., Path | str | None]] = {
    "extract": extract,
    "apply": apply,
    "merge": merge,
    "inspect": inspect,
    "diff": diff,
    "push": push,
}


def read_recipe(path: str) -> dict[str, Any]:
    """The settings in a YAML or JSON file, as JSON can hold them.

    Raises:
        ConfigError: if there is no such file, or it holds no settings.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--recipe {path!r} cannot be read: {error}; name a YAML or JSON file, or leave it out"
        ) from (error)
    if not isinstance(content, dict):
        raise ConfigError(f"--recipe {path!r} holds a {type(content).__name__}; a mapping of settings is wanted")
    return dict(json.loads(json.dumps(content, default=str)))


def _base_of(delta: Delta, base: str | None, revision: str | None) -> tuple[str, str | None]:
    """Name and revision: of the base that was named, or of the one that the delta says."""
    if base is not None:
        return base, revision
    return delta.description.base, revision or delta.description.revision


def _track(what: str) -> Callable[[Iterable[str]], Iterable[str]]:
    return lambda names: track(names, what, console=Console(stderr=True))
