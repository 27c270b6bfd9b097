"""The delta that a fit leaves behind is the one between its base and its export."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from deltas import assert_same_bits, delta_of, read
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import run_ranks
from test_weight_files import tiny_mixtral
from tiny import byte_tokenizer, save_tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lift_lightning import LiftLightningModule, SparseAdamW, build_param_groups
from lift_lightning.callbacks import DeltaExport, MaskRefreshCallback
from lift_lightning.datamodules import Math10KDataModule
from lift_lightning.delta import Delta, apply, open_folder, write_model
from lift_lightning.errors import DeltaError
from lift_lightning.export import export


def trainer_of(*callbacks: pl.Callback, **settings) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return pl.Trainer(
        callbacks=[MaskRefreshCallback(interval=2, rank=4, lra_rank=6), *callbacks], **defaults | settings
    )


def fit(model: Path, rows: Path, folder: Path, delta: DeltaExport, **settings) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    module = LiftLightningModule(str(model), lr=1e-2, lr_scheduler_type="constant", warmup_ratio=0)
    data = Math10KDataModule(str(rows), str(model), batch_size=4, val_size=4, cache_dir=str(folder / "cache"))
    trainer = trainer_of(delta, default_root_dir=folder, **settings)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_it_is_the_delta_between_base_and_export(precision: str, tiny_model_dir: Path, sums_file: Path, tmp_path: Path):
    callback = DeltaExport(base_name="user/base", store_base_values=True)
    trainer = fit(tiny_model_dir, sums_file, tmp_path, callback, precision=precision)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    exported = export(str(tmp_path / "last.ckpt"), str(tmp_path / "model"))
    assert callback.folder == tmp_path / "delta"
    delta = Delta.from_pretrained(callback.folder)
    expected = delta_of(tiny_model_dir, exported, store_base_values=True)
    assert delta.description.tensors == expected.description.tensors
    assert_same_bits(delta.tensors, expected.tensors)
    assert {delta.description.tensors[n].kind for n in delta.description.tensors if "proj" in n} == {"sparse"}
    assert delta.description.base == "user/base"
    recipe = delta.description.recipe
    assert recipe["model"]["lr"] == 1e-2
    assert recipe["steps"] == 3
    assert recipe["seed"] == "1"
    assert (recipe["lift"][0]["interval"], recipe["lift"][0]["rank"]) == (2, 4)
    with open_folder(str(tiny_model_dir)) as base:
        written = write_model(base, delta, tmp_path / "again")
    assert_same_bits(read(written), read(exported))
    model = AutoModelForCausalLM.from_pretrained(written)
    original = AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.to_diff_dict() == original.config.to_diff_dict()
    ids = torch.arange(3, 40).unsqueeze(0)
    assert torch.equal(model(ids).logits, original(ids).logits)


def work(rank: int, ranks: int, strategies: list[str], model: Path, rows: Path, folder: Path) -> None:
    for name in strategies:
        fit(model, rows, folder, DeltaExport(str(folder / name)), strategy=name, devices=ranks)


@pytest.mark.slow
def test_several_devices_leave_one_delta(sums_file: Path, tmp_path: Path):
    model = save_tiny_llama(tmp_path / "model")
    strategies = ["ddp", "fsdp2", "fsdp1"]
    run_ranks(work, 2, tmp_path / "ranks", strategies, model, sums_file, tmp_path)
    found = [Delta.from_pretrained(tmp_path / name) for name in strategies]
    for delta in found:
        assert delta.description.recipe["devices"] == 2
        assert delta.description.model_config["architectures"] == ["LlamaForCausalLM"]
        changed = {name: record.changed for name, record in delta.description.tensors.items() if record.changed}
        assert len(changed) == 14  # of two layers with seven matrices each
        base = AutoModelForCausalLM.from_pretrained(model)
        apply(base, delta).revert()


# ---------------------------------------------------------------- other projects, and what is refused before the work


class Own(pl.LightningModule):
    """A module with a model of transformers and a head of its own, which optimizes automatically."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.backbone = AutoModelForCausalLM.from_pretrained(folder).train()

    def training_step(self, batch, batch_idx):
        return self.backbone(batch, labels=batch).loss

    def configure_optimizers(self):
        return SparseAdamW(build_param_groups(self.backbone), lr=1e-2)


def ids() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.randint(3, 60, (16, 8)), batch_size=4)


def test_a_module_of_another_project_names_its_base(tiny_model_dir: Path, tmp_path: Path):
    module = Own(tiny_model_dir)
    trainer = trainer_of(DeltaExport(str(tmp_path / "delta"), base=str(tiny_model_dir)))
    trainer.fit(module, ids())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    apply(model, Delta.from_pretrained(tmp_path / "delta"))
    assert_same_bits(model.state_dict(), module.backbone.state_dict())
    with pytest.raises(MisconfigurationException, match=r"Own does not say which model it began from: DeltaExport"):
        trainer_of(DeltaExport(str(tmp_path / "other"))).fit(Own(tiny_model_dir), ids())


def test_what_cannot_be_written_stops_the_run_before_the_work(tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").touch()
    module = Own(tiny_model_dir)
    trainer = trainer_of(DeltaExport(str(tmp_path), base=str(tiny_model_dir)))
    with pytest.raises(FileExistsError, match="is no delta, so it is not replaced"):
        trainer.fit(module, ids())
    assert trainer.global_step == 0
    module.backbone = nn.Linear(2, 2)
    with pytest.raises(MisconfigurationException, match="Own has no model of transformers"):
        trainer.fit(module, ids())


def test_files_with_other_names_are_refused_before_the_work(sums_file: Path, tmp_path: Path):
    """transformers fuses a Mixtral's experts when it loads them; an old GPT-2 has no prefix."""
    tiny_mixtral().save_pretrained(tmp_path / "mixtral")
    byte_tokenizer().save_pretrained(tmp_path / "mixtral")
    with pytest.raises(DeltaError, match=r"files have no model.layers.0.mlp.* compare those with delta extract"):
        fit(tmp_path / "mixtral", sums_file, tmp_path, DeltaExport())
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    gpt2.transformer.save_pretrained(tmp_path / "gpt2")
    module = Own(tmp_path / "gpt2")
    with pytest.raises(DeltaError, match=r"files have no transformer.wte.weight: they hold the parameters under other"):
        trainer_of(DeltaExport(str(tmp_path / "delta"), base=str(tmp_path / "gpt2"))).fit(module, ids())
