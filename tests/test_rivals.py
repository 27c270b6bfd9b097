"""Adapter methods under the Trainer: fit, resume, test, export, budgets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from ranks import run_ranks
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from lift_lightning import LiftLightningModule
from lift_lightning.adapters import AdapterName, load_adapter, trained_entries
from lift_lightning.callbacks import AdapterExport, DeltaExport, MaskRefreshCallback
from lift_lightning.cli import lightning_cli
from lift_lightning.datamodules import Math10KDataModule
from lift_lightning.errors import ConfigError
from lift_lightning.export import export

ROOT = Path(__file__).parents[1]
NAMES = list(get_args(AdapterName))
IDS = torch.arange(3, 40).unsqueeze(0)


def trainer_of(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **defaults | settings)


def module_of(model: Path, method: str, **settings: Any) -> LiftLightningModule:
    pl.seed_everything(1, verbose=False)
    defaults = {"lr": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0, "adapter_rank": 2}
    return LiftLightningModule(str(model), method=method, **defaults | settings)


def data_of(model: Path, rows: Path, **settings: Any) -> Math10KDataModule:
    cache = str(rows.parent / "cache")
    return Math10KDataModule(
        str(rows), str(model), batch_size=4, val_size=4, max_length=512, cache_dir=cache, **settings
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("method", NAMES)
def test_fit_resume_reload_and_export(method: str, tiny_model_dir: Path, sums_file: Path, tmp_path: Path):
    """One run of each method: what is saved on the way goes on to the same bits, and comes back in every form."""
    data = data_of(tiny_model_dir, sums_file)
    module = module_of(tiny_model_dir, method)
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    written = AdapterExport(str(tmp_path / "adapter"))
    (before,) = trainer_of().validate(module, datamodule=data, verbose=False)
    start = {name: p.clone() for name, p in module.hf_model.named_parameters()}
    trainer_of(MaskRefreshCallback(rank=4), saves, written).fit(module, datamodule=data)
    (after,) = trainer_of().validate(module, datamodule=data, verbose=False)
    assert after["val_loss"] < before["val_loss"]
    trained = set(module.adapter.trained)
    assert all(torch.equal(p, start[name]) == (name not in trained) for name, p in module.hf_model.named_parameters())
    expected = logits(module.hf_model)

    resumed = module_of(tiny_model_dir, method)
    goes_on = ModelCheckpoint(tmp_path / "resumed", "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer_of(goes_on).fit(resumed, datamodule=data, ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert torch.equal(logits(resumed.hf_model), expected)
    last = tmp_path / "step=4.ckpt"
    torch.manual_seed(99)  # what is drawn anew must be overwritten
    loaded = LiftLightningModule.load_from_checkpoint(last, map_location="cpu", weights_only=True)
    assert torch.equal(logits(loaded.hf_model), expected)

    assert written.folder == (tmp_path / "adapter").resolve()
    tolerance = 1e-5 if method == "pissa" else 0
    again = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    if method == "spectral":
        load_adapter(again, written.folder)
    else:
        again = PeftModel.from_pretrained(again, str(written.folder))
    assert (logits(again) - expected).abs().max() <= tolerance
    plain = AutoModelForCausalLM.from_pretrained(export(str(last), str(tmp_path / "model")))
    assert plain.state_dict().keys() == tiny_llama().state_dict().keys()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


def test_the_budget_of_the_selection_is_matched_and_a_checkpoint_keeps_the_rank(
    tiny_model_dir: Path, sums_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data = data_of(tiny_model_dir, sums_file)
    module = module_of(tiny_model_dir, "dora", adapter_rank=None, match_budget=True)
    run = trainer_of(MaskRefreshCallback(rank=4), max_steps=1)
    with caplog.at_level("INFO"):
        run.fit(module, datamodule=data)
    (line,) = [record.message for record in caplog.records if record.message.startswith("budget:")]
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)] * 2
    count = trained_entries("dora", shapes, 3)
    assert line == (
        "budget: LIFT would train 3,712 entries of 14 matrices; "
        f"dora at rank 3 trains {count:,}, {count / 3712:.1%} of it"
    )
    assert module.adapter.entries == count
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = LiftLightningModule.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu", weights_only=True)
    assert loaded.adapter.rank == 3
    with pytest.raises(ConfigError, match="takes the budget of the Trainer's MaskRefreshCallback, and there is none"):
        trainer_of().fit(module_of(tiny_model_dir, "lora", adapter_rank=None, match_budget=True), datamodule=data)


def test_the_model_is_tested_with_its_adapter_on(tiny_model_dir: Path, sums_file: Path, tmp_path: Path):
    options = {"num_beams": 2, "max_new_tokens": 2, "predictions_dir": str(tmp_path), "unknown_tasks": "number"}
    module = module_of(tiny_model_dir, "shira", **options)
    data = data_of(tiny_model_dir, sums_file, test_path={"sums": str(sums_file)}, test_limit=2)
    (found,) = trainer_of().test(module, datamodule=data, verbose=False)
    assert set(found) >= {"test_sums_paper", "test_sums_strict"}


def test_bfloat16_comes_back_to_the_bit(tiny_model_dir: Path, sums_file: Path, tmp_path: Path):
    for method in ("pissa", "spectral"):
        module = module_of(tiny_model_dir, method)
        run = trainer_of(precision="bf16-true", max_steps=2)
        with pytest.warns(UserWarning, match="without float32 masters"):
            run.fit(module, datamodule=data_of(tiny_model_dir, sums_file))
        run.save_checkpoint(tmp_path / "last.ckpt")
        again = module_of(tiny_model_dir, method)
        trainer_of(precision="bf16-true").validate(
            again, data_of(tiny_model_dir, sums_file), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False
        )
        assert torch.equal(logits(again.hf_model), logits(module.hf_model))


# ---------------------------------------------------------------- several devices


def work(rank: int, ranks: int, model: Path, rows: Path, folder: Path) -> list[torch.Tensor]:
    found = []
    for method in ("lora", "shira"):
        module = module_of(model, method)
        torch.manual_seed(rank)  # what the ranks draw differs: that of the first is everybody's
        export = AdapterExport(str(folder / method))
        trainer_of(export, strategy="ddp", devices=ranks, max_steps=2).fit(module, datamodule=data_of(model, rows))
        found.append(logits(module.hf_model))
    return found


@pytest.mark.slow
def test_ddp_trains_one_adapter(tiny_model_dir: Path, sums_file: Path, tmp_path: Path):
    first, second = run_ranks(work, 2, tmp_path / "ranks", tiny_model_dir, sums_file, tmp_path)
    for method, mine, other in zip(("lora", "shira"), first, second, strict=True):
        assert torch.equal(mine, other)
        found = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        load_adapter(found, tmp_path / method)
        assert torch.equal(logits(found), mine)


def select_by_gradients(rank: int, ranks: int, model: Path, rows: Path) -> dict[str, torch.Tensor]:
    module = module_of(model, "lift", adapter_rank=None)
    settings = {"criterion": "gradient", "density": 0.1, "allocation": "global"}
    callback = MaskRefreshCallback(interval=2, schedule="drop_and_grow", **settings)
    run = trainer_of(callback, strategy="ddp", devices=ranks, max_steps=3)
    run.fit(module, datamodule=data_of(model, rows))
    optimizer = run.optimizers[0]
    return {name: optimizer.indices(p).clone() for name, p, _ in optimizer.sparse_parameters()}


@pytest.mark.slow
def test_ranks_that_draw_other_batches_select_the_same_entries(tiny_model_dir: Path, sums_file: Path, tmp_path: Path):
    first, second = run_ranks(select_by_gradients, 2, tmp_path / "ranks", tiny_model_dir, sums_file)
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(mine, second[name]) for name, mine in first.items())


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_split_models_are_refused(name: str, tiny_model_dir: Path):
    from lift_lightning.rivals import refuse_split_adapters
    from lift_lightning.strategies import FSDP1Strategy, FSDP2Strategy

    strategy = {"fsdp1": FSDP1Strategy, "fsdp2": FSDP2Strategy}[name]()
    with pytest.raises(MisconfigurationException, match=r"method='dora' puts .*FSDP.Strategy splits them: set trainer"):
        refuse_split_adapters("dora", strategy)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lift", "adapter_rank": 4}, "adapter_rank=4 is of an adapter, and method='lift' has none"),
        ({"method": "full", "match_budget": True}, "match_budget=True is of an adapter, and method='full' has none"),
        ({"method": "lora", "adapter_rank": 0}, "adapter_rank must be at least 1, got 0"),
        (
            {"method": "lora", "adapter_rank": 4, "match_budget": True},
            "adapter_rank=4 and match_budget both set the rank",
        ),
        (
            {"method": "lora", "save_base_weights": False},
            "save_base_weights=false .*method='lora' adds parameters.*AdapterE",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        LiftLightningModule("somewhere", **arguments)


def test_each_export_names_the_other(tiny_model_dir: Path, sums_file: Path, tmp_path: Path):
    data = data_of(tiny_model_dir, sums_file)
    with pytest.raises(
        MisconfigurationException, match=r"method='lora' changes none: use .*AdapterExport in its place"
    ):
        trainer_of(DeltaExport(str(tmp_path / "out"))).fit(module_of(tiny_model_dir, "lora"), datamodule=data)
    full = module_of(tiny_model_dir, "full", adapter_rank=None)
    with pytest.raises(
        MisconfigurationException, match=r"LiftLightningModule trains none: .*DeltaExport, which writes"
    ):
        trainer_of(AdapterExport(str(tmp_path / "out"))).fit(full, datamodule=data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    run = trainer_of(AdapterExport(str(tmp_path / "out")))
    with pytest.raises(FileExistsError, match="is there and is no adapter"):
        run.fit(module_of(tiny_model_dir, "lora"), datamodule=data)
    assert run.global_step == 0


@pytest.mark.parametrize("name", ["full", *NAMES])
def test_the_settings_of_a_method_make_their_objects(name: str):
    files = [str(ROOT / f"configs/{part}.yaml") for part in ("quickstart", f"methods/{name}")]
    made = lightning_cli([word for file in files for word in ("--config", file)], run=False)
    assert made.model.hparams.method == name
    assert made.model.hparams.match_budget == (name != "full")
    assert f"--config configs/methods/{name}.yaml" in Path(files[1]).read_text()
