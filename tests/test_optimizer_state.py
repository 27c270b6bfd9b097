"""The state of SparseAdamW: saved by name, resumed to the same bits; its groups and arguments.

Guards: `Optimizer.load_state_dict` casts state to the weight's dtype, so that with bfloat16 weights the indices
[1, 257, 89999] come back as [1, 256, 90112].
"""

from __future__ import annotations

import copy

import pytest
import torch
from networks import (
    HYPER,
    SPARSE,
    assert_same_bits,
    give,
    loss_of,
    network,
    optimizer_of,
    saved_and_loaded,
    select_at_random,
    snapshot,
    sole,
    train,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import get_scheduler

from lift_lightning import SparseAdamW
from lift_lightning import indices as layout

# -------------------------------------------------------------------- invariant 5: state and resuming


def test_the_dtype_trap():
    """Through torch's own load_state_dict these indices would come back as [1, 256, 90112] with bfloat16 weights."""
    start = torch.zeros(300, 400, dtype=torch.bfloat16)
    parameter, optimizer = sole(start, [1, 257, 89999])
    assert torch.tensor([1, 257, 89999]).bfloat16().long().tolist() == [1, 256, 90112]
    optimizer.state[parameter]["step"].fill_(257.0)
    give(parameter, 1.0)
    optimizer.step()
    fresh, loaded = sole(parameter.detach())
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.indices(fresh).tolist() == [1, 257, 89999]
    assert loaded.indices(fresh).dtype == torch.int32
    assert loaded.state[fresh]["step"].item() == 258.0
    state = loaded._sparse[fresh]
    assert {state.exp_avg.dtype, state.exp_avg_sq.dtype, state.master.dtype} == {torch.float32}
    for key in ("exp_avg", "exp_avg_sq", "master"):
        assert torch.equal(getattr(state, key), getattr(optimizer._sparse[parameter], key))


@pytest.mark.parametrize("way", ["in memory", "file"])
@pytest.mark.parametrize("pending", [False, True], ids=["between steps", "between micro-batches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_mid_interval_is_bit_equal(dtype: torch.dtype, pending: bool, way: str):
    """Refreshed at steps 0 and 4, saved after step 2, also with one of two micro-batches done, and run to step 8."""

    def run(model: nn.Module, optimizer: SparseAdamW, first: int, *, half_done: bool = False) -> None:
        for step in range(first, 8):
            if step == 4:
                select_at_random(optimizer, 0.4, seed=4)
            if not half_done:
                optimizer.zero_grad()
                loss_of(model, step).backward()
            half_done = False
            loss_of(model, step + 100).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()

    model = network(dtype)
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.2, seed=0)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    if pending:
        loss_of(model, 3).backward()
    state = optimizer.state_dict()
    state = saved_and_loaded(state) if way == "file" else copy.deepcopy(state)
    resumed_model = copy.deepcopy(model)
    run(model, optimizer, 3, half_done=pending)

    resumed = optimizer_of(resumed_model, lr=123.0)
    resumed.load_state_dict(state)
    assert resumed.attempted_steps == 3
    run(resumed_model, resumed, 3, half_done=pending)
    assert_same_bits(snapshot(model), snapshot(resumed_model))
    assert resumed.attempted_steps == optimizer.attempted_steps == 8
    for mine, theirs in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert_same_bits(optimizer.state[mine], resumed.state[theirs])


def test_loading_over_a_selection_that_was_there():
    """Nothing of the old selection's moments is left."""
    model = network(torch.bfloat16)
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.3, seed=0)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.sparse_state_dict())
    weights = copy.deepcopy(model.state_dict())
    select_at_random(optimizer, 0.5, seed=1)
    train(model, optimizer, range(3, 6))
    model.load_state_dict(weights)
    optimizer.load_sparse_state_dict(saved)
    optimizer.zero_grad()
    now = optimizer.sparse_state_dict()
    for name in SPARSE:
        assert_same_bits(now["parameters"][name], saved["parameters"][name])


def test_a_loaded_gradient_is_a_copy():
    """The next backward adds to gradients in place: the dictionary that was loaded must not change with them."""
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.3, seed=0)
    loss_of(model, 0).backward()
    state = optimizer.state_dict()
    kept = copy.deepcopy(state["sparse"])
    other = network()
    resumed = optimizer_of(other)
    resumed.load_state_dict(state)
    loss_of(other, 1).backward()
    assert_same_bits(state["sparse"]["dense_grads"], kept["dense_grads"])
    for name in SPARSE:
        assert_same_bits(state["sparse"]["parameters"][name], kept["parameters"][name])


def test_keys_of_the_state_are_pinned():
    """Made eagerly and alike on every rank; the part of torch's state holds no vector of length K."""
    model = network(torch.bfloat16)
    optimizer = optimizer_of(model)
    assert {key for p in (model[0].weight, model[2].weight) for key in optimizer.state[p]} == {"step"}
    assert optimizer.state[model[4].bias].keys() == {"step", "exp_avg", "exp_avg_sq"}
    select_at_random(optimizer, 0.2, seed=0)
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups", "sparse"}
    assert state["sparse"].keys() == {"attempted_steps", "skipped_steps", "parameters", "dense_grads", "dense_moments"}
    assert state["sparse"]["dense_moments"] == {}
    assert state["sparse"]["parameters"].keys() == set(SPARSE)
    assert state["sparse"]["parameters"]["0.weight"].keys() == {"indices", "exp_avg", "exp_avg_sq", "master"}
    assert state["sparse"]["dense_grads"] == {}
    loss_of(model, 0).backward()
    state = optimizer.sparse_state_dict()
    assert "grad" in state["parameters"]["0.weight"]
    assert state["dense_grads"].keys() == {"4.weight", "4.bias"}


def test_thin_state_dict_leaves_the_sparse_part_to_its_callback():
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.2, seed=0)
    train(model, optimizer, range(2))
    optimizer.thin_state_dict = True
    thin = saved_and_loaded(optimizer.state_dict())
    assert thin.keys() == {"state", "param_groups"}
    assert max(t.numel() for s in thin["state"].values() for t in s.values()) == 30  # of the dense head
    resumed = optimizer_of(copy.deepcopy(model))
    resumed.load_state_dict(thin)
    assert not resumed.has_selection()
    resumed.load_sparse_state_dict(optimizer.sparse_state_dict())
    assert resumed.has_selection()
    assert resumed.attempted_steps == 2


def test_a_state_without_a_selection():
    optimizer = optimizer_of(network())
    resumed = optimizer_of(network())
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert not resumed.has_selection()


def test_the_skipped_steps_are_saved():
    parameter, optimizer = sole(torch.zeros(3), [0])
    give(parameter, float("nan"))
    optimizer.step()
    fresh, resumed = sole(torch.zeros(3))
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert (resumed.skipped_steps.item(), resumed.attempted_steps) == (1, 1)
    assert resumed.state[fresh]["step"] == 0


def test_names_that_differ_are_refused():
    _, optimizer = sole(torch.zeros(3), [0])
    other = SparseAdamW([{"params": [("v", nn.Parameter(torch.zeros(3)))], "sparse": True}])
    message = r"for 1 parameters, this optimizer has 1: only in the checkpoint \['w'\], only here \['v'\]; resume with"
    with pytest.raises(ValueError, match=message):
        other.load_sparse_state_dict(optimizer.sparse_state_dict())


def test_sizes_that_differ_are_refused():
    _, optimizer = sole(torch.zeros(9), [0, 8])
    _, smaller = sole(torch.zeros(4))
    with pytest.raises(ValueError, match="w: indices from 0 to 8 do not lie in the 4 entries"):
        smaller.load_sparse_state_dict(optimizer.sparse_state_dict())


@pytest.mark.parametrize("entries", [1, 3])
def test_vectors_of_another_length_than_their_indices_are_refused(entries: int):
    """One entry would be broadcast over all of them."""
    parameter, optimizer = sole(torch.zeros(9), [0, 8])
    state = optimizer.sparse_state_dict()
    state["parameters"]["w"]["exp_avg"] = torch.ones(entries)
    with pytest.raises(ValueError, match=f"w: 2 indices, but {entries} of exp_avg"):
        optimizer.load_sparse_state_dict(state)


def test_state_dtype_of_the_moments():
    """m = bfloat16((1 - 0.9) * 0.3), then bfloat16(0.9 * m + 0.1 * 0.3): computed in float32, kept in bfloat16."""
    parameter, optimizer = sole(torch.zeros(4), [1, 3], state_dtype="bfloat16")
    m = v = torch.zeros(2, dtype=torch.bfloat16)
    for _ in range(3):
        optimizer.zero_grad()
        give(parameter, 0.3)
        optimizer.step()
        m = (0.9 * m.float() + 0.1 * 0.3).bfloat16()
        v = (0.95 * v.float() + 0.05 * 0.3**2).bfloat16()
        state = optimizer._sparse[parameter]
        assert torch.equal(state.exp_avg, m)
        assert torch.equal(state.exp_avg_sq, v)
    fresh, resumed = sole(parameter.detach(), state_dtype=torch.bfloat16)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert torch.equal(resumed._sparse[fresh].exp_avg, m)
    optimizer.set_indices(parameter, torch.tensor([0, 3]))
    assert optimizer._sparse[parameter].exp_avg.dtype == torch.bfloat16


def test_a_skipped_step_leaves_narrow_moments():
    parameter, optimizer = sole(torch.zeros(4), [1, 3], state_dtype="bfloat16")
    give(parameter, 0.3)
    optimizer.step()
    before = optimizer._sparse[parameter].exp_avg.clone()
    optimizer.zero_grad()
    give(parameter, float("inf"))
    optimizer.step()
    assert torch.equal(optimizer._sparse[parameter].exp_avg, before)


def test_bytes_of_the_state():
    """32-bit index, two moments and a gradient: 16 bytes an entry; a master 4 more; dense AdamW 8."""
    model = network()
    optimizer = optimizer_of(model)
    assert optimizer.state_bytes() == 33 * 8
    optimizer.set_indices(model[0].weight, torch.arange(10))
    optimizer.set_indices(model[2].weight, torch.arange(7))
    assert optimizer.state_bytes() == 33 * 8 + 17 * 16
    _, narrow = sole(torch.zeros(9, dtype=torch.bfloat16), [1, 2])
    assert narrow.state_bytes() == 2 * 20
    _, thin = sole(torch.zeros(9), [1, 2], state_dtype="bfloat16")
    assert thin.state_bytes() == 2 * 12


@pytest.mark.parametrize(("numel", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_width_of_the_indices(numel: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout, "check_indices", lambda *_: None)  # it reads values, which fake tensors have none of
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(numel))
        optimizer = SparseAdamW([{"params": [("w", parameter)], "sparse": True}])
        optimizer.set_indices(parameter, torch.arange(5))
        assert optimizer.indices(parameter).dtype == dtype


# -------------------------------------------------------------------- schedules, groups, arguments


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_schedules_of_transformers_drive_it(name: str):
    model, twin = network(), network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 1.0, seed=0)
    reference = torch.optim.AdamW(twin.parameters(), **HYPER, fused=True)
    schedules = [get_scheduler(name, o, num_warmup_steps=3, num_training_steps=10) for o in (optimizer, reference)]
    rates = []
    for step in range(10):
        train(model, optimizer, range(step, step + 1))
        train(twin, reference, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == reference.param_groups[0]["lr"] == rates[-1]
    assert_same_bits(snapshot(model), snapshot(twin))
    if name == "linear":
        assert rates[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 6e-2 / 7])
        assert rates[-1] == 0.0


def test_lr_as_a_tensor():
    model, twin = network(), network()
    optimizer, reference = optimizer_of(model, lr=torch.tensor(1e-2)), optimizer_of(twin)
    for opt in (optimizer, reference):
        select_at_random(opt, 0.3, seed=0)
    train(model, optimizer, range(3))
    train(twin, reference, range(3))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)


def test_a_group_that_is_added_later():
    """Sparse or dense, it works like one that was there from the start, its steps counted from then on."""
    first = nn.Parameter(torch.zeros(4))
    optimizer = SparseAdamW([{"params": [("a", first)], "sparse": True}], lr=1e-2)
    optimizer.set_indices(first, torch.tensor([0]))
    give(first, 1.0)
    optimizer.step()
    sparse, dense = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [("b", sparse)], "sparse": True, "lr": 1e-3})
    optimizer.add_param_group({"params": [("c", dense)]})
    assert [(n, g["lr"]) for n, _, g in optimizer.sparse_parameters()] == [("a", 1e-2), ("b", 1e-3)]
    assert not optimizer.has_selection()
    optimizer.set_indices(sparse, torch.tensor([2]))
    optimizer.zero_grad()
    (sparse.sum() + dense.sum()).backward()
    assert sparse.grad is None
    optimizer.step()
    torch.testing.assert_close(sparse.detach(), torch.tensor([0.0, 0.0, -1e-3, 0.0]))
    torch.testing.assert_close(dense.detach(), torch.tensor([-1e-2, -1e-2]))
    assert [optimizer.state[p]["step"].item() for p in (first, sparse, dense)] == [1.0, 1.0, 1.0]


def test_parameters_without_names_get_one():
    groups = [{"params": [nn.Parameter(torch.zeros(3))]}, {"params": [nn.Parameter(torch.zeros(3))], "sparse": True}]
    optimizer = SparseAdamW(groups)
    assert [name for name, _, _ in optimizer.sparse_parameters()] == ["1.0"]


def test_bare_parameters_are_trained_densely():
    model, twin = network(), network()
    train(model, SparseAdamW(model.parameters(), **HYPER), range(3))
    train(twin, torch.optim.AdamW(twin.parameters(), **HYPER, fused=True), range(3))
    assert_same_bits(snapshot(model), snapshot(twin))


def test_two_parameters_of_one_name_are_refused():
    """Checkpoints go by name: the second would overwrite the first in silence."""
    groups = [{"params": [("w", nn.Parameter(torch.zeros(3)))], "sparse": True} for _ in range(2)]
    with pytest.raises(ValueError, match="two parameters are called 'w': checkpoints go by name"):
        SparseAdamW(groups)


def test_a_weight_that_is_not_contiguous_is_refused_before_anything_happens():
    with pytest.raises(ValueError, match=r"shape \(3, 2\) with strides \(1, 3\) is not contiguous; replace"):
        SparseAdamW([{"params": [("w", nn.Parameter(torch.zeros(2, 3).T))], "sparse": True}])


def test_set_indices_takes_any_integer_dtype():
    parameter, optimizer = sole(torch.zeros(300))
    for dtype in (torch.int16, torch.int32, torch.int64):
        optimizer.set_indices(parameter, torch.tensor([1, 257], dtype=dtype))
        assert optimizer.indices(parameter).tolist() == [1, 257]
        assert optimizer.indices(parameter).dtype == torch.int32


def test_set_indices_refuses():
    parameter, optimizer = sole(torch.zeros(3), [1])
    with pytest.raises(ValueError, match="is in no sparse group of this optimizer"):
        optimizer.set_indices(nn.Parameter(torch.zeros(3)), torch.tensor([0]))
    for indices, message in (
        ([0, 3], "w: indices from 0 to 3 do not lie in the 3 entries"),
        ([1, 0], "w: indices must be ascending"),
        ([0.5], "w: indices must be a vector of integers"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.set_indices(parameter, torch.tensor(indices))
    assert optimizer.indices(parameter).tolist() == [1]  # as before
    dense = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [("d", dense)]})
    with pytest.raises(ValueError, match="is in no sparse group"):
        optimizer.set_indices(dense, torch.tensor([0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-4}, "lr must be at least 0, got -0.0001"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers of at least 0 and below 1, got \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, "betas must be two numbers"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"state_dtype": torch.int32}, "state_dtype must be a floating dtype or '8bit', got torch.int32"),
        ({"state_dtype": "int8"}, "state_dtype must be a floating dtype or '8bit', got int8"),
        ({"state_dtype": "bf16"}, "state_dtype must be a floating dtype or '8bit', got bf16"),
        ({"state_dtype": "nn"}, "state_dtype must be a floating dtype or '8bit', got nn"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SparseAdamW([nn.Parameter(torch.zeros(2))], **settings)


def test_an_optimizer_is_not_copied_without_its_selection():
    """Torch's own copy keeps groups and state only: it would raise at its first use, or train nothing."""
    optimizer = SparseAdamW([{"params": [nn.Parameter(torch.ones(2, 2))], "sparse": True}])
    with pytest.raises(TypeError, match="load_state_dict into it"):
        copy.deepcopy(optimizer)
