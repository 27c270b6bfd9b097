"""The methods that peft makes: put on a model in place, written in peft's format, merged."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lift_lightning.adapters.methods import AdapterName
from lift_lightning.errors import ConfigError

NAME = "default"  # peft's, of a model's only adapter
# Where peft's wrapper, which files are made from, keeps the model.
PREFIX = "base_model.model."


def require_peft(method: AdapterName) -> None:
    """peft is an optional dependency.

    Raises:
        ConfigError: if it is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError(f"method={method!r} needs peft: install the package's extra, lift-lightning[baselines]")


@contextmanager
def quiet() -> Iterator[None]:
    """Around peft 0.21, which asks for a name that transformers has deprecated since."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        yield


def put_on_by_peft(model: nn.Module, method: AdapterName, names: list[str], rank: int, alpha: float | None) -> None:
    """Replace the named layers by peft's, in place, so that the model stays the class that it is.

    What is drawn, LoRA's A and SHiRA's mask, follows torch's random numbers.

    Args:
        model: of transformers, or any other.
        method: one of peft's.
        names: of the layers.
        rank: r.
        alpha: None for SHiRA, which has none.
    """
    from peft import inject_adapter_in_model

    _settle_sparse_checks()
    transposed = all(isinstance(model.get_submodule(name), Conv1D) for name in names)
    with quiet():
        inject_adapter_in_model(_config(method, names, rank, alpha, transposed), model, NAME)
    adapted = [name for name, _ in tuner_layers(model)]
    if adapted != names:
        wrong = sorted(set(adapted) ^ set(names))
        raise ConfigError(
            f"peft put the adapter on {len(adapted)} layers, {len(names)} were meant; the first that differs is "
            f"{wrong[0]}: name other target_modules"
        )
    for _, layer in tuner_layers(model):
        if method == "shira":
            _keep_mask(layer)
        elif method == "pissa":
            # What was taken out of the base: an adapter for the base itself is written with it.
            layer.register_buffer("pissa_a", layer.lora_A[NAME].weight.detach().clone())
            layer.register_buffer("pissa_b", layer.lora_B[NAME].weight.detach().clone())


def _config(method: AdapterName, names: list[str], rank: int, alpha: float | None, transposed: bool) -> Any:
    from peft import LoraConfig, ShiraConfig
    from peft.tuners.shira.mask_functions import random_mask

    if method == "shira":
        config: Any = ShiraConfig(r=rank, target_modules=names)

        def drawn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
            # A mask of its own for each matrix; peft's own seed would be one for all, whatever the run's.
            mask: Tensor = random_mask(base_layer, r, random_seed=int(torch.randint(2**31, ())))
            return mask

        config.mask_fn = drawn
        return config
    assert alpha is not None, "Adapter fills it in"
    return LoraConfig(
        r=rank,
        # An integer where it is one, as in every adapter_config.json.
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=transposed,
        use_rslora=method == "rslora",
        use_dora=method == "dora",
        init_lora_weights="pissa" if method == "pissa" else True,
    )


def _settle_sparse_checks() -> None:
    """Say what is torch's default anyway: SHiRA makes a sparse tensor in every forward, and torch warns if it is not.

    The mask's indices are of the matrix by how they are drawn.
    """
    if not torch.sparse.check_sparse_tensor_invariants.is_enabled():
        torch.sparse.check_sparse_tensor_invariants.disable()


def _keep_mask(layer: Any) -> None:
    """Make SHiRA's mask a part of the state dict. peft keeps it aside and would draw another one on a reload."""
    from peft.tuners._buffer_dict import BufferDict

    indices = dict(layer.shira_indices)
    del layer.shira_indices
    layer.shira_indices = BufferDict(indices, persistent=True)


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and layers that peft has put into a model, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def write_by_peft(model: nn.Module, method: AdapterName, folder: Path, dense: dict[str, Tensor], base: str) -> None:
    """Write what `peft.PeftModel.from_pretrained(base, folder)` reads.

    PiSSA takes its principal part out of the base, which a reader's base has: it is written as the LoRA of rank 2r that
    is the difference, B A - B0 A0, as peft converts it.

    Args:
        model: with the adapter on.
        method: of the adapter.
        folder: is there.
        dense: tensors of whole modules that were trained beside it, by their names in the model.
        base: what the file calls its base.
    """
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(_config_of(model))
    with quiet():
        state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    if method == "pissa":
        for name, layer in tuner_layers(model):
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            state[a] = torch.cat([state[a], layer.pissa_a.to(state[a].dtype)])
            state[b] = torch.cat([state[b], -layer.pissa_b.to(state[b].dtype)], dim=1)
        config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, 2 * config.lora_alpha
    tensors = {f"{PREFIX}{name}": value.detach().cpu().contiguous().clone() for name, value in (state | dense).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set, which would be written in another order each time
    config.base_model_name_or_path = base
    modules = sorted({name.rpartition(".")[0] for name in dense})
    config.modules_to_save = modules or None
    kind = type(model)
    if kind.__name__.endswith("ForCausalLM"):
        config.task_type = "CAUSAL_LM"
        config.save_pretrained(str(folder))
    else:
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config.save_pretrained(str(folder), auto_mapping_dict=mapping)


def _config_of(model: nn.Module) -> Any:
    configs: Any = model.peft_config
    return configs[NAME]


def load_by_peft(model: nn.Module, folder: Path) -> None:
    """Put a written adapter on a base, in place."""
    from peft import PeftModel

    _settle_sparse_checks()
    with quiet():
        PeftModel.from_pretrained(model, str(folder))


@torch.no_grad()
def merge_by_peft(model: nn.Module) -> None:
    """Fold peft's layers and trained copies of modules into plain ones, in place."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, layer in tuner_layers(model):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[NAME])
    if hasattr(model, "peft_config"):
        del model.peft_config


def method_in(config: dict[str, Any]) -> str:
    """The method that an `adapter_config.json` is of; PiSSA's is read back as the LoRA that it was written as."""
    kind = str(config.get("peft_type"))
    if kind == "SHIRA":
        return "shira"
    if kind != "LORA":
        return re.sub(r"[^a-z]", "", kind.lower())
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
