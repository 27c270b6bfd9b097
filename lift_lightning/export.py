"""The `export` command: a Lightning checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch

from lift_lightning.adapters import merge_adapter
from lift_lightning.errors import CheckpointError
from lift_lightning.models import ModelUnavailableError, check_export_folder, export_model, load_tokenizer
from lift_lightning.module import LiftLightningModule
from lift_lightning.strategies import WEIGHTS_KEY


def export(
    ckpt_path: str,
    output: str,
    tokenizer: str | None = None,
    model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of `fit` as a Hugging Face folder: config, safetensors, tokenizer, generation config.

    The weights keep the dtype that they have in the checkpoint. An adapter is merged into them.

    Args:
        ckpt_path: a file that the Trainer saved.
        output: the folder to write.
        tokenizer: hub id or folder; the model's own if null.
        model_name_or_path: where the model is now, if it is not where training found it.
        overwrite: replace a model folder that is there.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if it is a folder, or no checkpoint of `LiftLightningModule`.
        FileExistsError: if the folder may not be written, see `check_export_folder`.
        ModelUnavailableError: if the model's config or the tokenizer cannot be loaded.
    """
    check_export_folder(output, overwrite=overwrite)
    dtype = _weights_dtype(ckpt_path)
    changes = {} if model_name_or_path is None else {"model_name_or_path": model_name_or_path}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the module makes its model in the default dtype
    try:
        module = LiftLightningModule.load_from_checkpoint(
            ckpt_path,
            map_location="cpu",
            weights_only=True,
            # Only training needs it, and it turns the cache off in the config that is about to be written.
            gradient_checkpointing=False,
            **changes,
        )
        tokens = load_tokenizer(tokenizer or module.model_name_or_path, None if tokenizer else module.hparams.revision)
    except ModelUnavailableError as error:
        # The same argument has another name here than under fit.
        raise ModelUnavailableError(str(error).replace("--model.", "--")) from error
    finally:
        torch.set_default_dtype(default)
    assert module.model is not None, "load_from_checkpoint calls configure_model"
    if module.adapter is not None:
        merge_adapter(module.model)
    return export_model(module.model, tokens, output, overwrite=overwrite)


def _weights_dtype(ckpt_path: str) -> torch.dtype:
    path = Path(ckpt_path)
    if path.is_dir():
        raise CheckpointError(
            f"{ckpt_path!r} is a folder that several devices wrote in parts: make one file of it first, "
            f"python main.py consolidate --ckpt_path {ckpt_path} --output {ckpt_path}.whole"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {ckpt_path!r}")
    try:
        # Memory-mapped: the weights are looked at, not read.
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        dtypes = [weight.dtype for name, weight in checkpoint["state_dict"].items() if name.startswith("model.")]
        if WEIGHTS_KEY in checkpoint:
            records = checkpoint[WEIGHTS_KEY]["description"]["tensors"].values()
            dtypes += [getattr(torch, record["dtype"]) for record in records if record["kind"] != "removed"]
    except Exception as error:  # torch.load and a foreign file's contents fail in many ways
        raise CheckpointError(f"{ckpt_path!r} is no checkpoint of a training run: {type(error).__name__}") from error
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    if not floating:
        raise CheckpointError(f"{ckpt_path!r} holds no weights of a model")
    return max(set(floating), key=floating.count)
