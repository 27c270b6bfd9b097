"""The monitors beside a training: what they say of the selection and of the eigenspaces, on resume too; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign import Regression, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_module import data, refresh, trainer

from lift_lightning import LiftLightningModule, SparseAdamW
from lift_lightning.callbacks import EigenspaceMonitor, MaskRefreshCallback, SparsityMonitor
from lift_lightning.datamodules.resume import ResumableDataLoader
from lift_lightning.errors import ConfigError

RANK = {"rank": 2, "lra_rank": 3}
ENTRIES = {"0": 16 * 12, "2": 16 * 16}
# By step, of net.0.weight and net.2.weight; a step that is not there keeps what it has.
SELECTIONS: dict[int, dict[str, set[int]]] = {
    1: {"0": {0, 1, 2, 3}, "2": {10, 20}},
    3: {"0": {2, 3, 4, 5}, "2": {10, 20}},  # half of the first is new
    4: {"0": {0, 1, 2, 190}, "2": {30, 40, 50, 255}},  # 0 and 1 were there at first; a larger budget
    9: {"0": {7}, "2": {30}},
}


class Scripted(pl.Callback):
    """Selections by hand, in place of `MaskRefreshCallback`."""

    def __init__(self, selections: dict[int, dict[str, set[int]]] = SELECTIONS) -> None:
        self.selections, self.done = selections, 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        (optimizer,) = (o for o in trainer.optimizers)
        step = optimizer.attempted_steps + 1
        if step > self.done and step in self.selections:
            for name, parameter, _ in optimizer.sparse_parameters():
                optimizer.set_indices(parameter, torch.tensor(sorted(self.selections[step][name.split(".")[1]])))
        self.done = step


def expected_shares(selections: dict[int, dict[str, set[int]]] = SELECTIONS) -> list[tuple[int, dict[str, float]]]:
    """By sets and sums over both layers."""
    first, before, ever, found = None, None, {"0": set(), "2": set()}, []
    for step, now in selections.items():
        metrics = {}
        for layers in (["0"], ["2"], ["0", "2"]):
            label = layers[0] if len(layers) == 1 else "all"
            for layer in layers:
                ever[layer] |= now[layer]
            metrics[f"selection_ever/{label}"] = sum(len(ever[x]) for x in layers) / sum(ENTRIES[x] for x in layers)
            if before is not None:
                size = sum(len(now[x]) for x in layers)
                metrics[f"selection_replaced/{label}"] = sum(len(now[x] - before[x]) for x in layers) / size
                metrics[f"selection_since_first/{label}"] = sum(len(now[x] - first[x]) for x in layers) / size
        first, before = first or now, now
        found.append((step, metrics))
    return found


def assert_close(found: list, expected: list) -> None:
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, mine), (_, other) in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-12)


# ------------------------------------------------------------------ selections


def test_shares_are_those_of_selections_made_by_hand():
    monitor = SparsityMonitor()
    fit(Regression(), Scripted(), callbacks=[monitor])
    expected = expected_shares()
    assert expected[1][1]["selection_replaced/0"] == 0.5
    assert expected[1][1]["selection_replaced/all"] == 2 / 6
    assert expected[2][1]["selection_since_first/0"] == 0.25
    assert expected[2][1]["selection_ever/all"] == (7 + 6) / 448
    assert_close(monitor.history, expected)
    assert 0 < monitor.seconds < 5


@pytest.mark.parametrize("accumulate", [2, 4])
def test_steps_and_shares_are_the_same_however_many_micro_batches_a_step_has(accumulate: int):
    monitor = SparsityMonitor()
    fit(Regression(), Scripted(), callbacks=[monitor], accumulate_grad_batches=accumulate, max_steps=12, max_epochs=-1)
    assert_close(monitor.history, expected_shares())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("interval", [1, 5, None])
def test_every_refresh_of_the_callback_is_seen(interval: int | None, accumulate: int):
    callback, monitor = MaskRefreshCallback(interval=interval, **RANK), SparsityMonitor()
    fit(Regression(), callback, callbacks=[monitor], accumulate_grad_batches=accumulate, max_steps=12, max_epochs=-1)
    assert [step for step, _ in monitor.history] == [step for step, _ in callback.history]
    for (_, metrics), (_, report) in zip(monitor.history, callback.history, strict=True):
        if report.overlap is None:
            assert set(metrics) == {"selection_ever/0", "selection_ever/2", "selection_ever/all"}
            assert metrics["selection_ever/all"] == report.density
        else:
            assert metrics["selection_replaced/all"] == pytest.approx(1 - report.overlap, abs=1e-9)
    assert (monitor.history[-1][1]["selection_ever/all"] > callback.history[-1][1].density) == (interval is not None)


def test_a_selection_that_stays_the_same_is_looked_at_when_it_is_made_again():
    monitor = SparsityMonitor()
    fit(Regression(), MaskRefreshCallback(interval=4, criterion="random", **RANK), callbacks=[monitor])
    assert [step for step, _ in monitor.history] == [1, 4, 8, 12]
    for _, metrics in monitor.history[1:]:
        assert metrics["selection_replaced/all"] == metrics["selection_since_first/all"] == 0
        assert metrics["selection_ever/all"] == 120 / 448


def test_shares_are_logged_at_their_step(tmp_path: Path):
    logger, monitor = CSVLogger(tmp_path, name=None, version=""), SparsityMonitor()
    fit(Regression(), Scripted(), callbacks=[monitor], logger=logger, log_every_n_steps=1000)
    logger.save()
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    logged = [(int(row.pop("step")), {k: float(v) for k, v in row.items() if "selection" in k and v}) for row in table]
    assert_close(logged, monitor.history)


def test_a_second_fit_begins_anew():
    monitor = SparsityMonitor()
    for _ in range(2):
        fit(Regression(), Scripted(), callbacks=[monitor])
    assert_close(monitor.history, expected_shares())


def test_only_the_first_process_looks():
    class Trainer:
        is_global_zero, global_step, loggers = False, 1, ()

    monitor, module = SparsityMonitor(), Regression()
    Trainer.optimizers = [module.configure_optimizers()]
    for _, parameter, _ in Trainer.optimizers[0].sparse_parameters():
        Trainer.optimizers[0].set_indices(parameter, torch.arange(3))
    monitor.on_train_batch_end(Trainer, module, None, None, 0)
    assert monitor.history == []
    Trainer.is_global_zero = True
    monitor.on_train_batch_end(Trainer, module, None, None, 0)
    assert [step for step, _ in monitor.history] == [1]


# ------------------------------------------------------------------ resume


def monitored(folder: Path, stop_after: int, accumulate: int = 1, **settings: Any):
    """A run of 18 steps that writes a checkpoint after some, refreshes every three, and looks every two."""
    rows = ResumableDataLoader(loader(rows=24 * accumulate).dataset, batch_size=4, shuffle=True, seed=5)
    sparsity, eigenspaces = SparsityMonitor(), EigenspaceMonitor(interval=2)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=stop_after, save_top_k=-1, filename="{step}")
    fit(
        Regression(),
        MaskRefreshCallback(interval=3, **RANK),
        data=rows,
        callbacks=[sparsity, eigenspaces, checkpoints],
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        max_epochs=3,
        **settings,
    )
    return sparsity, eigenspaces


@pytest.mark.parametrize(
    ("stop_after", "accumulate"),  # before a refresh, between two, after one or an epoch
    [(2, 1), (4, 1), (6, 1), (7, 1), (9, 1), (2, 2), (4, 2), (5, 2), (6, 2), (7, 2), (9, 2)],
)
def test_a_resumed_run_says_of_selections_what_the_whole_run_says(tmp_path: Path, stop_after: int, accumulate: int):
    whole, _ = monitored(tmp_path, stop_after, accumulate)
    again, _ = monitored(tmp_path, stop_after, accumulate, ckpt_path=tmp_path / f"step={stop_after}.ckpt")
    expected = [(step, metrics) for step, metrics in whole.history if step > stop_after]
    assert again.history == expected
    assert all(metrics["selection_replaced/all"] > 0 for _, metrics in expected)
    assert any(metrics["selection_since_first/all"] != metrics["selection_replaced/all"] for _, metrics in expected)


@pytest.mark.parametrize("stop_after", [2, 4, 5, 6])  # where it looked, and between two looks
def test_a_resumed_run_compares_with_the_eigenspaces_of_the_very_beginning(tmp_path: Path, stop_after: int):
    _, whole = monitored(tmp_path, stop_after)
    _, again = monitored(tmp_path, stop_after, ckpt_path=tmp_path / f"step={stop_after}.ckpt")
    expected = {step: metrics for step, metrics in whole.history if step > stop_after}
    found = dict(again.history)
    assert {step: found[step] for step in expected} == expected
    assert len(expected) >= 5
    assert max(metrics["alignment/all"] for metrics in expected.values()) < 0.9999


def test_what_the_monitors_keep_loads_without_pickle(tmp_path: Path):
    monitored(tmp_path, 4)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]
    (sparsity,) = (state for key, state in saved.items() if key.startswith("SparsityMonitor"))
    assert {key: list(value) for key, value in sparsity.items()} == dict.fromkeys(
        ("first", "last", "ever"), ["net.0.weight", "net.2.weight"]
    )
    (eigenspaces,) = (state for key, state in saved.items() if key.startswith("EigenspaceMonitor"))
    assert eigenspaces["looked"] == 4
    assert {name: tuple(basis.shape) for name, basis in eigenspaces["before"].items()} == {
        "net.0.weight": (12, 1),
        "net.2.weight": (16, 2),
        "head.weight": (16, 1),
    }


# ------------------------------------------------------------------ eigenspaces


class Weights(pl.Callback):
    """The matrices at the beginning and after every step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.at[trainer.global_step] = {
            name: p.detach().double().clone() for name, p in pl_module.named_parameters() if p.ndim == 2
        }

    on_train_start = on_train_batch_end = keep


def alignments(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], k: dict[str, int]) -> dict[str, float]:
    """By the full SVD in float64."""
    scores: dict[str, float] = {}
    for name in before:
        old, new = (torch.linalg.svd(weights[name], full_matrices=False).Vh[: k[name]] for weights in (before, after))
        scores[f"alignment/{name.split('.')[-2]}"] = float((new @ old.T).square().sum() / k[name])
    return {**scores, "alignment/all": sum(scores.values()) / len(scores)}


@pytest.mark.parametrize("make_optimizer", ["sparse", "dense"])
@pytest.mark.parametrize("directions", [None, 2])
def test_alignments_are_those_of_the_weights_before_and_after(directions: int | None, make_optimizer: str):
    monitor, weights = EigenspaceMonitor(interval=5, directions=directions), Weights()
    fit(Regression(make_optimizer), MaskRefreshCallback(interval=3, **RANK), callbacks=[weights, monitor])
    # An eighth of 12, of 16 and of 3, at least one.
    k = {name: directions or count for name, count in {"net.0.weight": 1, "net.2.weight": 2, "head.weight": 1}.items()}
    assert [step for step, _ in monitor.history] == [0, 5, 10, 12]  # and at the end
    for step, metrics in monitor.history:
        assert metrics == pytest.approx(alignments(weights.at[0], weights.at[step], k), abs=1e-5)
    assert monitor.history[0][1] == pytest.approx(dict.fromkeys(metrics, 1.0), abs=1e-6)
    assert monitor.history[2][1]["alignment/all"] < 0.999
    assert 0 < monitor.seconds < 5


def test_only_the_matrices_that_are_named_are_looked_at():
    monitor = EigenspaceMonitor(interval=100, target_modules=[r"net\.2"])
    fit(Regression(), MaskRefreshCallback(**RANK), callbacks=[monitor])
    assert [(step, set(metrics)) for step, metrics in monitor.history] == [
        (0, {"alignment/2", "alignment/all"}),
        (12, {"alignment/2", "alignment/all"}),
    ]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_eigenspaces_are_looked_at_once_a_step_and_nothing_is_frozen(accumulate: int):
    """6 micro-batches an epoch are 6 steps, or 2."""
    monitor, module = EigenspaceMonitor(interval=1), Regression("dense")
    fit(module, monitor, accumulate_grad_batches=accumulate)
    assert [step for step, _ in monitor.history] == list(range({1: 13, 4: 5}[accumulate]))
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["net.0.bias", "net.2.bias"]


def test_alignments_are_logged_at_their_step(tmp_path: Path):
    logger, monitor = CSVLogger(tmp_path, name=None, version=""), EigenspaceMonitor(interval=6)
    fit(Regression("dense"), monitor, logger=logger, log_every_n_steps=1000)
    logger.save()
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    logged = [(int(row.pop("step")), {key: float(value) for key, value in row.items() if value}) for row in table]
    assert_close(logged, monitor.history)
    assert [step for step, _ in logged] == [0, 6, 12]


def test_a_second_fit_compares_with_its_own_beginning():
    monitor, weights = EigenspaceMonitor(interval=12), Weights()
    fit(Regression("dense"), monitor)
    module = Regression("dense")
    with torch.no_grad():
        module.net[0].weight.copy_(torch.randn(16, 12, generator=torch.Generator().manual_seed(1)))
    fit(module, monitor, callbacks=[weights])
    assert [step for step, _ in monitor.history] == [0, 12]
    k = {"net.0.weight": 1, "net.2.weight": 2, "head.weight": 1}
    assert monitor.history[1][1] == pytest.approx(alignments(weights.at[0], weights.at[12], k), abs=1e-5)


# ------------------------------------------------------------------ a language model


def test_both_work_in_this_packages_own_module(tiny_model_dir: Path, sums_file: Path):
    sparsity, eigenspaces, callback = SparsityMonitor(), EigenspaceMonitor(interval=5), refresh(3)
    module = LiftLightningModule(str(tiny_model_dir), lr=2e-2)
    module.configure_model()
    before = {name: p.detach().double().clone() for name, p in module.hf_model.named_parameters() if "_proj" in name}
    run = trainer(callback, sparsity, eigenspaces)
    run.fit(module, datamodule=data(sums_file, tiny_model_dir))
    assert run.global_step == 5
    assert [step for step, _ in sparsity.history] == [step for step, _ in callback.history] == [1, 3]
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"]
    assert [key for key in sparsity.history[1][1] if "replaced" in key] == [
        f"selection_replaced/{layer}" for layer in [layers[0], "all", *layers[1:-1]]
    ]
    assert sparsity.history[1][1]["selection_replaced/all"] == pytest.approx(1 - callback.history[1][1].overlap)
    assert [step for step, _ in eigenspaces.history] == [0, 5]
    found = eigenspaces.history[1][1]
    assert set(found) == {f"alignment/{layer}" for layer in layers}
    after = {name: p.detach().double() for name, p in module.hf_model.named_parameters() if name in before}
    scores = {}
    for name in before:
        k = min(before[name].shape) // 8
        old, new = (torch.linalg.svd(one[name], full_matrices=False).Vh[:k] for one in (before, after))
        scores.setdefault(name.split(".")[-2], []).append(float((new @ old.T).square().sum() / k))
    for layer, both in scores.items():
        assert found[f"alignment/{layer}"] == pytest.approx(sum(both) / 2, abs=1e-4)


# ------------------------------------------------------------------ refusals


def test_without_a_sparse_group_the_sparsity_monitor_names_the_remedy():
    with pytest.raises(MisconfigurationException, match="no optimizer here has a sparse group: leave the callback out"):
        fit(Regression("dense"), SparsityMonitor())

    class DenseOnly(Regression):
        def configure_optimizers(self):
            return SparseAdamW([{"params": list(self.named_parameters()), "sparse": False}])

    with pytest.raises(MisconfigurationException, match="train with method=lift"):
        fit(DenseOnly(), SparsityMonitor())


def test_selections_that_are_split_over_devices_are_refused():
    class Split(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.split_over = object()  # as under FSDP
            return optimizer

    with pytest.raises(MisconfigurationException, match="needs whole selections, and FSDP splits them over devices"):
        fit(Split(), SparsityMonitor())


def test_matrices_that_are_split_over_devices_are_refused(monkeypatch: pytest.MonkeyPatch):
    class Owned:
        group = object()

    monkeypatch.setattr("lift_lightning.callbacks.eigenspace_monitor.owned", lambda _: Owned)
    with pytest.raises(MisconfigurationException, match="needs whole matrices, and FSDP splits them over devices"):
        fit(Regression(), EigenspaceMonitor())


def test_an_adapter_is_refused_with_the_remedy():
    module = Regression("dense")
    module.adapter = object()
    with pytest.raises(MisconfigurationException, match="stay as they are under an adapter.*by `analyze alignment`"):
        fit(module, EigenspaceMonitor())


def test_an_adapter_of_this_package_is_refused(tiny_model_dir: Path, sums_file: Path):
    module = LiftLightningModule(str(tiny_model_dir), method="lora", adapter_rank=2)
    with pytest.raises(MisconfigurationException, match="EigenspaceMonitor looks at the weight matrices"):
        trainer(EigenspaceMonitor()).fit(module, datamodule=data(sums_file, tiny_model_dir))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"interval": -5}, "interval must be at least 1, got -5"),
        ({"directions": 0}, "directions must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        EigenspaceMonitor(**arguments)


def test_a_pattern_that_matches_nothing_is_told_when_the_fit_begins():
    with pytest.raises(ConfigError, match="target_modules: 'q_proj' matched none of the 3 names"):
        fit(Regression("dense"), EigenspaceMonitor(target_modules="q_proj"))
