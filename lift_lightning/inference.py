"""A model that is only asked: loaded to where it runs, in a dtype that suits the place."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.errors import ConfigError
from lift_lightning.models import load_model, load_tokenizer


def pick_device(name: str | None = None, *, float64: bool = False) -> torch.device:
    """Where to work: the place that is named, else an accelerator if there is one, else the CPU.

    Args:
        name: such as `cpu` or `cuda:0`.
        float64: whether the work needs it; without a name, an accelerator that has none (Apple's `mps`) is passed over.

    Raises:
        ConfigError: if this machine has no such device.
    """
    if name is None:
        found = torch.accelerator.current_accelerator() or torch.device("cpu")
        return torch.device("cpu") if float64 and found.type == "mps" else found
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts that it has it
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be one of this machine, such as cpu or cuda:0, got {name!r}: {reason}"
        ) from error


def load_for_inference(
    model_name_or_path: str, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        model_name_or_path: a folder, such as `export` writes, or a hub id.
        device: such as `cuda:0`; None for an accelerator if there is one, else the CPU.
        dtype: of the weights, such as `bfloat16`; `auto` is bfloat16 on an accelerator and float32 on the CPU.

    Raises:
        ConfigError: if there is no such dtype or device.
        ModelUnavailableError: if the model or its tokenizer cannot be loaded.
    """
    place = pick_device(device)
    automatic = torch.float32 if place.type == "cpu" else torch.bfloat16
    wanted = automatic if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    model, _ = load_model(model_name_or_path, dtype=wanted)
    torch.nn.Module.to(model, place)
    return model.eval(), load_tokenizer(model_name_or_path)
