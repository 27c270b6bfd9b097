"""The only loader of models and tokenizers, and the way back to a folder that transformers loads.

Everything that can be wrong with a model name ends in one `ModelUnavailableError`, which names the value and the
argument that replaces it.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lift_lightning.weight_files import WeightFiles

ModelTask = Literal["causal_lm", "sequence_classification"]

_AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
# What reading a broken weight file raises: safetensors, and torch.load on a truncated or foreign .bin file.
_BROKEN_WEIGHTS = (OSError, EOFError, pickle.UnpicklingError, SafetensorError)
# Models that come with the package: the name they are asked for by, and their folder in it.
BUNDLED = {"lift-lightning/quickstart": "quickstart/model"}

# Names with these beginnings, or more than one slash, cannot be hub ids.
_PATH_LIKE = re.compile(r"^(/|\.|~|[A-Za-z]:[\\/])|\\|/.*/|/$")

_log = logging.getLogger(__name__)


class ModelUnavailableError(OSError):
    """A model or tokenizer cannot be loaded: not reachable, not there, or broken."""


class LoadedModel(NamedTuple):
    """A model and what of it is not pretrained.

    Attributes:
        model: in training mode, every parameter requiring a gradient.
        new_parameters: names, in the model's order, of parameters that the checkpoint does not hold: a fresh
            classifier head or pooler. Tied weights are not new.
    """

    model: PreTrainedModel
    new_parameters: list[str]


def load_model(
    model_name_or_path: str | os.PathLike[str],
    *,
    task: ModelTask = "causal_lm",
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load a pretrained model from a local folder, the hub, or the hub's local cache when the hub is out of reach.

    Args:
        model_name_or_path: a folder written by `save_pretrained`, or a hub id.
        task: `causal_lm`, or `sequence_classification`, which puts a classifier head on the model.
        num_labels: outputs of the classifier head, 1 for regression; None leaves the checkpoint's value.
        dtype: of the weights; None takes `torch.get_default_dtype()`, whatever the checkpoint was saved in.
        revision: branch, tag or commit on the hub.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, ...; None leaves the choice to transformers.

    Returns:
        The model, ready to train, and the names of its parameters that are new. A head in the checkpoint whose shape
        does not fit `num_labels` is replaced by a new one.

    Raises:
        ValueError: if `task` is unknown, or `num_labels` is given for `causal_lm` or below 1.
        ModelUnavailableError: if there is no such model, it cannot be reached, its files are broken, it cannot do the
            task, or its checkpoint lacks more than a head.
    """
    if task not in _AUTO_CLASSES:
        raise ValueError(f"task must be one of {', '.join(get_args(ModelTask))}, got {task!r}")
    if num_labels is not None and (task == "causal_lm" or num_labels < 1):
        raise ValueError(f"num_labels must be at least 1 and is for sequence_classification only, got {num_labels}")
    name = os.fspath(model_name_or_path)
    location, where, config = _find_model(
        name, task, revision, {} if num_labels is None else {"num_labels": num_labels}
    )
    try:
        model, info = _AUTO_CLASSES[task].from_pretrained(
            location,
            config=config,
            dtype=torch.get_default_dtype() if dtype is None else dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told apart below: a head may be of another size, nothing else
            **where,
        )
    except _BROKEN_WEIGHTS as error:
        raise _unavailable("model", name, f"its weights cannot be read: {_first_line(error)}") from error
    new = _new_parameters(model, name, task, info)
    if task == "sequence_classification" and config.pad_token_id is None:
        model.config.pad_token_id = _find_pad_token_id(name, revision, config)
    model.train()  # from_pretrained leaves evaluation mode on, in which dropout would be silently off
    return LoadedModel(model, new)


def load_empty_model(
    model_name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, WeightFiles]:
    """A language model as `load_model` gives it, whose parameters are on the meta device, and the files of its weights.

    Buffers are there: those that are in no checkpoint, such as rotary frequencies, are computed when a model is made.

    Args:
        model_name_or_path: a folder written by `save_pretrained`, or a hub id.
        dtype: of the weights; None takes `torch.get_default_dtype()`.
        revision: branch, tag or commit on the hub.
        attn_implementation: as in `load_model`.

    Raises:
        ModelUnavailableError: if there is no such model, or it cannot be reached.
        WeightLayoutError: if the weights are not in safetensors, one by one under the names of the model's parameters:
            only `load_model` can load it.
    """
    name = os.fspath(model_name_or_path)
    location, _, config = _find_model(name, "causal_lm", revision, {})
    folder = _downloaded(location, revision)
    files = WeightFiles(folder)
    # Written into the config by from_config; None leaves the choice to transformers, as in from_pretrained.
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.get_default_dtype() if dtype is None else dtype, **attention
        )
    files.match(model)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.train()
    return model, files


def load_config(name_or_path: str | os.PathLike[str]) -> PretrainedConfig:
    """The configuration of a causal language model, without its weights.

    Args:
        name_or_path: a folder with a config.json, or a hub id.

    Raises:
        ModelUnavailableError: if there is none, it cannot be reached, or it is of another kind of model.
    """
    config: PretrainedConfig = _find_model(os.fspath(name_or_path), "causal_lm", None, {})[2]
    return config


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the model compute its activations again in the backward pass instead of keeping them."""
    # Earlier versions of transformers 5 have it under the older name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def model_folder(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder that holds a model's safetensors, config and tokenizer, fetched from the hub where it is a hub id.

    Args:
        name_or_path: a folder, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelUnavailableError: if there is no such model, or it cannot be reached.
    """
    location, _ = _locate("model", os.fspath(name_or_path), revision, needs="config.json")
    return _downloaded(location, revision)


def _downloaded(location: str, revision: str | None) -> Path:
    folder = Path(location)
    if folder.is_dir():
        return folder
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]  # weights, configs, tokenizers
    return Path(snapshot_download(location, revision=revision, allow_patterns=patterns))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have their buffers, but parameters without memory.

    A device context would take the buffers to the meta device as well.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is already is tied to another
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_tokenizer(name_or_path: str | os.PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, the hub, or the hub's local cache when the hub is out of reach.

    Args:
        name_or_path: a folder, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelUnavailableError: if there is no such tokenizer, it cannot be reached, or its files are broken.
    """
    name = os.fspath(name_or_path)
    location, local_only = _locate("tokenizer", name, revision, needs="tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(
            location, revision=revision or "main", local_files_only=local_only, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception on a file it cannot parse
        reason = f"its tokenizer files are missing or broken: {_first_line(error)}"
        raise _unavailable("tokenizer", name, reason) from error


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a folder that transformers loads: config, safetensors, tokenizer, generation config.

    The weights keep the model's dtype, so that a reload in that dtype gives the same logits to the last bit. The
    files are written beside the target and moved there in one rename: a folder under its final name is complete.

    Args:
        model: what to write.
        tokenizer: written into the same folder.
        folder: the target; its parents are made.
        overwrite: replace a model folder that is there.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: as `check_export_folder` does.
    """
    target = check_export_folder(folder, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        with _valid_generation_config(model):
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        move_into_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_export_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The absolute path of a folder that a model may be written to; touches nothing.

    Args:
        folder: the target; it need not exist.
        overwrite: a model folder may be there.

    Raises:
        FileExistsError: if the target is a file, or a folder that is not empty and `overwrite` is off, or one that
            is no model folder (has no config.json), which is never replaced.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; a folder to write the model into is wanted")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise FileExistsError(f"{target} is not empty; choose another folder, or set overwrite to true")
    if not (target / "config.json").is_file():
        raise FileExistsError(f"{target} is not empty and is no model folder, so it is not replaced")
    return target


@contextmanager
def keep_buffer_dtypes(module: nn.Module) -> Iterator[None]:
    """Let `module.to(dtype)` change parameters but not floating-point buffers that are not part of the checkpoint.

    Such buffers are constants, like the rotary frequencies, which transformers keeps in float32 whatever the dtype
    of the weights. Rounded to bfloat16 they give other logits than the exported folder does. Moves between devices
    go through.

    Args:
        module: the module whose `to`, `bfloat16`, ... is called inside the context.
    """
    kept = [
        (owner, name, buffer)
        for owner in module.modules()
        for name in owner._non_persistent_buffers_set
        if (buffer := owner._buffers.get(name)) is not None and buffer.is_floating_point()
    ]
    yield
    for owner, name, before in kept:
        after = owner._buffers[name]
        if after is not None and after.dtype != before.dtype and not before.is_meta:
            # The value from before the cast, not the cast one widened again: rounding has no way back.
            owner._buffers[name] = before.to(after.device)


def _locate(kind: str, name: str, revision: str | None, *, needs: str) -> tuple[str, bool]:
    """What to hand to `from_pretrained`, and whether it must stay off the network."""
    path = Path(name).expanduser()
    if name in BUNDLED and not path.exists():  # a user's own folder of that name wins
        path = Path(__file__).parent / BUNDLED[name]
    if name and path.is_dir():
        if kind == "model" and not (path / needs).is_file():
            raise _unavailable(kind, name, f"the folder has no {needs}")
        return str(path), True
    if path.is_file():
        raise _unavailable(kind, name, "this is a file; the folder that holds it is wanted")
    if not name or _PATH_LIKE.search(name):
        raise _unavailable(kind, name, "there is no such folder")
    # transformers retries an unreachable hub for three quarters of a minute, several times over. One request without
    # retries tells whether it is worth calling, and why not.
    try:
        get_hf_file_metadata(hf_hub_url(name, needs, revision=revision))
        return name, False
    except EntryNotFoundError as error:
        if kind == "tokenizer":  # older repositories hold no tokenizer_config.json
            return name, False
        raise _unavailable(kind, name, f"its repository on the hub has no {needs}") from error
    except HFValidationError as error:
        raise _unavailable(kind, name, "it is neither a folder nor a valid hub id") from error
    except Exception as error:  # whichever HTTP library huggingface_hub uses has its own exceptions
        if isinstance(cached := try_to_load_from_cache(name, needs, revision=revision), str):
            _log.warning("%r: %s; using the local cache", name, _hub_reason(error, revision))
            # The folder, not the id: with local_files_only transformers still asks the hub for an adapter.
            return str(Path(cached).parent), True
        reason = f"there is no such folder, and as a hub id: {_hub_reason(error, revision)}"
        raise _unavailable(kind, name, reason, gated=isinstance(error, GatedRepoError)) from error


def _find_model(
    name: str, task: ModelTask, revision: str | None, changes: dict[str, Any]
) -> tuple[str, dict[str, Any], Any]:
    """What to hand to `from_pretrained`, how, and the config with some values changed."""
    location, local_only = _locate("model", name, revision, needs="config.json")
    where = {"revision": revision or "main", "local_files_only": local_only, "trust_remote_code": False}
    config = _load_config(name, location, where, changes)
    if type(config) not in _AUTO_CLASSES[task]._model_mapping:
        raise _unavailable("model", name, f"transformers has no {task} class for model type {config.model_type!r}")
    return location, where, config


def _hub_reason(error: Exception, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated, and this account or token has no access to it"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub knows no such repository, or it is private"
    if isinstance(error, OfflineModeIsEnabled):
        return "it is not in the local cache, and HF_HUB_OFFLINE forbids asking the hub"
    return f"the hub cannot be reached ({type(error).__name__}: {_first_line(error)})"


def _unavailable(kind: str, name: str, reason: str, *, gated: bool = False) -> ModelUnavailableError:
    login = " Request access on its page and log in with `hf auth login`, or" if gated else ""
    use = "use" if gated else "Use"
    return ModelUnavailableError(
        f"Cannot load the {kind} {name!r}: {reason}.{login} {use} a local copy: "
        "--model.model_name_or_path /path/to/folder"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _load_config(name: str, location: str, where: dict[str, Any], changes: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(location, **where, **changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unavailable("model", name, f"its config.json cannot be used: {_first_line(error)}") from error


def _new_parameters(model: PreTrainedModel, name: str, task: ModelTask, info: dict[str, Any]) -> list[str]:
    """Parameters that are not pretrained; only a classifier head and a pooler may be among them."""
    # One name per tied parameter, so that a name means a tensor of its own.
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    new = [key for key, _ in model.named_parameters() if key in absent]
    body = f"{model.base_model_prefix}."
    wrong = [key for key in new if task == "causal_lm" or (key.startswith(body) and "pooler" not in key)]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        reason = f"its weights lack {len(wrong)} parameters of the model or have them in another shape ({shown})"
        raise _unavailable("model", name, reason)
    return new


def _find_pad_token_id(name: str, revision: str | None, config: Any) -> int | None:
    """The id that batches are padded with: decoder classifiers read the last token that is not padding."""
    eos = getattr(config, "eos_token_id", None)
    known = eos if isinstance(eos, list) else [eos]
    try:
        tokenizer = load_tokenizer(name, revision)
    except ModelUnavailableError:
        return known[0]
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    # Of a folder without a tokenizer transformers may make an empty one, whose EOS is no token of the model.
    return tokenizer.eos_token_id if tokenizer.eos_token_id in known else known[0]


def move_into_place(partial: Path, target: Path) -> None:
    """Give a folder that is complete its name; what has the name is replaced, and kept if that fails."""
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


@contextmanager
def _valid_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Checkpoints exist whose temperature is set while sampling is off; transformers refuses to write that."""
    original = getattr(model, "generation_config", None)
    if original is None:
        yield
        return
    try:
        original.validate(strict=True)
    except ValueError as error:
        _log.warning("the generation config is written with do_sample=True: %s", _first_line(error))
        model.generation_config = GenerationConfig.from_dict({**original.to_dict(), "do_sample": True})
    try:
        yield
    finally:
        model.generation_config = original
