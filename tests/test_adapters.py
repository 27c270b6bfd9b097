"""Adapters under the same fit: what is trained, budgets, checkpoints, files, merging, refusals."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from tiny import save_tiny_llama, tiny_llama
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lift_lightning import LiftLightningModule
from lift_lightning.adapters import ADAPTERS, largest_rank, put_adapters, trained_entries
from lift_lightning.adapters.methods import load_spectral
from lift_lightning.adapters.spectral import SpectralLinear
from lift_lightning.callbacks import AdapterExport, DeltaExport, MaskRefreshCallback
from lift_lightning.errors import CheckpointError, ConfigError
from lift_lightning.export import export

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SHAPES = [(32, 32), (32, 48)]
IDS = torch.arange(4, 20).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


def rows() -> DataLoader:
    ids = torch.randint(4, 200, (8, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    return DataLoader(batches, batch_size=4)


def fit(base: Path, method: str, folder: Path, *callbacks: pl.Callback, **settings) -> LiftLightningModule:
    module = LiftLightningModule(str(base), method=method, lr=1e-2, **{"adapter_rank": 4, **settings})
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=5,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    trainer.fit(module, rows(), rows())
    trainer.save_checkpoint(folder / "end.ckpt")
    return module


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_fit_trains_the_adapters_alone_and_its_results_load(base: Path, method: str, tmp_path: Path):
    writer = AdapterExport(str(tmp_path / "adapter"))
    module = fit(base, method, tmp_path, writer)
    untouched = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    trained = 0
    for name, parameter in module.hf_model.named_parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        elif method != "pissa" or "base_layer" not in name:  # which it takes its part out of
            assert torch.equal(parameter, untouched[name.replace(".base_layer", "")]), name
    shapes = [tuple(p.shape) for name, p in untouched.items() if "proj" in name]
    assert trained == trained_entries(method, shapes, 4)
    found = logits(module.hf_model)
    assert not torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(base)))

    again = LiftLightningModule.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(logits(again.hf_model), found)

    fresh = AutoModelForCausalLM.from_pretrained(base)
    assert writer.folder is not None
    if method == "spectral":
        assert torch.equal(logits(load_spectral(fresh, writer.folder).model), found)
    else:  # PiSSA comes back as another product with the same value
        reloaded = logits(PeftModel.from_pretrained(fresh, str(writer.folder)))
        torch.testing.assert_close(reloaded, found, rtol=0, atol=1e-4 if method == "pissa" else 0)

    merged = AutoModelForCausalLM.from_pretrained(export(str(tmp_path / "end.ckpt"), str(tmp_path / "merged")))
    assert {name for name, _ in merged.named_parameters()} == set(untouched)
    torch.testing.assert_close(logits(merged), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_start_is_the_base(method: str):
    expected = logits(tiny_llama())
    adapters = put_adapters(tiny_llama(), method, TARGETS, 4)
    found = logits(adapters.model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if method in ("pissa", "dora") else 0)


def test_spectral_against_the_dense_formula():
    torch.manual_seed(0)
    layer = SpectralLinear(nn.Linear(7, 5), 3)
    with torch.no_grad():
        layer.spectral_u.normal_()
        layer.spectral_v.normal_()
    weight = layer.base_layer.weight.detach().double()
    left, values, right = (t.detach().double() for t in (layer.left, layer.values, layer.right))
    rest = weight - (left * values) @ right.T
    assert int(torch.linalg.matrix_rank(rest, tol=1e-5)) == 2
    dense = (left + layer.spectral_u) @ torch.diag(values) @ (right + layer.spectral_v).T + rest
    inputs = torch.randn(4, 7)
    expected = inputs.double() @ dense.T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.delta().double(), (dense - weight).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ADAPTERS)
def test_budgets_are_spent_as_far_as_the_rank_goes(method: str):
    for budget in (300, 500, 3000):
        rank = largest_rank(method, SHAPES, budget)
        assert trained_entries(method, SHAPES, rank) <= budget < trained_entries(method, SHAPES, rank + 1)
    with pytest.raises(ConfigError, match=f"method={method} trains .* entries at rank 1 already, the budget is 100"):
        largest_rank(method, SHAPES, 100)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_match_budget_follows_the_section_lift(base: Path, method: str, tmp_path: Path, caplog):
    module = fit(base, method, tmp_path, MaskRefreshCallback(rank=6), match_budget=True)
    assert module.hparams.adapter_rank == (6 if method == "lora" else 5)
    again = LiftLightningModule.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert again.hparams.adapter_rank == module.hparams.adapter_rank
    with pytest.raises(MisconfigurationException, match=r"match_budget takes the budget from a MaskRefreshCallback"):
        fit(base, method, tmp_path, match_budget=True)


def test_each_export_names_the_other(base: Path, tmp_path: Path):
    with pytest.raises(MisconfigurationException, match="this module trains adapters: use AdapterExport"):
        fit(base, "lora", tmp_path, DeltaExport())
    with pytest.raises(MisconfigurationException, match="this module has none: use DeltaExport"):
        fit(base, "full", tmp_path, AdapterExport())
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty"):
        fit(base, "lora", tmp_path, AdapterExport(str(tmp_path / "there")))


def test_spectral_refusals(base: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="adapter_rank=33 is more than the shorter side"):
        put_adapters(tiny_llama(), "spectral", TARGETS, 33)
    with pytest.raises(ConfigError, match="'model.embed_tokens' is Embedding: use lora"):
        put_adapters(tiny_llama(), "spectral", ["model.embed_tokens"], 2)
    with pytest.raises(CheckpointError, match="holds no spectral adapter"):
        load_spectral(tiny_llama(), tmp_path)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_split_models_are_refused(base: Path, strategy: str):
    module = LiftLightningModule(str(base), method="lora")
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, strategy=strategy)
    with pytest.raises(MisconfigurationException, match=r"method=lora puts adapters .* set trainer.strategy to ddp"):
        module.__class__.setup(attached(module, trainer), "fit")


def attached(module: LiftLightningModule, trainer: pl.Trainer) -> LiftLightningModule:
    module.trainer = trainer
    return module
