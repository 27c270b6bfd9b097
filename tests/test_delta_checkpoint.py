"""Checkpoints without the base's weights: the same resume to the last bit, in a smaller file."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from deltas import assert_same_bits, read
from tiny import save_tiny_llama, tiny_llama

from lift_lightning import LiftLightningModule
from lift_lightning.callbacks import MaskRefreshCallback, StepCheckpoint
from lift_lightning.datamodules import Math10KDataModule
from lift_lightning.delta.checkpoint import with_base, without_base
from lift_lightning.delta.sources import DictSource
from lift_lightning.errors import CheckpointError, ConfigError, DeltaError
from lift_lightning.export import export
from lift_lightning.strategies import FSDP2Strategy


def fit(model: Path, rows: Path, folder: Path, *, resume: Path | None = None, whole: bool = False, **settings) -> dict:
    """Six steps with two refreshes, a checkpoint after the third; everything that the run has come to."""
    pl.seed_everything(1, verbose=False)
    module = LiftLightningModule(str(model), lr=1e-2, lr_scheduler_type="constant", save_base_weights=whole)
    data = Math10KDataModule(str(rows), str(model), batch_size=4, val_size=4, cache_dir=str(folder / "cache"))
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 6,
            "callbacks": [
                MaskRefreshCallback(interval=2, rank=4, lra_rank=6),
                StepCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_last=True),
            ],
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            **settings,
        }
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return {name: tensor.clone() for name, tensor in module.hf_model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resume_is_equal_to_the_run_without_a_break(
    precision: str, dropout_model_dir: Path, sums_file: Path, tmp_path: Path
):
    inputs = (dropout_model_dir, sums_file)
    whole = fit(*inputs, tmp_path / "whole", whole=True, precision=precision)
    thin = fit(*inputs, tmp_path / "thin", precision=precision)
    assert_same_bits(whole, thin)
    resumed = fit(*inputs, tmp_path / "resumed", resume=tmp_path / "thin/step=3.ckpt", precision=precision)
    assert_same_bits(whole, resumed)
    # The two kinds of checkpoint resume each other's runs.
    assert_same_bits(
        whole, fit(*inputs, tmp_path / "other", resume=tmp_path / "whole/step=3.ckpt", precision=precision)
    )
    small = torch.load(tmp_path / "thin/step=3.ckpt", weights_only=True)
    assert not [name for name in small["state_dict"] if name.startswith("model.")]
    kinds = {record["kind"] for record in small["lift_lightning_delta"]["description"]["tensors"].values()}
    assert kinds == {"same", "sparse"}  # the tied head is no tensor of its own
    large_file, small_file = ((tmp_path / kind / "step=3.ckpt").stat().st_size for kind in ("whole", "thin"))
    assert small_file < large_file - 0.5 * sum(tensor.nbytes for tensor in read(dropout_model_dir).values()) * (
        0.5 if precision == "bf16-true" else 1
    )


def test_it_is_exported_like_a_whole_one(dropout_model_dir: Path, sums_file: Path, tmp_path: Path):
    weights = fit(dropout_model_dir, sums_file, tmp_path / "thin", precision="bf16-true")
    exported = read(export(str(tmp_path / "thin/last.ckpt"), str(tmp_path / "model")))
    assert_same_bits(exported, {name: tensor for name, tensor in weights.items() if name in exported})
    assert len(exported) == len(weights) - 1  # the head is tied


def test_another_base_is_refused(sums_file: Path, tmp_path: Path):
    model = save_tiny_llama(tmp_path / "model")
    fit(model, sums_file, tmp_path / "thin")
    tiny_llama(seed=4).save_pretrained(model)
    with pytest.raises(DeltaError, match="is not that of the base of the checkpoint: its checksum is"):
        fit(model, sums_file, tmp_path / "resumed", resume=tmp_path / "thin/step=3.ckpt")


def test_models_that_are_split_are_refused(dropout_model_dir: Path, sums_file: Path, tmp_path: Path):
    from lift_lightning.strategies import refuse_split_models

    with pytest.raises(ConfigError, match="under FSDP2Strategy no process has those: leave it on"):
        refuse_split_models(FSDP2Strategy())
    fit(dropout_model_dir, sums_file, tmp_path / "thin")
    strategy = FSDP2Strategy()
    strategy.broadcast = lambda path, src=0: path
    with pytest.raises(CheckpointError, match="was saved with save_base_weights off"):
        strategy.load_checkpoint(tmp_path / "thin/step=3.ckpt", weights_only=True)


def test_tied_names_have_one_tensor():
    tied = torch.randn(4, 4)
    base = DictSource({"embed": tied.clone(), "w": torch.zeros(30)}, "base")
    weights = {"head": tied + 1, "w": torch.zeros(30)}
    weights["embed"] = weights["head"].detach()  # as a state dict has it: one memory, two tensors
    content = without_base(weights, base)
    assert content["names"] == {"head": "embed", "embed": "embed", "w": "w"}
    assert list(content["tensors"]) == ["embed.whole"]
    back = with_base(content, base, "the checkpoint")
    assert_same_bits(back, weights)
