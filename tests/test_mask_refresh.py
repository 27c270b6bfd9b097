"""The callback in a Lightning project that is not ours: counts, clipping, accumulation, resume, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import MaskedDense, Regression, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lift_lightning import SelectionConfig, SparseAdamW, build_param_groups
from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.datamodules.resume import ResumableDataLoader

RANK = {"rank": 2, "lra_rank": 3}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("interval", "settings", "expected"),
    [
        # 24 rows in batches of 4 are 6 micro-batches an epoch, 2 epochs.
        (5, {}, [1, 5, 10]),  # 12 steps: 1 + floor(12 / 5)
        (1, {}, list(range(1, 13))),  # T selections for interval 1
        (2, {"accumulate_grad_batches": 2}, [1, 2, 4, 6]),  # 3 steps an epoch, 6 in all: 1 + 3
        (2, {"accumulate_grad_batches": 4}, [1, 2, 4]),  # ceil(6/4) = 2 steps an epoch, 4 in all: 1 + 2
        (3, {"limit_train_batches": 4}, [1, 3, 6]),  # 8 steps: 1 + 2
        (3, {"max_steps": 7, "max_epochs": -1}, [1, 3, 6]),
        (None, {}, [1]),
        (100, {}, [1]),
    ],
)
def test_selections_are_counted_in_optimizer_steps(interval, settings, expected):
    callback = MaskRefreshCallback(interval=interval, **RANK)
    fit(Regression(), callback, **settings)
    assert [step for step, _ in callback.history] == expected


def test_an_overridden_should_refresh_decides_and_is_asked_once_a_step():
    class Late(MaskRefreshCallback):
        asked: list[int] = []

        def should_refresh(self, step: int) -> bool:
            self.asked.append(step)
            return step in (2, 6)

    callback = Late(**RANK)
    fit(Regression(), callback, accumulate_grad_batches=2)
    assert callback.asked == [2, 3, 4, 5, 6]
    assert [step for step, _ in callback.history] == [1, 2, 6]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05},  # 6 micro-batches: the last group has 2
    ],
    ids=["plain", "clip-norm", "clip-value", "accumulate-and-clip"],
)
def test_automatic_optimization_equals_the_masked_dense_oracle(settings):
    ours, oracle = Regression("sparse").double(), Regression("dense").double()
    data = loader()
    data.dataset.tensors = tuple(t.double() for t in data.dataset.tensors)
    start = weights(ours)
    fit(ours, MaskRefreshCallback(interval=3, **RANK), data=data, **settings)
    fit(oracle, MaskedDense(3, SelectionConfig(**RANK)), data=data, **settings)
    moved = weights(ours)
    for name, parameter in weights(oracle).items():
        torch.testing.assert_close(moved[name], parameter, rtol=1e-9, atol=1e-9)
    assert not torch.equal(moved["net.0.weight"], start["net.0.weight"])
    assert not torch.equal(moved["head.weight"], start["head.weight"])
    assert torch.equal(moved["net.0.bias"], start["net.0.bias"])


def test_unselected_entries_keep_their_bits():
    module = Regression()
    start = weights(module)
    callback = MaskRefreshCallback(interval=None, **RANK)
    trainer = fit(module, callback)
    selected = torch.zeros(16 * 12, dtype=torch.bool)
    selected[trainer.optimizers[0].indices(module.net[0].weight).long()] = True
    assert selected.sum() == 2 * (16 + 12)
    same = (module.net[0].weight == start["net.0.weight"]).flatten()
    assert same[~selected].all()
    assert not same[selected].any()


@pytest.mark.parametrize("stop_after", [4, 5, 6, 7])  # mid-interval, before a refresh, end of an epoch, after it
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bit_equal_to_the_run_that_was_not_interrupted(tmp_path: Path, stop_after: int, accumulate: int):
    def settings():
        rows = ResumableDataLoader(loader(rows=24 * accumulate).dataset, batch_size=4, shuffle=True, seed=5)
        return {"data": rows, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1, "max_epochs": 3}

    whole, callback = Regression(), MaskRefreshCallback(interval=3, **RANK)
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=stop_after, save_top_k=-1, filename="{step}")
    fit(whole, callback, enable_checkpointing=True, callbacks=[checkpoints], **settings())
    resumed, again = Regression(), MaskRefreshCallback(interval=3, **RANK)
    with torch.no_grad():
        resumed.net[0].weight.zero_()  # nothing may be left of a fresh start
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=stop_after, save_top_k=-1, filename="{step}")
    here = {"enable_checkpointing": True, "callbacks": [checkpoints]}
    fit(resumed, again, ckpt_path=tmp_path / f"step={stop_after}.ckpt", **here, **settings())
    expected = weights(whole)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    assert [step for step, _ in again.history] == [step for step, _ in callback.history if step > stop_after]


def test_a_checkpoint_holds_the_selection_once_and_loads_without_pickle(tmp_path: Path):
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    fit(Regression(), MaskRefreshCallback(interval=3, **RANK), enable_checkpointing=True, callbacks=[checkpoints])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "sparse" not in checkpoint["optimizer_states"][0]
    saved = checkpoint["lift_lightning"]["optimizer"]["parameters"]
    assert list(saved) == ["net.0.weight", "net.2.weight"]
    assert saved["net.0.weight"]["indices"].shape == (2 * (12 + 16),)
    assert set(checkpoint["optimizer_states"][0]["state"][0]) == {"step"}


def test_resuming_with_other_targets_names_them(tmp_path: Path):
    class Other(Regression):
        def configure_optimizers(self):
            return SparseAdamW(build_param_groups(self, [r"net\.0\.weight", "head.weight"]))

    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    settings = {"enable_checkpointing": True, "callbacks": [checkpoints]}
    fit(Regression(dense_head=False), MaskRefreshCallback(**RANK), **settings)
    with pytest.raises(ValueError, match=r"only in the checkpoint \['net.2.weight'\], only here \['head.weight'\]"):
        fit(Other(), MaskRefreshCallback(**RANK), ckpt_path=tmp_path / "last.ckpt", max_epochs=4, **settings)


def test_without_sparse_groups_the_callback_says_one_line_and_is_inert(caplog):
    callback = MaskRefreshCallback(**RANK)
    with caplog.at_level("INFO"):
        fit(Regression("dense"), callback)
    assert caplog.text.count("MaskRefreshCallback") == 1
    assert callback.history == []


def test_refreshes_are_logged_at_their_step(tmp_path: Path):
    logger = CSVLogger(tmp_path, name=None, version="")
    callback = MaskRefreshCallback(interval=5, **RANK)
    fit(Regression(), callback, logger=logger, log_every_n_steps=1000)
    logger.save()
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    table = [dict(zip(columns, row.split(","), strict=True)) for row in rows]
    assert [row["step"] for row in table] == ["0", "4", "9"]
    # (2*(12+16) + 2*(16+16)) entries of 16*12 + 16*16
    assert {float(row["lift_density"]) for row in table} == {120 / 448}
    assert table[0]["lift_overlap"] == ""
    assert float(table[1]["lift_overlap"]) == callback.history[1][1].overlap


@pytest.mark.parametrize("what", ["warn", "raise"])
def test_steps_that_are_not_finite_are_skipped_and_reported(what):
    class Broken(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 2 else loss

    callback = MaskRefreshCallback(on_nonfinite=what, **RANK)
    settings = {"max_epochs": 1, "log_every_n_steps": 1}
    message = r"1 optimizer steps were skipped .*\(1 of 3 so far\)"
    if what == "warn":
        with pytest.warns(UserWarning, match=message):
            trainer = fit(Broken(), callback, **settings)
        assert trainer.global_step == 6
    else:
        with pytest.raises(FloatingPointError, match=message):
            fit(Broken(), callback, **settings)


def test_loss_scaling_is_refused_with_the_remedy():
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        fit(Regression(), MaskRefreshCallback(**RANK), plugins=[MixedPrecision("16-mixed", "cpu")])


def test_a_strategy_that_is_not_known_is_refused():
    class Several:
        strategy = object()
        world_size = 2
        precision_plugin = None

    with pytest.raises(MisconfigurationException, match=r"the Trainer has object: set trainer.strategy to auto or ddp"):
        MaskRefreshCallback(**RANK).setup(Several(), Regression(), "fit")


def test_two_sparse_optimizers_are_refused():
    class TwoOptimizers:
        optimizers = [Regression().configure_optimizers(), Regression().configure_optimizers()]

    with pytest.raises(MisconfigurationException, match="returned 2"):
        MaskRefreshCallback(**RANK).on_train_start(TwoOptimizers(), Regression())


def test_stepping_without_the_callback_names_the_remedy():
    with pytest.raises(RuntimeError, match="add MaskRefreshCallback to the Trainer's callbacks"):
        fit(Regression(), ModelCheckpoint(), enable_checkpointing=True, max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "interval must be at least 1"),
        ({"on_nonfinite": "rais"}, "on_nonfinite must be one of warn, raise, got 'rais'"),
        ({"rank": 4, "density": 0.1}, "rank=4 and density=0.1"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"density": 1.5}, "density must be above 0 and at most 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskRefreshCallback(**arguments)


def test_an_approximation_that_reduces_nothing_is_told():
    """R = 12 is the shorter side of the 16x12 matrix: what is left is plain magnitude."""
    with pytest.warns(UserWarning, match=r"12, is not below the shorter side of 1 matrices.*smaller lra_rank"):
        fit(Regression(), MaskRefreshCallback(rank=2, lra_rank=12), max_epochs=1)


def test_a_callback_can_serve_a_second_model():
    """Its density of the model is counted anew, and its history is of the last fit."""
    callback = MaskRefreshCallback(interval=5, density=0.1, density_of="model", lra_rank=4)
    fit(Regression(dense_head=False), callback)

    class OneLayer(Regression):
        def configure_optimizers(self):
            return SparseAdamW(build_param_groups(self, r"net\.0\.weight"))

    fit(OneLayer(), callback)
    assert [step for step, _ in callback.history] == [1, 5, 10]
    assert callback.history[0][1].selected == 53  # a tenth of 531 entries, all in one matrix


def test_gradients_that_a_step_has_used_are_not_saved(tmp_path: Path):
    """Under automatic optimization they stay until the next backward; a checkpoint would hold whole dense ones."""
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    fit(Regression(), MaskRefreshCallback(**RANK), enable_checkpointing=True, callbacks=[checkpoints])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["lift_lightning"]["optimizer"]
    assert saved["dense_grads"] == {}
    assert not any("grad" in tensors for tensors in saved["parameters"].values())


def test_logging_can_be_switched_off():
    fit(Regression(), MaskRefreshCallback(**RANK), log_every_n_steps=0, max_epochs=1)


def test_a_checkpoint_without_a_selection_is_told(tmp_path: Path):
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    settings = {"enable_checkpointing": True, "callbacks": [checkpoints]}
    fit(Regression(), MaskRefreshCallback(**RANK), **settings)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["lift_lightning"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="has no selection"):
        fit(Regression(), MaskRefreshCallback(**RANK), ckpt_path=tmp_path / "last.ckpt", max_epochs=3, **settings)


def test_density_of_the_model_counts_every_parameter():
    module = Regression()
    callback = MaskRefreshCallback(density=0.1, density_of="model", lra_rank=4)
    fit(module, callback, max_epochs=1)
    total = sum(p.numel() for p in module.parameters())  # 448 in the targets, 531 in all
    assert callback.history[0][1].selected == pytest.approx(0.1 * total, abs=1)


# ------------------------------------------------------------------ the subspace solver


class WideRegression(Regression):
    """12 -> 16 -> 260 -> 280 -> 3: `auto` gives the last of the hidden matrices to the subspace solver."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            wide = [torch.nn.Linear(16, 260), torch.nn.GELU(), torch.nn.Linear(260, 280), torch.nn.Tanh()]
            self.net = torch.nn.Sequential(*self.net, *wide)
            self.head = torch.nn.Linear(280, 3)


WIDE_RANK = {"rank": 2, "lra_rank": 8}


def fit_wide(folder: Path, module: WideRegression, callback: MaskRefreshCallback, **settings):
    rows = ResumableDataLoader(loader(rows=24).dataset, batch_size=4, shuffle=True, seed=5)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    return fit(module, callback, data=rows, enable_checkpointing=True, callbacks=[checkpoints], **settings)


@pytest.mark.filterwarnings("ignore:the rank of the approximation")
@pytest.mark.parametrize("basis_device", [None, "cpu"])
def test_resume_is_bit_equal_with_the_subspace_solver_in_force(tmp_path: Path, basis_device: str | None):
    """The checkpoint lies between two refreshes, so the basis of the first starts the second."""

    def callback() -> MaskRefreshCallback:
        return MaskRefreshCallback(interval=3, basis_device=basis_device, **WIDE_RANK)

    whole, resumed = WideRegression(), WideRegression()
    first = callback()
    fit_wide(tmp_path, whole, first)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["lift_lightning"]["bases"]
    assert list(saved) == ["net.6.weight"]  # those of the exact solver have none
    assert [(b.shape, b.dtype) for b in saved["net.6.weight"]] == [((260, 40), torch.float16)]
    again = callback()
    fit_wide(tmp_path, resumed, again, ckpt_path=tmp_path / "step=4.ckpt")
    expected = weights(whole)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    assert [step for step, _ in again.history] == [6, 9, 12]
    assert all(report.solvers["subspace"] == 1 for _, report in again.history)
    theirs = {step: report.error for step, report in first.history}
    assert all(report.error == theirs[step] for step, report in again.history)
    assert all(report.bases == {} for _, report in again.history)


@pytest.mark.filterwarnings("ignore:the rank of the approximation")
@pytest.mark.parametrize("lra_rank", [2, 20])
def test_resuming_with_another_rank_takes_the_old_basis(tmp_path: Path, lra_rank: int):
    fit_wide(tmp_path, WideRegression(), MaskRefreshCallback(interval=3, **WIDE_RANK))
    callback = MaskRefreshCallback(interval=3, rank=2, lra_rank=lra_rank)
    with pytest.warns(UserWarning, match="takes effect at the next refresh"):
        fit_wide(tmp_path, WideRegression(), callback, ckpt_path=tmp_path / "step=4.ckpt")
    assert [step for step, _ in callback.history] == [6, 9, 12]
    assert callback._bases["net.6.weight"][0].shape == (260, lra_rank + 32)
    assert all(report.error <= callback.config.tolerance for _, report in callback.history)


@pytest.mark.filterwarnings("ignore:the rank of the approximation")
def test_a_refresh_says_which_solvers_it_took(caplog):
    with caplog.at_level("INFO"):
        fit(WideRegression(), MaskRefreshCallback(interval=None, **WIDE_RANK), max_epochs=1)
    assert "1 subspace" in caplog.text
    assert "3 exact" in caplog.text
    assert "error up to" in caplog.text
