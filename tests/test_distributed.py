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
    fit,
    foreign,
    other_work,
    validate,
    work,
)
from ranks import run_ranks
from tiny import save_tiny_llama, write_sums

GROUPS = {"ddp x 2": ("ddp", 2), "fsdp2 x 2": ("fsdp2", 2), "fsdp2 x 4": ("fsdp2", 4)}
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
            self._run(group, ranks, "train", calls)
        for group, (name, ranks) in GROUPS.items():
            resumed = {
                f"from {c}": {"name": name, "folder": None, "resume": self.file(c), **double} for c in CHECKPOINTS
            }
            own = folder / f"{group} float" / f"step={SAVED}.ckpt"
            resumed["float"] = {"name": name, "folder": None, "resume": own, "dtype": torch.float32, **self.inputs}
            self._run(group, ranks, "resume", resumed, prefix="resumed ")
        for c in CHECKPOINTS:
            self.of["single"][f"resumed from {c}"] = fit("single", 1, folder=None, resume=self.file(c), **double)

        for group in ("ddp x 2", "fsdp2 x 2"):
            name, ranks = GROUPS[group]
            self.everywhere[f"{group} other"] = run_ranks(
                other_work, ranks, folder / f"{group} other", name, self.inputs
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


@pytest.mark.parametrize("group", GROUPS)
def test_a_resume_under_the_same_strategy_has_the_same_bits(runs: Runs, group: str):
    whole, resumed = runs.of[group]["float"], runs.of[group]["resumed float"]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    for name, tensors in whole["state"]["parameters"].items():
        for key, vector in tensors.items():
            assert torch.equal(resumed["state"]["parameters"][name][key], vector), (name, key)


@pytest.mark.parametrize("group", ["fsdp2 x 2", "fsdp2 x 4"])
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


@pytest.mark.parametrize("group", ["ddp x 2", "fsdp2 x 2"])
def test_each_held_out_row_counts_once(runs: Runs, group: str):
    expected = validate("single", 1, **runs.inputs)
    for found in runs.everywhere[f"{group} other"]:
        assert found["val_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("group", ["ddp x 2", "fsdp2 x 2"])
def test_another_project_trains_as_in_one_process(runs: Runs, group: str):
    """Automatic optimization: under DDP its own reduction, under FSDP2 the hooks."""
    expected = foreign("single", 1)
    for found in runs.everywhere[f"{group} other"]:
        for name, weight in expected.items():
            torch.testing.assert_close(found["foreign"][name], weight, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("group", ["ddp x 2", "fsdp2 x 2"])
def test_an_error_on_one_rank_stops_all(runs: Runs, group: str):
    messages = [found["not finite"] for found in runs.everywhere[f"{group} other"]]
    assert all("DecompositionError" in m and "'2.weight'" in m and "NaN" in m for m in messages), messages
    assert sum("rank " in m for m in messages) == len(messages) - 1
