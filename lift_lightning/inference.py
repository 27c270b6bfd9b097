"""A model that is only asked: loaded to where it runs, in a dtype that suits the place."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.errors import ConfigError
from lift_lightning.models import load_model, load_tokenizer


def load_for_inference(
    model_name_or_path: str, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        model_name_or_path: a folder, such as `export` writes, or a hub id.
        device: such as `cuda:0`; None for an accelerator if there is one, else the CPU.
        dtype: of the weights, such as `bfloat16`; `auto` is bfloat16 on an accelerator and float32 on the CPU.

    Raises:
        ConfigError: if there is no such dtype.
        ModelUnavailableError: if the model or its tokenizer cannot be loaded.
    """
    place = torch.device(device) if device else torch.accelerator.current_accelerator() or torch.device("cpu")
    automatic = torch.float32 if place.type == "cpu" else torch.bfloat16
    wanted = automatic if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    model, _ = load_model(model_name_or_path, dtype=wanted)
    torch.nn.Module.to(model, place)
    return model.eval(), load_tokenizer(model_name_or_path)
