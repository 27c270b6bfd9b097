"""Schedules, divided budgets and gradients, through the callback in a project that is not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign import Regression, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from networks import sole
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.datamodules.resume import ResumableDataLoader
from lift_lightning.errors import ConfigError
from lift_lightning.gradients import drawn_batches, gradient_statistics
from lift_lightning.schedules import Origins, all_selected

BUDGET = {"density": 0.25, "lra_rank": 3}
NAMES = ("net.0.weight", "net.2.weight")


class Known(Regression):
    """Says what the loss of a batch is."""

    def selection_loss(self, batch: list[Tensor]) -> Tensor:
        return self.training_step(batch, 0)


class Watch(pl.Callback):
    """The selected entries at every step, and the weights before and after."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.start: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        inner = trainer.optimizers[0]
        self.masks.append({name: inner.indices(p).clone() for name, p, _ in inner.sparse_parameters()})

    def changed(self, module: pl.LightningModule, name: str) -> Tensor:
        now = dict(module.named_parameters())[name].detach()
        return (now != self.start[name]).flatten().nonzero().squeeze(1)


def run(settings: dict[str, Any], **trainer: Any) -> tuple[Known, MaskRefreshCallback, Watch]:
    module, callback, watch = Known(weight_decay=0.0), MaskRefreshCallback(**settings), Watch()
    fit(module, callback, callbacks=[watch], **trainer)
    return module, callback, watch


def test_accumulate_grows_to_the_budget_and_drops_nothing():
    settings = {"interval": 2, "schedule": "accumulate", "accumulate_selections": 4, **BUDGET}
    module, callback, watch = run(settings)
    assert [step for step, _ in callback.history] == [1, 2, 4, 6]  # and not again
    assert [report.selected for _, report in callback.history] == [28, 56, 84, 112]  # of 48 and 64 in 4 parts
    for name in NAMES:
        for earlier, later in zip(watch.masks, watch.masks[1:], strict=False):
            assert set(earlier[name].tolist()) <= set(later[name].tolist())
        assert set(watch.changed(module, name).tolist()) <= set(watch.masks[-1][name].tolist())


def test_drop_and_grow_sets_back_what_moved_least_and_keeps_the_number():
    settings = {
        "interval": 3,
        "schedule": "drop_and_grow",
        "drop_fraction": 0.5,
        "criterion": "gradient",
        "gradient_batches": 2,
        "density": 0.25,
    }
    module, callback, watch = run(settings)
    assert [step for step, _ in callback.history] == [1, 3, 6, 9, 12]
    assert {report.selected for _, report in callback.history} == {112}
    # 12 steps: half of 48 and 64 falls by a quarter of itself each time, to 0 at the last.
    lost = [
        len(set(a["net.2.weight"].tolist()) - set(b["net.2.weight"].tolist()))
        for a, b in zip(watch.masks, watch.masks[1:], strict=False)
    ]
    assert [bool(n) for n in lost] == [False, True, False, False, True, False, False, True, False, False, False]
    assert all(n <= limit for n, limit in zip([lost[1], lost[4], lost[7]], [24, 16, 8], strict=True))
    for name in NAMES:  # dropped entries have their first values again
        assert set(watch.changed(module, name).tolist()) <= set(watch.masks[-1][name].tolist())


def test_what_is_dropped_moved_least():
    parameter, optimizer = sole(torch.zeros(2, 5), [0, 3, 4, 7, 9])
    origins = Origins()
    origins.follow(optimizer, {})
    parameter.data.view(-1)[[0, 3, 4, 7, 9]] = torch.tensor([0.5, -0.1, 0.2, -0.9, 0.1])
    (kept,) = origins.survivors(optimizer, 0.5).values()
    assert kept.tolist() == [0, 4, 7]  # 0.1 twice
    before = all_selected(optimizer)
    optimizer.set_indices(parameter, torch.tensor([0, 1, 3, 4, 7]))  # one of the two was selected again
    origins.follow(optimizer, before)
    assert parameter.flatten().tolist() == pytest.approx([0.5, 0, 0, -0.1, 0.2, 0, 0, -0.9, 0, 0])
    assert all(value.tolist() == [0.0] * 5 for value in origins.values.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "accumulate", "accumulate_selections": 3, **BUDGET},
        {"schedule": "drop_and_grow", "criterion": "gradient", "density": 0.25},
        {"schedule": "drop_and_grow", **BUDGET},
        {"density": 0.25, "allocation": "energy"},
        {"count": 77, "lra_rank": 3, "allocation": "global"},
        {"count": 77, "lra_rank": 3},
        {"criterion": "movement", "density": 0.25, "gradient_batches": 3},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
@pytest.mark.parametrize("stop_after", [2, 5])
def test_resume_is_bit_equal(tmp_path: Path, settings: dict, stop_after: int):
    settings = {"interval": 3, **settings}

    def here() -> dict[str, Any]:
        rows = ResumableDataLoader(loader().dataset, batch_size=4, shuffle=True, seed=5)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop_after, save_top_k=-1)
        return {"data": rows, "callbacks": [saver], "enable_checkpointing": True}

    whole, callback = Known(), MaskRefreshCallback(**settings)
    fit(whole, callback, **here())
    resumed, again = Known(), MaskRefreshCallback(**settings)
    fit(resumed, again, ckpt_path=tmp_path / f"step={stop_after}.ckpt", **here())
    for (name, mine), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert [r.selected for s, r in callback.history if s > stop_after] == [r.selected for _, r in again.history]


def test_a_divided_budget_is_printed(capsys: pytest.CaptureFixture):
    _, callback, _ = run({"density": 0.25, "allocation": "effective_rank"})
    printed = capsys.readouterr().out
    assert "How the budget is divided" in printed
    assert "112 entries in all" in printed
    assert callback.history[0][1].selected == 112


def test_a_schedule_cannot_begin_in_the_middle(tmp_path: Path):
    saver = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=6)
    fit(Known(), MaskRefreshCallback(interval=3, **BUDGET), callbacks=[saver], enable_checkpointing=True)
    path = tmp_path / "end.ckpt"
    for settings, message in (
        ({"schedule": "drop_and_grow"}, "values from before the training, which this checkpoint does not have"),
        ({"schedule": "accumulate"}, "schedule=accumulate, .* divide the budget before the first selection"),
    ):
        again = MaskRefreshCallback(interval=3, **BUDGET, **settings)
        with pytest.raises(ConfigError, match=message):
            fit(Known(), again, callbacks=[saver], enable_checkpointing=True, ckpt_path=path, max_epochs=3)


def test_a_resume_with_other_settings_says_which_budget_is_in_force(tmp_path: Path):
    divided = {"interval": 3, "density": 0.25, "allocation": "energy"}

    def here() -> dict[str, Any]:
        saver = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=6)
        return {"callbacks": [saver], "enable_checkpointing": True}

    first = MaskRefreshCallback(**divided)
    fit(Known(), first, max_epochs=1, **here())
    path = tmp_path / "end.ckpt"
    more = MaskRefreshCallback(**{**divided, "density": 0.5})
    with pytest.warns(UserWarning, match="except for the budget, which stays divided as it was"):
        fit(Known(), more, ckpt_path=path, **here())
    assert {report.selected for _, report in [*first.history, *more.history]} == {112}
    plain = MaskRefreshCallback(interval=3, density=0.5)
    with pytest.warns(UserWarning, match="takes effect at the next refresh$"):
        fit(Known(), plain, ckpt_path=path, **here())
    assert {report.selected for _, report in plain.history} == {224}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "accumulate", "interval": None}, "schedule=accumulate changes the selection: set interval"),
        ({"accumulate_selections": 0}, "accumulate_selections must be at least 1, got 0"),
        ({"drop_fraction": 0.0}, "drop_fraction must be above 0 and at most 1, got 0.0"),
        ({"schedule": "sometimes"}, "schedule must be one of periodic, accumulate, drop_and_grow, got 'sometimes'"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        MaskRefreshCallback(**settings)


@pytest.mark.parametrize("power", [1, 2])
def test_statistics_are_sums_over_the_batches(power: int):
    module = Known()
    optimizer = module.configure_optimizers()
    batches = list(loader())[:3]
    found = gradient_statistics(optimizer, module.selection_loss, batches, power)
    assert optimizer.hooks_attached
    for name in NAMES:
        parameter = dict(module.named_parameters())[name]
        each = [torch.autograd.grad(module.selection_loss(batch), parameter)[0] for batch in batches]
        torch.testing.assert_close(found[name], sum(g**power for g in each))
        assert parameter.grad is None


def test_gradients_leave_the_run_as_it_was():
    """A first selection by gradients draws nothing from the training's random numbers, nor from its loader's."""

    def ends(criterion: str) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(5)
        data = DataLoader(loader().dataset, batch_size=4, shuffle=True)
        seen: list[Tensor] = []

        class Seeing(Known):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                if self.trainer.training and not selecting:
                    seen.append(batch[0])
                return super().training_step(batch, batch_idx)

            def selection_loss(self, batch: list[Tensor]) -> Tensor:
                selecting.append(True)
                loss = super().selection_loss(batch)
                selecting.clear()
                return loss

        selecting: list[bool] = []
        fit(Seeing(), MaskRefreshCallback(interval=2, criterion=criterion, density=0.25), data=data)
        return seen, torch.rand(3)

    (gradient, after), (random, after_random) = ends("gradient"), ends("random")
    assert all(torch.equal(a, b) for a, b in zip(gradient, random, strict=True))
    assert torch.equal(after, after_random)


def test_gradients_need_a_loss_and_data_to_draw_from():
    settings = {"criterion": "gradient", "density": 0.25}
    with pytest.raises(MisconfigurationException, match=r"give Regression a method selection_loss\(batch\)"):
        fit(Regression(), MaskRefreshCallback(**settings))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    with pytest.raises(ConfigError, match="draws batches from a DataLoader whose dataset has a length"):
        fit(Known(), MaskRefreshCallback(**settings), data=DataLoader(Stream(), batch_size=4))


def test_drawn_batches_are_a_function_of_the_seed():
    data = DataLoader(TensorDataset(torch.arange(10)), batch_size=4)
    first = [batch[0].tolist() for batch in drawn_batches(data, 2, seed=1)]
    assert first == [batch[0].tolist() for batch in drawn_batches(data, 2, seed=1)]
    assert first != [batch[0].tolist() for batch in drawn_batches(data, 2, seed=2)]
    everything = drawn_batches(data, 9, seed=1)
    assert [len(batch[0]) for batch in everything] == [4, 4, 2]
    assert sorted(torch.cat([batch[0] for batch in everything]).tolist()) == list(range(10))
