"""`last.ckpt` is the last step's: exported from Lightning's own it was up to an interval short of the end."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lift_lightning import LiftLightningModule
from lift_lightning.callbacks import MaskRefreshCallback, StepCheckpoint
from lift_lightning.datamodules import Math10KDataModule


@pytest.fixture
def fit(dropout_model_dir, sums_file, tmp_path):
    """Fit on 20 rows in batches of 4, 5 steps an epoch; the weights and the folder of the checkpoints."""

    def fitted(folder: str, ckpt_path: Path | None = None, saving: dict | None = None, **settings):
        pl.seed_everything(1, verbose=False)
        module = LiftLightningModule(str(dropout_model_dir), lr=1e-2, lr_scheduler_type="constant")
        data = Math10KDataModule(
            str(sums_file), str(dropout_model_dir), batch_size=4, val_size=4, cache_dir=str(tmp_path / "cache")
        )
        checkpoints = StepCheckpoint(
            tmp_path / folder, **{"every_n_train_steps": 2, "save_last": True, **(saving or {})}
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[MaskRefreshCallback(interval=4, rank=4, lra_rank=6), checkpoints],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **settings,
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return {name: value.clone() for name, value in module.hf_model.state_dict().items()}, tmp_path / folder

    return fitted


@pytest.mark.parametrize(
    ("settings", "saving", "files"),
    [
        ({"max_steps": 3}, {}, ["epoch=0-step=3.ckpt", "last.ckpt"]),
        ({"max_epochs": 1}, {}, ["epoch=0-step=5.ckpt", "last.ckpt"]),
        ({"max_epochs": 1}, {"save_last": "link"}, ["epoch=0-step=5.ckpt", "last.ckpt"]),
        ({"max_epochs": 1}, {"save_top_k": 0}, ["last.ckpt"]),
        ({"max_epochs": 1}, {"monitor": "val_loss"}, ["last.ckpt"]),  # there is none before the first validation
        ({"max_epochs": 1}, {"save_last": None}, ["epoch=0-step=5.ckpt"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_the_last_checkpoint_is_of_the_last_step(fit, settings, saving, files):
    weights, folder = fit("run", saving=saving, **settings)
    assert sorted(path.name for path in folder.glob("*")) == files
    for name in files:
        saved = torch.load(folder / name, weights_only=True)
        assert saved["global_step"] == settings.get("max_steps", 5)
        assert all(torch.equal(saved["state_dict"][f"model.{name}"], value) for name, value in weights.items())


@pytest.mark.parametrize("stop_after", [3, 5, 7])  # mid-epoch, at an epoch's end, in the second epoch
def test_a_finished_run_goes_on_with_the_next_row(fit, stop_after):
    """A checkpoint made when the training had ended counted its epoch as over: the rows left in it were lost."""
    whole, _ = fit("whole", max_epochs=2)
    _, folder = fit("cut", max_steps=stop_after)
    again, _ = fit("again", ckpt_path=folder / "last.ckpt", max_epochs=2)
    assert all(torch.equal(whole[name], value) for name, value in again.items())
