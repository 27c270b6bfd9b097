"""Put adapters on a model, save them, load them, and merge them into its weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, cast, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lift_lightning.adapters.spectral import merge_spectral, put_spectral, spectral_layers
from lift_lightning.errors import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

AdapterMethod = Literal["lora", "rslora", "dora", "pissa", "shira", "spectral"]
ADAPTERS: tuple[AdapterMethod, ...] = get_args(AdapterMethod)

_SPECTRAL_CONFIG, _SPECTRAL_WEIGHTS = "spectral_config.json", "spectral_model.safetensors"


@dataclass
class Adapters:
    """What was put on a model.

    Attributes:
        method: which kind.
        model: the transformers model, with the adapters inside.
        rank: of the adapters.
        trained: regular expression that the names of the trained parameters match.
    """

    method: AdapterMethod
    model: PreTrainedModel
    rank: int
    trained: str
    _peft: PeftModel | None = None  # around the model, for its methods; None for spectral
    _initial: dict[str, Tensor] | None = None  # of PiSSA, which is saved as the difference from it

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write safetensors and JSON, without the base's weights.

        What peft made loads with `peft.PeftModel.from_pretrained(base, folder)`; PiSSA is written as the LoRA of twice
        the rank that it comes to, since it has changed the base's weights. Spectral ones load with `load_spectral`.
        """
        folder = Path(folder)
        if self._peft is not None:
            self._save_by_peft(folder)
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        layers = spectral_layers(self.model)
        keys = ("left", "values", "right", "spectral_u", "spectral_v")
        tensors = {f"{name}.{key}": getattr(layer, key).detach() for name, layer in layers.items() for key in keys}
        save_file(tensors, folder / _SPECTRAL_WEIGHTS)
        written = {"method": self.method, "rank": self.rank, "layers": list(layers)}
        (folder / _SPECTRAL_CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        return folder

    def _save_by_peft(self, folder: Path) -> None:
        assert self._peft is not None
        if self._initial is None:
            self._peft.save_pretrained(str(folder))
            return
        with TemporaryDirectory() as beginning, warnings.catch_warnings():
            # That another adapter beside PiSSA's begins from other weights: this one is there to be subtracted.
            warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
            # peft reads there what to subtract, and asks in its settings whether it was plain LoRA.
            config = cast("LoraConfig", copy.copy(self._peft.peft_config["default"]))
            config.init_lora_weights = True
            config.save_pretrained(beginning)
            save_file(self._initial, Path(beginning) / "adapter_model.safetensors")
            self._peft.save_pretrained(str(folder), path_initial_model_for_weight_conversion=beginning)

    def merge(self) -> PreTrainedModel:
        """The model with plain layers again, the adapters added to their weights; not to be trained any further."""
        if self._peft is None:
            merge_spectral(self.model)
            return self.model
        return cast(PreTrainedModel, self._peft.merge_and_unload())


def put_adapters(
    model: PreTrainedModel,
    method: AdapterMethod,
    targets: Sequence[str],
    rank: int,
    *,
    alpha: float | None = None,
    seed: int = 0,
) -> Adapters:
    """Put an adapter on every target, in place; outputs stay what they are, but for rounding.

    Args:
        model: whose layers are adapted.
        method: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948) and SHiRA
            (2406.13175) as peft has them, without dropout; or the Spectral Adapter (2405.13952).
        targets: names of linear layers.
        rank: r. Of a matrix of M x N, SHiRA trains r * (M + N) entries at random places.
        alpha: LoRA's scale, alpha / r of the product (alpha / sqrt(r) for rsLoRA); 2 * r if not given, r for PiSSA,
            whose start depends on a scale of one.
        seed: of SHiRA's places.

    Raises:
        ConfigError: if a target cannot have this adapter.
    """
    if method == "spectral":
        put_spectral(model, targets, rank)
        return Adapters(method, model, rank, r"\.spectral_[uv]$")
    from peft import get_peft_model, get_peft_model_state_dict

    if method == "shira":
        # Of torch, about the sparse tensors that peft makes of SHiRA's entries.
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
    wrapped = cast("PeftModel", get_peft_model(model, _config(method, list(targets), rank, alpha, seed)))
    initial = None
    if method == "pissa":
        initial = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    trained = "shira_weight" if method == "shira" else "lora_"
    return Adapters(method, cast(PreTrainedModel, wrapped.get_base_model()), rank, trained, wrapped, initial)


def _config(method: AdapterMethod, targets: list[str], rank: int, alpha: float | None, seed: int) -> PeftConfig:
    from peft import LoraConfig, ShiraConfig

    if method == "shira":
        return ShiraConfig(r=rank, target_modules=targets, random_seed=seed)
    scale = alpha if alpha is not None else rank if method == "pissa" else 2 * rank
    return LoraConfig(
        r=rank,
        lora_alpha=scale,  # type: ignore[arg-type]  # peft's annotation says int, its code takes any number
        lora_dropout=0.0,
        target_modules=targets,
        use_rslora=method == "rslora",
        use_dora=method == "dora",
        init_lora_weights="pissa" if method == "pissa" else True,
    )


def load_spectral(model: PreTrainedModel, folder: str | Path) -> Adapters:
    """Put adapters that `Adapters.save_pretrained` wrote on a fresh base model, in place.

    Raises:
        CheckpointError: if the folder holds none, or they are of other layers.
    """
    folder = Path(folder)
    try:
        written = json.loads((folder / _SPECTRAL_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / _SPECTRAL_WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{str(folder)!r} holds no spectral adapter: {error}") from error
    adapters = put_adapters(model, "spectral", written["layers"], written["rank"])
    outcome = model.load_state_dict(tensors, strict=False)
    if outcome.unexpected_keys:
        raise CheckpointError(f"{str(folder)!r} has adapters of other layers, such as {outcome.unexpected_keys[0]!r}")
    return adapters
