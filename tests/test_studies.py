"""The studies: plans, records, intervals, and that the pages say what the committed runs say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from benchmarks.studies.records import Store

ROOT = Path(__file__).parents[1]
RUNS = sorted((ROOT / "benchmarks/studies/runs").rglob("*.json"))
HEAD = ("study", "name", "command", "seed", "commit", "date", "versions", "machine")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_pages_say_what_the_runs_say():
    command = [sys.executable, "-m", "benchmarks.studies.page", "--check"]
    done = subprocess.run(command, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, "run `python -m benchmarks.studies.page`"


def test_a_figure_that_was_typed_is_found():
    from benchmarks.studies.page import PAGES, filled

    page = PAGES[0].read_text(encoding="utf-8")
    assert filled(page) == page
    changed = page.replace("| LIFT, R = 2 | 0.01 | 1.56", "| LIFT, R = 2 | 0.01 | 1.50")
    assert changed != page
    assert filled(changed) == page


def test_every_figure_is_on_the_page_and_there():
    from benchmarks.studies.page import DRAWINGS, FIGURES, PAGES

    page = PAGES[0].read_text(encoding="utf-8")
    for name in DRAWINGS:
        assert f"(study_{name}.png)" in page
        assert (FIGURES / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("study", sorted({path.parent.name for path in RUNS}))
def test_every_run_says_how_it_was_made(study: str):
    for path in RUNS:
        if path.parent.name != study:
            continue
        run = json.loads(path.read_text(encoding="utf-8"))
        assert tuple(run)[: len(HEAD)] == HEAD
        assert (run["study"], run["name"]) == (study, path.stem)
        assert len(run["commit"]) == 40, f"{path.name} was made by a tree that was not committed"
        assert run["command"].startswith("python -m benchmarks.studies.")


def test_runs_of_the_fourth_study_are_those_of_its_plan():
    from benchmarks.studies.learning_cases import all_cases
    from benchmarks.studies.records import Store

    store = Store("learning")
    planned = {case.name: case for case in all_cases(store)}
    for run in store:
        case = planned[run["name"]]
        assert (run["lr"], run["seed"]) == (case.lr, case.seed)
        assert run["split"] == ("validation" if case.tuning else "heldout")
        assert len(run["losses"]) == 200
        assert case.variant or run["trained"] <= 143_360 or case.method.startswith("full")


def test_names_of_cases_are_unique_and_shared_between_questions():
    from benchmarks.studies.learning_cases import Case, main_cases, tuning_cases, variant_cases

    names = [case.name for case in (*tuning_cases(), *main_cases({"lift": 3e-3}), *variant_cases())]
    shared = {Case("lift", 3e-3, seed).name for seed in (1, 2, 3)}  # the method itself, and what the variants vary
    assert len(names) - len(set(names)) == len(shared)


def test_the_best_rate_has_the_best_accuracy_then_the_lowest_loss(tmp_path: Path):
    from benchmarks.studies.learning_cases import RATES, chosen_rates, tuning_cases
    from benchmarks.studies.records import Store

    store = Store("learning", tmp_path)
    accuracies, losses = (0.2, 0.9, 0.9, *[0.1] * 5), (3.0, 0.5, 0.4, *[0.1] * 5)
    for i, (case, accuracy, loss) in enumerate(zip(tuning_cases(["lift"]), accuracies, losses, strict=True)):
        if i == 7:
            assert chosen_rates(store) == {}  # not before the grid is done
        store.save(case.name, "", 0, {"lr": case.lr, "accuracy": {"target": accuracy}, "loss": {"target": loss}})
    assert chosen_rates(store) == {"lift": RATES[2]}


def test_a_run_is_written_whole_or_not_at_all(tmp_path: Path):
    from benchmarks.studies.records import Store

    store = Store("some", tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save("one", "", 0, {"loss": math.nan})
    assert not store.has("one")
    assert list(store) == []
    store.save("one", "command", 3, {"loss": 1.0})
    assert [(run["loss"], run["seed"], run["command"]) for run in store] == [(1.0, 3, "command")]
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["one.json"]


def test_intervals_are_students():
    from benchmarks.studies.summary import interval, written

    # n = 5, mean 3, standard deviation sqrt(2.5): 2.776 * sqrt(2.5 / 5) = 1.963
    found = interval([1, 2, 3, 4, 5])
    assert (found.mean, found.half) == pytest.approx((3.0, 1.963), abs=1e-3)
    assert written(found, ".1f") == "3.0 ± 2.0"
    assert written(interval([0.5]), ".1f", percent=True) == "50.0%"
    assert written(interval([0.5, 0.5]), ".1f", percent=True) == "50.0 ± 0.0%"


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([(0.1, 0.9), (0.9, 0.5)], 0.525),  # 0.85 is 15/16 of the way
        ([(0.9, 0.5), (0.95, 0.1)], 0.5),
        ([(0.1, 0.9), (0.8, 0.5)], None),
        ([(0.2, 0.9), (0.9, 0.6), (0.1, 0.0)], 0.6 + 0.3 / 14),
    ],
)
def test_source_at_a_level_of_the_target(points: list[tuple[float, float]], kept: float | None):
    from benchmarks.studies.learning_results import source_at

    runs = [{"accuracy": {"target": target, "source": source}} for target, source in points]
    assert source_at(runs) == (None if kept is None else pytest.approx(kept))


def _tuned(store: Store, method: str, targets: Sequence[float]) -> None:
    from benchmarks.studies.learning_cases import tuning_cases

    for case, target in zip(tuning_cases([method]), targets, strict=True):
        store.save(case.name, "", 0, {"lr": case.lr, "accuracy": {"target": target}, "loss": {"target": 1.0}})


def test_a_level_is_bracketed_by_neighbours_of_the_grid(tmp_path: Path):
    from benchmarks.studies.learning_cases import RATES, brackets
    from benchmarks.studies.records import Store

    store = Store("learning", tmp_path)
    assert brackets(store) == {}
    _tuned(store, "lift", (0.1, 0.2, 0.3, 0.84, 0.86, 0.8, 0.9, 0.9))
    _tuned(store, "full", (0.85, 0.9, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1))
    _tuned(store, "lift-mlp", [0.5] * len(RATES))
    assert brackets(store) == {"full": RATES[:2], "lift": RATES[3:5]}
    assert brackets(store, 0.87) == {"full": RATES[:2], "lift": RATES[5:7]}


def test_every_seed_is_run_on_both_sides_of_a_level(tmp_path: Path):
    from benchmarks.studies.learning_cases import RATES, Case, bracket_cases
    from benchmarks.studies.records import Store

    def rates() -> tuple[float, ...]:
        return tuple(case.lr for case in bracket_cases(store, "lift", 1))

    def reach(lr: float, target: float) -> None:
        store.save(Case("lift", lr, 1).name, "", 1, {"accuracy": {"target": target}})

    store = Store("learning", tmp_path)
    assert rates() == ()
    _tuned(store, "lift", (0.1, 0.2, 0.3, 0.84, 0.86, 0.8, 0.9, 0.9))
    assert rates() == RATES[3:5]
    reach(RATES[4], 0.7)
    assert rates() == RATES[3:6]
    reach(RATES[5], 0.9)
    reach(RATES[3], 0.6)
    assert rates() == RATES[3:6]
    reach(RATES[3], 0.9)
    assert rates() == RATES[2:6]
    reach(RATES[2], 0.9)
    reach(RATES[1], 0.9)
    reach(RATES[0], 0.9)
    assert rates() == RATES[:6]  # there is no lower one


def test_shapes_are_those_of_the_bundled_model():
    from benchmarks.studies.bundled import MODEL, matrices
    from benchmarks.studies.learning_results import shape_of
    from lift_lightning.models import load_model

    found = {name: tuple(weight.shape) for name, weight in matrices(load_model(MODEL).model).items()}
    assert len(found) == 28
    assert {name: shape_of(name) for name in found} == found


def test_only_matrices_that_changed_count_for_the_update():
    from benchmarks.studies.learning_results import entries_changed
    from benchmarks.studies.update_results import update_figures

    changed = {"changed": 0.5, "rank": 64.0, "effective_rank": 32.0, "stable_rank": 4.0, "norm": 0.1}
    changed |= {"alignment": 0.9, "spectral_norm_before": 2.0, "spectral_norm_after": 3.0}
    still = dict.fromkeys(changed, 0.0) | {"alignment": 1.0, "spectral_norm_before": 1.0}
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "kq"]
    run = {"updates": dict(zip(names, (changed, still), strict=True))}
    assert entries_changed(run) == 0.5 * 128 * 256
    figures = update_figures(run)
    assert (figures["rank"], figures["effective_rank"]) == (0.5, 0.25)
    assert (figures["alignment"], figures["spectral_norm"]) == (0.9, 1.5)


def test_the_toy_targets_are_as_they_are_read():
    from benchmarks.studies.toy import Rows

    rows = Rows(3, torch.Generator().manual_seed(0))
    x = rows.x.double()
    first = [sum(x[i, j] for j in range(32)) + 0.1 * sum(math.sin(x[i, j]) for j in range(32, 64)) for i in range(3)]
    second = [0.2 * x[i, 64] * x[i, 65] * x[i, 66] + 0.1 * math.sin(x[i, 67] * x[i, 68]) for i in range(3)]
    torch.testing.assert_close(rows.pretraining().double(), torch.stack(first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.finetuning().double(), torch.stack(second), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_on_the_bundled_model_holds_what_the_studies_look_at():
    from benchmarks.studies.bundled import train

    run = train("lift-structured", 1e-3, 1, {"trainer.max_steps": 3, "lift.interval": 2})
    assert len(run["losses"]) == 3
    assert run["trained"] == 143_360
    assert [refresh["step"] for refresh in run["refreshes"]] == [1, 2]
    assert set(run["accuracy"]) == {"source", "bridge", "target"} == set(run["loss"])
    assert len(run["updates"]) == 28
    changed = [update["changed"] for update in run["updates"].values()]
    assert all(0 < share < 0.25 for share in changed)  # 10.9% of k_proj's entries at a time


def test_a_name_that_is_no_run_is_refused(capsys: pytest.CaptureFixture[str]):
    from benchmarks.studies import learning

    with pytest.raises(SystemExit, match="there is no run 'nothing'"):
        learning.main(["--only", "nothing"])


def test_pending_runs_wait_for_the_grid(monkeypatch: pytest.MonkeyPatch):
    from benchmarks.studies import learning
    from benchmarks.studies.learning_cases import METHODS, RATES

    nothing = SimpleNamespace(has=lambda name: False)
    assert len(learning.pending(nothing)) == len(METHODS) * len(RATES)
