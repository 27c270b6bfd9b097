"""The same training on one process and on several: same masks, same weights, and every checkpoint resumes everywhere.

A run is 20 steps of two micro-batches with clipping, weight decay and two refreshes, on the same global batches. The
processes of a strategy are started twice: to train and save, and to resume from what all of them have saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import (
    INTERVAL,
    SAVED,
    STEPS,
    Dies,
    DiesWhileSaving,
    answers,
    fit,
    foreign,
    other_work,
    validate,
    work,
)
from ranks import run_ranks
from tiny import save_tiny_llama, write_sums

from lift_lightning.consolidate import consolidate
from lift_lightning.errors import CheckpointError

GROUPS = {"ddp x 2": ("ddp", 2), "fsdp1 x 2": ("fsdp1", 2), "fsdp2 x 2": ("fsdp2", 2), "fsdp2 x 4": ("fsdp2", 4)}
PAIRS = ["ddp x 2", "fsdp1 x 2", "fsdp2 x 2"]
FOLDERS = ["fsdp1 x 2", "fsdp2 x 2"]
CHECKPOINTS = ["single", *GROUPS]

pytestmark = pytest.mark.slow


class Runs:
    """All runs, made once; by group and name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = {
            # Wide enough that most matrices go to the subspace solver, whose bases a resume needs.
            "model": save_tiny_llama(folder / "model", hidden_size=144, intermediate_size=160),
            "rows": write_sums(folder / "rows.json", rows=101),
        }
        self.of: dict[str, dict[str, Any]] = {"single": {}}
        self.everywhere: dict[str, list[Any]] = {}
        double = {"dtype": torch.float64, **self.inputs}
        self.of["single"]["double"] = fit("single", 1, folder=self.saved("single"), **double)
        for group, (name, ranks) in GROUPS.items():
            calls = {
                "double": {"name": name, "folder": self.saved(group), **double},
                "float": {"name": name, "folder": folder / f"{group} float", "dtype": torch.float32, **self.inputs},
            }
            if group == "fsdp1 x 2":
                calls["Lightning's"] = {"name": "fsdp plain", "folder": self.saved("fsdp plain"), **double}
            if group in FOLDERS:
                calls["in parts"] = {"name": f"{name} folder", "folder": self.saved(f"{group} in parts"), **double}
            self._run(group, ranks, "train", calls)
        for group, (name, ranks) in GROUPS.items():
            resumed = {
                f"from {c}": {"name": name, "folder": None, "resume": self.file(c), **double} for c in CHECKPOINTS
            }
            own = folder / f"{group} float" / f"step={SAVED}.ckpt"
            resumed["float"] = {"name": name, "folder": None, "resume": own, "dtype": torch.float32, **self.inputs}
            if group in FOLDERS:
                parts = self.file(f"{group} in parts")
                resumed["from parts"] = {"name": name, "folder": None, "resume": parts, **double}
                file = consolidate(str(parts), str(folder / f"{group} consolidated.ckpt"))
                self.of["single"][f"resumed from parts of {group}"] = fit(
                    "single", 1, folder=None, resume=file, **double
                )
            if group == "fsdp1 x 2":
                resumed["Lightning's"] = {
                    "name": "fsdp plain",
                    "folder": None,
                    "resume": self.file("fsdp plain"),
                    **double,
                }
            self._run(group, ranks, "resume", resumed, prefix="resumed ")
        for c in CHECKPOINTS:
            self.of["single"][f"resumed from {c}"] = fit("single", 1, folder=None, resume=self.file(c), **double)

        for group in PAIRS:
            name, ranks = GROUPS[group]
            self.everywhere[f"{group} other"] = run_ranks(
                other_work, ranks, folder / f"{group} other", name, self.inputs, folder / f"{group} answers"
            )

    def saved(self, group: str) -> Path:
        return self.folder / f"{group} checkpoints"

    def file(self, group: str) -> Path:
        return self.saved(group) / f"step={SAVED}.ckpt"

    def _run(self, group: str, ranks: int, what: str, calls: dict[str, dict[str, Any]], prefix: str = "") -> None:
        found = run_ranks(work, ranks, self.folder / f"{group} {what}", list(calls.values()))
        for i, name in enumerate(calls):
            self.of.setdefault(group, {})[prefix + name] = found[0][i]
            self.everywhere[f"{group} {prefix}{name}"] = [mine[i] for mine in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("distributed"))


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, and the optimizer's state in global indices."""
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-9, msg=name)
    states = [run["state"]["parameters"] for run in (found, expected)]
    assert states[0].keys() == states[1].keys()
    for name, tensors in states[1].items():
        for key, vector in tensors.items():
            torch.testing.assert_close(states[0][name][key], vector, rtol=0, atol=1e-9, msg=f"{name} {key}")


@pytest.mark.parametrize("group", GROUPS)
def test_all_ranks_have_the_masks_of_one_process(runs: Runs, group: str):
    expected = runs.of["single"]["double"]["masks"]
    assert list(expected) == [1, INTERVAL, 2 * INTERVAL]
    found = runs.of[group]["double"]["masks"]
    for step, masks in expected.items():
        assert found[step].keys() == masks.keys()
        for name, indices in masks.items():
            assert torch.equal(found[step][name], indices), (step, name)


@pytest.mark.parametrize("group", GROUPS)
def test_training_ends_where_one_process_ends(runs: Runs, group: str):
    found, expected = runs.of[group]["double"], runs.of["single"]["double"]
    assert found["global_step"] == expected["global_step"] == STEPS
    assert found["steps"] == expected["steps"] == [1, INTERVAL, 2 * INTERVAL]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    assert found["overlap"] == expected["overlap"]
    assert found["solvers"] == expected["solvers"]
    assert all(set(solvers) == {"subspace", "exact"} for solvers in found["solvers"])
    assert_close(found, expected)


def test_the_fsdp_strategy_of_lightning_trains_and_resumes_too(runs: Runs):
    for run in ("Lightning's", "resumed Lightning's"):
        assert_close(runs.of["fsdp1 x 2"][run], runs.of["single"]["double"])


@pytest.mark.parametrize("group", GROUPS)
def test_unselected_entries_keep_their_bits(runs: Runs, group: str):
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(runs.inputs["model"], dtype=torch.float32)
    run = runs.of[group]["float"]
    ever = run["masks"]
    changed = 0
    for name, before in start.named_parameters():
        same = run["weights"][name].flatten() == before.detach().flatten()
        for masks in ever.values():
            if name in masks:
                changed += int((~same[masks[name]]).sum())
                same[masks[name]] = True
        assert bool(same.all()), name
    assert changed > 1000


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("group", ["single", *GROUPS])
def test_every_checkpoint_resumes_under_every_strategy(runs: Runs, group: str, checkpoint: str):
    resumed = runs.of[group][f"resumed from {checkpoint}"]
    assert resumed["steps"] == [2 * INTERVAL]  # mid-interval, and nothing was selected anew
    assert_close(resumed, runs.of["single"]["double"])


@pytest.mark.parametrize("group", FOLDERS)
def test_a_folder_resumes_and_becomes_one_file(runs: Runs, group: str):
    assert runs.file(f"{group} in parts").is_dir()
    for resumed in (runs.of[group]["resumed from parts"], runs.of["single"][f"resumed from parts of {group}"]):
        assert resumed["steps"] == [2 * INTERVAL]
        assert_close(resumed, runs.of["single"]["double"])


@pytest.mark.parametrize("group", GROUPS)
def test_a_resume_under_the_same_strategy_has_the_same_bits(runs: Runs, group: str):
    whole, resumed = runs.of[group]["float"], runs.of[group]["resumed float"]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    for name, tensors in whole["state"]["parameters"].items():
        for key, vector in tensors.items():
            assert torch.equal(resumed["state"]["parameters"][name][key], vector), (name, key)


@pytest.mark.parametrize("group", ["fsdp1 x 2", "fsdp2 x 2", "fsdp2 x 4"])
def test_the_shards_are_a_partition_of_the_state(runs: Runs, group: str):
    expected = runs.of["single"]["double"]["state"]["parameters"]
    ranks = runs.everywhere[f"{group} double"]
    for name, tensors in expected.items():
        assert sum(run["selected_here"][name] for run in ranks) == tensors["indices"].numel()
        assert torch.equal(ranks[0]["state"]["parameters"][name]["indices"].long(), tensors["indices"].long())
    assert all(not run["state"]["parameters"] for run in ranks[1:])  # only the first writes
    here = [sum(run["selected_here"].values()) for run in ranks]
    assert ranks[0]["imbalance"][-1] == pytest.approx(max(here) / (sum(here) / len(here)))
    assert all(run["imbalance"] == ranks[0]["imbalance"] for run in ranks)


def test_ddp_sends_the_selected_entries_only(runs: Runs):
    run = runs.of["ddp x 2"]["float"]
    selected = sum(run["selected_here"].values())
    assert run["sent_bytes"] == 4 * selected
    names = run["state"]["parameters"]
    dense = sum(4 * run["weights"][name].numel() for name in names)
    share = selected / sum(run["weights"][name].numel() for name in names)
    assert run["sent_bytes"] / dense == pytest.approx(share)  # 5% of the entries are 5% of the traffic


@pytest.mark.parametrize("group", PAIRS)
def test_each_held_out_row_counts_once(runs: Runs, group: str):
    expected = validate("single", 1, **runs.inputs)
    for found in runs.everywhere[f"{group} other"]:
        assert found["val_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("group", ["ddp x 2", "fsdp2 x 2"])
def test_each_sample_is_answered_once_in_the_order_of_the_file(runs: Runs, group: str, tmp_path: Path):
    metrics, predictions = answers("single", 1, **runs.inputs, folder=tmp_path)
    assert predictions.count("\n") == 5
    for found in runs.everywhere[f"{group} other"]:
        assert found["answers"] == (metrics, predictions)


@pytest.mark.parametrize("group", PAIRS)
def test_another_project_trains_as_in_one_process(runs: Runs, group: str):
    """Automatic optimization: the reduction of DDP or FSDP1, which wraps all of the module, or the hooks of FSDP2."""
    found = runs.everywhere[f"{group} other"][0]["foreign"]
    for name, weight in foreign("single", 1).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-6, msg=name)


def test_fsdp1_may_not_wrap_a_module_that_optimizes_manually(runs: Runs):
    for found in runs.everywhere["fsdp1 x 2 other"]:
        assert "FSDP1Strategy has wrapped all of ManualRegression, which optimizes manually" in found["refused"]
        assert "configs/strategies/fsdp2.yaml" in found["refused"]


@pytest.mark.parametrize("group", PAIRS)
def test_an_error_on_one_rank_stops_all(runs: Runs, group: str):
    messages = [found["not finite"] for found in runs.everywhere[f"{group} other"]]
    assert all("DecompositionError" in m and "'2.weight'" in m and "NaN" in m for m in messages), messages
    assert sum("rank " in m for m in messages) == len(messages) - 1


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2"])
def test_a_rank_that_is_killed_leaves_a_checkpoint_to_go_on_from(runs: Runs, name: str, tmp_path: Path):
    """SIGKILL in the middle of the second interval: the run goes on from the newest checkpoint."""
    call = {"name": name, "folder": tmp_path, "dtype": torch.float64, **runs.inputs}
    with pytest.raises(AssertionError):
        run_ranks(work, 2, tmp_path / "killed", [{**call, "callback": Dies(rank=1, step=15)}])
    # The second is that of the end of the epoch.
    newest = tmp_path / f"step={SAVED + 1}.ckpt"
    assert sorted(tmp_path.glob("*.ckpt")) == [tmp_path / f"step={SAVED}.ckpt", newest]
    assert not list(tmp_path.glob("*.partial"))
    resumed = fit("single", 1, folder=None, dtype=torch.float64, resume=newest, **runs.inputs)
    assert_close(resumed, runs.of["single"]["double"])


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 folder"])
def test_a_rank_that_is_killed_while_it_saves(runs: Runs, name: str, tmp_path: Path):
    """A file is not there at all; a folder is refused by name; the checkpoint before is as good as ever."""
    call = {"name": name, "folder": tmp_path, "dtype": torch.float64, **runs.inputs}
    with pytest.raises(AssertionError):
        run_ranks(work, 2, tmp_path / "killed", [{**call, "callback": DiesWhileSaving()}])
    before, half = tmp_path / f"step={SAVED}.ckpt", tmp_path / f"step={STEPS}.ckpt"
    again = {**call, "folder": None}
    if name == "fsdp2":
        assert not half.exists()
    else:
        message = "step=20.ckpt' has no meta.pt: it was not written to its end"
        with pytest.raises(CheckpointError, match=message):
            consolidate(str(half), str(tmp_path / "file"))
        with pytest.raises(AssertionError, match=f"CheckpointError: .*{message}"):
            run_ranks(work, 2, tmp_path / "half", [{**again, "resume": half}])
    (found, _) = run_ranks(work, 2, tmp_path / "resumed", [{**again, "resume": before}])
    assert_close(found[0], runs.of["single"]["double"])
