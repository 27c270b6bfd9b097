"""LiftLightningModule: what automatic optimization gives must work here too, and the loss is one of the whole step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign import Regression, loader
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import save_tiny_llama, write_sums
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lift_lightning import LiftLightningModule
from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.datamodules import Math10KDataModule
from lift_lightning.datamodules.rows import DataError
from lift_lightning.export import export
from lift_lightning.losses import causal_lm_loss

SELECTION = {"rank": 4, "lra_rank": 6}


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def data(path: Path, model: Path, **settings: Any) -> Math10KDataModule:
    defaults = {"batch_size": 4, "val_size": 4, "max_length": 512, "cache_dir": str(path.parent / "cache")}
    return Math10KDataModule(str(path), tokenizer=str(model), **{**defaults, **settings})


def refresh(interval: int | None = 3, **settings: Any) -> MaskRefreshCallback:
    return MaskRefreshCallback(interval=interval, **{**SELECTION, **settings})


def state(module: LiftLightningModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.hf_model.state_dict().items()}


def test_only_selected_entries_change_and_the_loss_falls(tiny_model_dir, sums_file):
    module = LiftLightningModule(str(tiny_model_dir), lr=2e-2)
    run, datamodule = trainer(refresh(None), max_epochs=4), data(sums_file, tiny_model_dir)
    module.configure_model()
    start = state(module)
    (before,) = trainer().validate(module, datamodule=datamodule, verbose=False)
    run.fit(module, datamodule=datamodule)
    (after,) = trainer().validate(module, datamodule=datamodule, verbose=False)
    assert after["val_loss"] < before["val_loss"] - 0.1
    assert after["val_perplexity"] == pytest.approx(torch.tensor(after["val_loss"]).exp().item(), rel=1e-4)
    optimizer = run.optimizers[0]
    selected = {name: optimizer.indices(p).long() for name, p, _ in optimizer.sparse_parameters()}
    assert len(selected) == 14  # seven projections of two layers
    for name, value in state(module).items():
        changed = (value != start[name]).flatten().nonzero().squeeze(1)
        permitted = selected.get(name, torch.empty(0, dtype=torch.long))
        assert torch.isin(changed, permitted).all(), name
        assert name not in selected or changed.numel() > 0.9 * permitted.numel()


def test_the_split_into_micro_batches_changes_nothing_but_rounding(tiny_model_dir, sums_file):
    """20 training rows: 5 steps of 4 rows, as 1 x 4 or as 4 x 1, though the rows have different numbers of tokens."""

    def weights(batch_size: int, **settings: Any) -> torch.Tensor:
        module = LiftLightningModule(
            str(tiny_model_dir), lr=1e-2, accumulate_grad_batches=4 // batch_size, gradient_clip_val=0.5, **settings
        )
        run = trainer(refresh(2), precision="64-true")
        run.fit(module, datamodule=data(sums_file, tiny_model_dir, batch_size=batch_size))
        assert run.global_step == 5
        return torch.cat([p.detach().flatten() for p in module.hf_model.parameters()])

    whole = weights(4)
    torch.testing.assert_close(weights(1), whole, rtol=0, atol=1e-10)
    assert (weights(1, loss_reduction="micro_batch_mean") - whole).abs().max() > 1e-5


def test_the_gradient_is_that_of_the_mean_over_all_label_tokens_of_the_step(tiny_model_dir, sums_file):
    seen: list[torch.Tensor] = []

    class Spy(MaskRefreshCallback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.extend(grad.clone() for grad in optimizer.gradients())

    module = LiftLightningModule(str(tiny_model_dir), accumulate_grad_batches=3)
    datamodule = data(sums_file, tiny_model_dir, batch_size=2)
    run = trainer(Spy(None, **SELECTION), limit_train_batches=3)
    module.configure_model()
    reference = copy.deepcopy(module.hf_model).requires_grad_(True)
    run.fit(module, datamodule=datamodule)
    again = data(sums_file, tiny_model_dir, batch_size=2)
    again.setup("fit")
    batches = [batch for batch, _ in zip(again.train_dataloader(), range(3), strict=False)]
    losses = [
        causal_lm_loss(reference(b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"])
        for b in batches
    ]
    (sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)).backward()
    expected = dict(reference.named_parameters())
    pairs = list(run.optimizers[0].sparse_parameters())
    assert len(seen) == len(pairs)
    for grad, (name, parameter, _) in zip(seen, pairs, strict=True):
        indices = run.optimizers[0].indices(parameter).long()
        torch.testing.assert_close(grad, expected[name].grad.flatten()[indices], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("accumulate", "epochs", "steps", "selections"),
    [
        # 20 training rows in batches of 4: 5 micro-batches an epoch.
        (1, 2, 10, [1, 3, 6, 9]),
        (2, 2, 6, [1, 3, 6]),  # ceil(5 / 2) = 3 steps an epoch
        (8, 3, 3, [1, 3]),  # one step an epoch, at its end
    ],
)
def test_steps_schedule_checkpoints_and_logs_count_optimizer_steps(
    tiny_model_dir, sums_file, tmp_path, accumulate, epochs, steps, selections
):
    module = LiftLightningModule(
        str(tiny_model_dir), lr=1e-2, accumulate_grad_batches=accumulate, warmup_ratio=0.0, lr_scheduler_type="linear"
    )
    callback = refresh(3)
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    logger = CSVLogger(tmp_path, name="logs")
    run = trainer(callback, checkpoints, LearningRateMonitor(), logger=logger, max_epochs=epochs, log_every_n_steps=1)
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    assert run.global_step == steps
    assert [step for step, _ in callback.history] == selections
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == sorted(f"step={s}.ckpt" for s in range(2, steps + 1, 2))
    rows = [line.split(",") for line in (tmp_path / "logs/version_0/metrics.csv").read_text().splitlines()]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    losses = [row for row in table if row["train_loss"]]
    assert [row["step"] for row in losses] == [str(step) for step in range(steps)]
    assert {"grad_norm", "peak_memory_gib", "train_loss"} <= {k for k, v in losses[0].items() if v}
    assert all(float(row["tokens_per_second"]) > 0 for row in losses[1:])
    # The linear schedule falls from lr to 0 over all steps: it was given their number.
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr() == [pytest.approx(0.0)]
    rates = [float(row["lr-SparseAdamW"]) for row in table if row["lr-SparseAdamW"]]
    assert rates[0] == pytest.approx(1e-2)


def test_max_steps_ends_the_run_and_sets_the_length_of_the_schedule(tiny_model_dir, sums_file):
    module = LiftLightningModule(str(tiny_model_dir), lr=1e-2, accumulate_grad_batches=2, warmup_ratio=0.5)
    run = trainer(refresh(), max_steps=4, max_epochs=-1)
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    assert run.global_step == 4
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0]


def test_a_run_without_a_known_length_is_refused(tiny_model_dir):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield {}

    with pytest.raises(MisconfigurationException, match=r"set trainer.max_steps or trainer.max_epochs"):
        trainer(refresh(), max_epochs=-1).fit(LiftLightningModule(str(tiny_model_dir)), DataLoader(Endless()), [])


def test_early_stopping_on_the_validation_loss(tiny_model_dir, sums_file):
    module = LiftLightningModule(str(tiny_model_dir), lr=0.0)
    run = trainer(refresh(), EarlyStopping("val_loss", patience=1), max_epochs=9)
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    assert run.current_epoch == 2  # no improvement in the second epoch, nothing moves at lr 0


def test_the_validation_loss_is_exact_in_bfloat16(tiny_model_dir, tmp_path):
    """Lightning casts what the module holds: a sum of label tokens in bfloat16 stops growing at a few hundred."""
    rows = write_sums(tmp_path / "rows.json", rows=330)
    module = LiftLightningModule(str(tiny_model_dir))
    datamodule = data(rows, tiny_model_dir, val_size=320, eval_batch_size=1)
    (found,) = trainer(precision="bf16-true").validate(module, datamodule=datamodule, verbose=False)
    losses = [
        causal_lm_loss(module(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
        for batch in datamodule.val_dataloader()
    ]
    exact = float(sum(loss.total.detach() for loss in losses)) / int(sum(loss.weight for loss in losses))
    assert found["val_loss"] == pytest.approx(exact, rel=1e-4)


class Breaks(Exception):
    pass


class BreakOff(pl.Callback):
    """Ends the fit after the second micro-batch, in the middle of an accumulation, and keeps its checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.checkpoint)
            raise Breaks


@pytest.mark.parametrize("earlier", ["nothing", "broken off", "validated a checkpoint"])
def test_nothing_of_an_earlier_run_reaches_into_a_fit(dropout_model_dir, sums_file, tmp_path, earlier):
    """Sums of a step that was under way, gradients and random states, from a fit or from a checkpoint."""

    def make() -> LiftLightningModule:
        return LiftLightningModule(str(dropout_model_dir), lr=1e-2, accumulate_grad_batches=3)

    def fit(module: LiftLightningModule, run: pl.Trainer) -> None:
        pl.seed_everything(7, verbose=False)
        run.fit(module, datamodule=data(sums_file, dropout_model_dir))

    module, run = make(), trainer(refresh())
    if earlier != "nothing":
        other, callback = make(), BreakOff(tmp_path / "middle.ckpt")
        broken = trainer(refresh(), callback)
        with pytest.raises(Breaks):
            fit(other, broken)
        if earlier == "broken off":
            module = other
            module.configure_model()
            module.hf_model.load_state_dict(AutoModelForCausalLM.from_pretrained(dropout_model_dir).state_dict())
        else:
            validating = trainer()
            validating.validate(module, datamodule=data(sums_file, dropout_model_dir), ckpt_path=callback.checkpoint)
            module.hf_model.load_state_dict(AutoModelForCausalLM.from_pretrained(dropout_model_dir).state_dict())
    fit(module, run)
    clean, reference = make(), trainer(refresh())
    fit(clean, reference)
    assert all(torch.equal(state(clean)[name], value) for name, value in state(module).items())


def test_a_trainer_can_fit_again_after_a_fit_that_broke_off(tiny_model_dir, sums_file, tmp_path):
    module = LiftLightningModule(str(tiny_model_dir), accumulate_grad_batches=3)
    callback = BreakOff(tmp_path / "middle.ckpt")
    run = trainer(refresh(), callback)
    with pytest.raises(Breaks):
        run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    assert run.accumulate_grad_batches == 1
    run.callbacks.remove(callback)
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    assert run.global_step == 2  # ceil(5 / 3)


def test_after_a_fit_an_ordinary_optimizer_gets_its_gradients(tiny_model_dir, sums_file):
    module = LiftLightningModule(str(tiny_model_dir))
    run = trainer(refresh())
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    module.hf_model.requires_grad_(True)
    module.hf_model(torch.arange(3, 23).view(1, 20)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in module.hf_model.parameters())


def test_a_checkpoint_saved_after_the_fit_has_the_selection(tiny_model_dir, sums_file, tmp_path):
    module = LiftLightningModule(str(tiny_model_dir))
    run = trainer(refresh())
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["lift_lightning"]["optimizer"]["parameters"]
    assert len(saved) == 14
    assert not any("grad" in tensors for tensors in saved.values())


def test_on_resume_what_is_typed_wins(tiny_model_dir, sums_file, tmp_path):
    """Rates, betas, decay and the length of the schedule; the selection at its next refresh, which is said."""

    def run(epochs: int, ckpt_path: Path | None = None, selection: dict | None = None, **settings: Any) -> pl.Trainer:
        module = LiftLightningModule(str(tiny_model_dir), warmup_ratio=0.0, **settings)
        fitting = trainer(refresh(100, **(selection or {})), max_epochs=epochs)
        fitting.fit(module, datamodule=data(sums_file, tiny_model_dir), ckpt_path=ckpt_path)
        return fitting

    run(1, lr=1e-2).save_checkpoint(tmp_path / "one.ckpt")
    seen: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = LiftLightningModule(
        str(tiny_model_dir), warmup_ratio=0.0, lr=0.1, betas=(0.5, 0.6), weight_decay=0.3, eps=1e-5
    )
    fitting = trainer(refresh(100, rank=2), Rates(), max_epochs=2)
    with pytest.warns(UserWarning, match="takes effect at the next refresh"):
        fitting.fit(module, datamodule=data(sums_file, tiny_model_dir), ckpt_path=tmp_path / "one.ckpt")
    # 5 steps an epoch, 10 in all: the linear schedule of the typed rate and length, from step 5 on.
    assert seen == [pytest.approx(0.1 * (10 - step) / 10) for step in range(5, 10)]
    group = fitting.optimizers[0].param_groups[0]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.6), 0.3, 1e-5)


def test_settings_of_a_subclass_stay_in_a_fresh_fit_and_on_resume(tiny_model_dir, sums_file, tmp_path):
    class Own(LiftLightningModule):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            found["optimizer"].param_groups[0]["weight_decay"] = 0.5
            return found

    def fit(epochs: int, ckpt_path: Path | None = None) -> pl.Trainer:
        run = trainer(refresh(), max_epochs=epochs)
        run.fit(Own(str(tiny_model_dir)), datamodule=data(sums_file, tiny_model_dir), ckpt_path=ckpt_path)
        return run

    run = fit(1)
    assert run.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert fit(2, tmp_path / "one.ckpt").optimizers[0].param_groups[0]["weight_decay"] == 0.5


def test_a_resume_that_does_not_train_leaves_nothing_for_the_next_fit(tiny_model_dir, sums_file, tmp_path):
    """Of a finished run, and of one that is refused because the batches are others."""
    make = {"datamodule": data(sums_file, tiny_model_dir)}
    first = trainer(refresh(), max_steps=3)
    first.fit(LiftLightningModule(str(tiny_model_dir)), **make)
    first.save_checkpoint(tmp_path / "three.ckpt")

    module, callback = LiftLightningModule(str(tiny_model_dir)), refresh()
    over = trainer(callback, max_steps=3)
    over.fit(module, ckpt_path=tmp_path / "three.ckpt", **make)
    over.save_checkpoint(tmp_path / "again.ckpt")  # still has its selection
    assert (
        len(torch.load(tmp_path / "again.ckpt", weights_only=True)["lift_lightning"]["optimizer"]["parameters"]) == 14
    )

    other = data(sums_file, tiny_model_dir, batch_size=2)
    with pytest.raises(DataError, match="cannot resume after batch 3"):
        trainer(callback).fit(module, datamodule=other, ckpt_path=tmp_path / "three.ckpt")
    fresh = trainer(callback, max_steps=2)
    fresh.fit(module, datamodule=other)
    assert fresh.optimizers[0].attempted_steps == 2
    assert [step for step, _ in callback.history] == [1]


def test_a_checkpoint_of_an_exception_inside_a_micro_batch_has_no_half_gradient(tiny_model_dir, sums_file, tmp_path):
    class Fails(LiftLightningModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:  # the first two projections have their gradient, the others do not
                self._inside = True
                layer = self.hf_model.model.layers[0].self_attn
                (layer.q_proj.weight.sum() + layer.k_proj.weight.sum()).backward()
                raise Breaks
            super().training_step(batch, batch_idx)

    saving = ModelCheckpoint(tmp_path, save_on_exception=True, filename="{step}")
    run = trainer(refresh(), saving)
    with pytest.warns(UserWarning, match="inside a micro-batch"), pytest.raises(Breaks):
        run.fit(Fails(str(tiny_model_dir)), datamodule=data(sums_file, tiny_model_dir))
    (file,) = tmp_path.glob("*.ckpt")
    saved = torch.load(file, weights_only=True)["lift_lightning"]["optimizer"]
    assert saved["attempted_steps"] == 2
    assert not any("grad" in tensors for tensors in saved["parameters"].values())


def test_fewer_micro_batches_to_a_step_on_resume(tiny_model_dir, sums_file, tmp_path):
    """Two of three are done when the checkpoint is taken; with one to a step the next makes one, and so on."""
    callback = BreakOff(tmp_path / "middle.ckpt")
    with pytest.raises(Breaks):
        trainer(refresh(), callback).fit(
            LiftLightningModule(str(tiny_model_dir), accumulate_grad_batches=3),
            datamodule=data(sums_file, tiny_model_dir),
        )
    run = trainer(refresh())
    module = LiftLightningModule(str(tiny_model_dir), accumulate_grad_batches=1)
    run.fit(module, datamodule=data(sums_file, tiny_model_dir), ckpt_path=tmp_path / "middle.ckpt")
    assert run.global_step == 3  # micro-batches 3, 4 and 5


def test_a_trainer_forgets_the_accumulation_of_another_module(tiny_model_dir, sums_file):
    run = trainer(refresh(), max_epochs=1)
    run.fit(
        LiftLightningModule(str(tiny_model_dir), accumulate_grad_batches=3), datamodule=data(sums_file, tiny_model_dir)
    )
    other = Regression()
    run.fit_loop.max_epochs = 2
    run.fit(other, loader())
    assert run.optimizers[0].attempted_steps == 6


@pytest.mark.parametrize("with_callback", [True, False])
def test_full_fine_tuning_reports_steps_that_are_not_finite(tiny_model_dir, sums_file, with_callback):
    module = LiftLightningModule(str(tiny_model_dir), method="full")
    module.configure_model()
    with torch.no_grad():
        module.hf_model.model.norm.weight.fill_(float("nan"))
    run = trainer(*([refresh()] if with_callback else []), log_every_n_steps=1)
    with pytest.warns(UserWarning, match="steps were skipped because their gradients were not finite"):
        run.fit(module, datamodule=data(sums_file, tiny_model_dir))


def test_dense_training_in_bfloat16_is_warned_of(tiny_model_dir, sums_file):
    run = trainer(precision="bf16-true", limit_train_batches=1)
    with pytest.warns(UserWarning, match=r"23,808 densely trained entries .*use trainer.precision=bf16-mixed"):
        run.fit(LiftLightningModule(str(tiny_model_dir), method="full"), datamodule=data(sums_file, tiny_model_dir))


def test_without_a_callback_the_module_names_the_remedy(tiny_model_dir, sums_file):
    with pytest.raises(MisconfigurationException, match="needs a MaskRefreshCallback"):
        trainer().fit(LiftLightningModule(str(tiny_model_dir)), datamodule=data(sums_file, tiny_model_dir))


@pytest.mark.parametrize("method", ["lift", "full"])
def test_16_mixed_is_refused_with_the_remedy(tiny_model_dir, sums_file, method):
    """Also in full fine-tuning without a callback: division by label tokens and clipping would be of scaled sums."""
    run = trainer(*([refresh()] if method == "lift" else []), plugins=[MixedPrecision("16-mixed", "cpu")])
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        run.fit(LiftLightningModule(str(tiny_model_dir), method=method), datamodule=data(sums_file, tiny_model_dir))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(tiny_model_dir, sums_file, precision):
    module = LiftLightningModule(str(tiny_model_dir), lr=2e-2)
    run = trainer(refresh(), precision=precision, max_epochs=2)
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    narrow = precision == "bf16-true"
    assert {p.dtype for p in module.hf_model.parameters()} == {torch.bfloat16 if narrow else torch.float32}
    # Rotary frequencies stay in float32: in bfloat16 they would be another model than the one that is exported.
    assert {b.dtype for b in module.hf_model.buffers()} == {torch.float32}
    states = [run.optimizers[0]._sparse[p] for _, p, _ in run.optimizers[0].sparse_parameters()]
    assert all((s.master is not None) == narrow for s in states)
    assert {t.dtype for s in states for t in (s.exp_avg, s.exp_avg_sq)} == {torch.float32}
    assert all(s.grad is None for s in states)  # forgotten with the step
    assert run.callback_metrics["val_loss"] < 5.45  # ln 259 = 5.56 at the start


def test_gradient_checkpointing_changes_no_bit(tiny_model_dir, sums_file):
    results = []
    for checkpointing in (False, True):
        module = LiftLightningModule(str(tiny_model_dir), lr=1e-2, gradient_checkpointing=checkpointing)
        trainer(refresh()).fit(module, datamodule=data(sums_file, tiny_model_dir))
        assert module.hf_model.model.layers[0].gradient_checkpointing == checkpointing
        results.append(state(module))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_full_fine_tuning_through_the_same_module(tiny_model_dir, sums_file, caplog):
    module = LiftLightningModule(str(tiny_model_dir), method="full", lr=1e-2)
    callback = refresh()
    module.configure_model()
    start = state(module)
    with caplog.at_level("INFO"):
        trainer(callback).fit(module, datamodule=data(sums_file, tiny_model_dir))
    assert callback.history == []
    assert "nothing to select" in caplog.text
    assert all(not torch.equal(value, start[name]) for name, value in state(module).items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("stop_after", [3, 5, 7])  # mid-epoch, at an epoch's end (5 steps), in the second epoch
def test_resume_is_bit_equal_with_dropout_and_shuffling(dropout_model_dir, sums_file, tmp_path, precision, stop_after):
    def run(ckpt_path: Path | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
        pl.seed_everything(1, verbose=False)
        module = LiftLightningModule(str(dropout_model_dir), lr=1e-2, gradient_clip_val=1.0)
        losses = LossRecorder()
        checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=stop_after, save_top_k=-1, filename="{step}")
        fitting = trainer(refresh(4), checkpoints, losses, max_epochs=2, precision=precision)
        fitting.fit(module, datamodule=data(sums_file, dropout_model_dir), ckpt_path=ckpt_path)
        assert fitting.global_step == 10
        return state(module), losses.losses

    weights, losses = run()
    again, later = run(tmp_path / f"step={stop_after}.ckpt")
    assert later == losses[stop_after:]
    assert all(torch.equal(weights[name], value) for name, value in again.items())


class LossRecorder(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def test_resume_from_the_middle_of_an_accumulation(dropout_model_dir, sums_file, tmp_path):
    """A checkpoint may be asked for between the micro-batches of one step; what was gathered so far goes into it."""

    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1 and trainer.current_epoch == 0:  # after micro-batches 1 and 2 of 3
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(*callbacks: pl.Callback, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(1, verbose=False)
        module = LiftLightningModule(str(dropout_model_dir), lr=1e-2, accumulate_grad_batches=3)
        trainer(refresh(1), *callbacks).fit(module, datamodule=data(sums_file, dropout_model_dir), ckpt_path=ckpt_path)
        return state(module)

    weights = run(SaveAt())
    again = run(ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(weights[name], value) for name, value in again.items())


@pytest.mark.parametrize("num_labels", [3, 1])
def test_sequence_classification_trains_a_new_head_densely(tmp_path, num_labels):
    folder = save_tiny_llama(tmp_path / "model", tie_word_embeddings=False)
    module = LiftLightningModule(
        str(folder), task="sequence_classification", num_labels=num_labels, target_modules="attention", lr=1e-2
    )
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(3, 259, (6,), generator=generator),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.tensor(i % num_labels if num_labels > 1 else i / 8.0),
        }
        for i in range(8)
    ]
    run = trainer(refresh(), max_epochs=6)
    run.fit(module, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4))
    assert module.new_parameters == ["score.weight"]
    groups = run.optimizers[0].param_groups
    assert [(g["sparse"], len(g["params"])) for g in groups] == [(True, 8), (False, 1)]
    assert run.callback_metrics["train_loss"] < 1.2
    assert "val_perplexity" not in run.callback_metrics
    with pytest.raises(MisconfigurationException, match="use validate"):
        run.test(module, DataLoader(rows, batch_size=4), verbose=False)


def test_test_writes_predictions_and_export_gives_the_same_logits(tiny_model_dir, sums_file, tmp_path):
    module = LiftLightningModule(
        str(tiny_model_dir),
        lr=2e-2,
        num_beams=2,
        max_new_tokens=4,
        unknown_tasks="number",
        predictions_dir=str(tmp_path),
    )
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="last", enable_version_counter=False)
    run = trainer(refresh(), checkpoints, precision="bf16-true")
    questions = str(write_sums(tmp_path / "questions.json", rows=5, seed=9))
    datamodule = data(sums_file, tiny_model_dir, test_path={"mine": questions})
    run.fit(module, datamodule=datamodule)
    (results,) = run.test(module, datamodule=datamodule, verbose=False)
    assert set(results) == {"test_mine_paper", "test_mine_strict"}
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(5))
    assert {"prediction", "gold", "strict", "paper"} <= set(lines[0])

    folder = export(str(tmp_path / "last.ckpt"), str(tmp_path / "exported"))
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert reloaded.dtype == torch.bfloat16
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, module.hf_model.eval()(tokens).logits)


def test_an_unknown_task_is_refused_unless_told_how_to_score_it(tiny_model_dir, sums_file, tmp_path):
    module = LiftLightningModule(str(tiny_model_dir), num_beams=1, max_new_tokens=1, predictions_dir=str(tmp_path))
    datamodule = data(sums_file, tiny_model_dir, test_path={"mine": str(sums_file)}, test_limit=1)
    with pytest.raises(ValueError, match="unknown task 'mine'"):
        trainer().test(module, datamodule=datamodule, verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1, got 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be between 0 and 1, got 1.5"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be above 0"),
        (
            {"method": "lorra"},
            "method must be one of lift, full, lora, .*spectral, got 'lorra'",
        ),
        ({"loss_reduction": "mean"}, "loss_reduction must be one of token_mean, micro_batch_mean"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type must be one of linear, cosine"),
        ({"task": "summarisation"}, "task must be one of causal_lm, sequence_classification"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiftLightningModule("somewhere", **arguments)


@pytest.mark.parametrize("argument", ["accumulate_grad_batches", "gradient_clip_val"])
def test_the_trainers_own_arguments_are_refused_by_lightning(tiny_model_dir, sums_file, argument):
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        trainer(refresh(), **{argument: 2}).fit(
            LiftLightningModule(str(tiny_model_dir)), datamodule=data(sums_file, tiny_model_dir)
        )
