"""The three ways of training that are compared, LIFT, LoRA and full fine-tuning, and one step of each.

All train the same matrices with AdamW at the same settings, by the same loss; what else the model has is frozen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lift_lightning import RefreshReport, SelectionConfig, SparseAdamW, build_param_groups, refresh_masks
from lift_lightning.losses import causal_lm_loss

ADAMW: dict[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0


@dataclass(frozen=True)
class Method:
    """A model that is set up to be trained.

    Attributes:
        model: what is called, for LoRA with peft's wrapper around it.
        base: the transformers model itself.
        optimizer: over what is trained.
        clip: clips the gradients to CLIP.
    """

    model: nn.Module
    base: PreTrainedModel
    optimizer: Optimizer
    clip: Callable[[], Any]

    @property
    def sparse_optimizer(self) -> SparseAdamW:
        """The optimizer of LIFT."""
        assert isinstance(self.optimizer, SparseAdamW)
        return self.optimizer

    def kept_bytes(self) -> int:
        """What an update needs beside the loaded model: moments, gradients, indices, adapters."""
        if isinstance(self.optimizer, SparseAdamW):
            return self.optimizer.state_bytes()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = sum(state[key].nbytes for state in self.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        adapters = sum(p.nbytes for name, p in self.model.named_parameters() if "lora_" in name)
        return moments + sum(p.nbytes for p in trained) + adapters


def lift(model: PreTrainedModel, rank: int) -> tuple[Method, RefreshReport]:
    """LIFT at r = R = `rank`, and its first refresh."""
    optimizer = SparseAdamW(build_param_groups(model), **ADAMW)
    found = refresh_masks(optimizer, SelectionConfig(rank=rank, lra_rank=rank))
    return Method(model, model, optimizer, lambda: optimizer.clip_grad_norm_(CLIP)), found


def lora(model: PreTrainedModel, rank: int) -> Method:
    """LoRA by peft on every linear layer but the head."""
    # Its import takes seconds, which benchmarks without LoRA save.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft 0.21 asks for a name that transformers has deprecated since.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    return _dense(wrapped, model, [p for p in wrapped.parameters() if p.requires_grad])


def full(model: PreTrainedModel) -> Method:
    """Every entry of the matrices that LIFT chooses from."""
    groups = build_param_groups(model)  # freezes the rest
    return _dense(model, model, [p for group in groups for _, p in group["params"]])


def method(name: str, model: PreTrainedModel, rank: int) -> Method:
    """`lift`, `lora` or `full`."""
    if name == "lift":
        return lift(model, rank)[0]
    return lora(model, rank) if name == "lora" else full(model)


def language_model_loss(method: Method, token_ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, computed by what `LiftLightningModule` computes it by."""
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    loss = causal_lm_loss(method.model(**inputs, use_cache=False).logits, token_ids)
    return loss.total / loss.weight.clamp(min=1)


def body_loss(method: Method, token_ids: Tensor) -> Tensor:
    """A loss that costs nothing, of the last hidden states: no head, no logits."""
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    return method.base.model(**inputs, use_cache=False).last_hidden_state.square().mean()


@dataclass(frozen=True)
class Step:
    """One training step: forward, backward, clipping, update, gradients forgotten."""

    method: Method
    loss: Callable[[Method, Tensor], Tensor] = language_model_loss

    def __call__(self, token_ids: Tensor) -> None:
        self.loss(self.method, token_ids).backward()
        self.method.clip()
        self.method.optimizer.step()
        self.method.optimizer.zero_grad()


def _dense(model: nn.Module, base: PreTrainedModel, trained: list[nn.Parameter]) -> Method:
    optimizer = torch.optim.AdamW(trained, **ADAMW, fused=True)
    return Method(model, base, optimizer, lambda: nn.utils.clip_grad_norm_(trained, CLIP))
