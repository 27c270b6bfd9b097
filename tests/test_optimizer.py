"""SparseAdamW is a masked dense AdamW, step by step, and waits for the device at no point of a step.

Guards: bfloat16 weights lose every update smaller than half a unit; a `.item()` in the step makes the host wait.
"""

from __future__ import annotations

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
    random_indices,
    select_at_random,
    snapshot,
    sole,
    train,
)
from oracles import MaskedAdamW
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lift_lightning import SparseAdamW, eight_bit, functional
from lift_lightning import indices as layout
from lift_lightning import optimizer as optimizer_module

# -------------------------------------------------------------------- invariant 1: the masked dense oracle


@pytest.mark.parametrize("release", [True, False], ids=["hooks", "dense gradients"])
@pytest.mark.parametrize("max_norm", [None, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-12)])
def test_equals_the_masked_dense_oracle(dtype: torch.dtype, tolerance: float, max_norm: float | None, release: bool):
    """14 steps, refreshed before steps 1, 5 and 9 with a growing and then a shrinking K; 3 micro-batches a step, but
    every 4th step, the end of an epoch of 10 of them, has one. Oracle and optimizer each follow their own weights."""
    model, twin = network(dtype), network(dtype)
    optimizer = optimizer_of(model, release_gradients=release)
    oracle = MaskedAdamW(dict(twin.named_parameters()), **HYPER, max_norm=max_norm)
    shares = {1: 0.2, 5: 0.4, 9: 0.1}
    clipped = batches = 0
    for step in range(1, 15):
        if step in shares:
            for name, indices in select_at_random(optimizer, shares[step], seed=step).items():
                oracle.set_mask(name, indices)
        micro_batches = 1 if step % 4 == 0 else 3
        twin.load_state_dict(oracle.weights)
        optimizer.zero_grad()
        twin.zero_grad()
        for number in range(batches, batches + micro_batches):
            loss_of(model, number).backward()
            loss_of(twin, number).backward()
        batches += micro_batches
        optimizer.scale_grads_(1 / micro_batches)
        norm = optimizer.clip_grad_norm_(max_norm or float("inf"))
        optimizer.step()
        oracle.step({name: p.grad / micro_batches for name, p in twin.named_parameters()})
        clipped += max_norm is not None and float(norm) > max_norm
        torch.testing.assert_close(norm, oracle.norm, rtol=10 * tolerance, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), oracle.weights[name], rtol=0, atol=tolerance)
        for name, parameter, _ in optimizer.sparse_parameters():
            state = optimizer._sparse[parameter]
            assert state.indices.numel() == int(oracle.masks[name].sum())
            for key in ("exp_avg", "exp_avg_sq"):
                dense = getattr(oracle, key)[name].view(-1)
                kept = dense[state.indices.long()]
                torch.testing.assert_close(getattr(state, key), kept, rtol=0, atol=20 * tolerance)
    assert batches == 14 * 3 - 3 * 2  # steps 4, 8, 12 had one
    if max_norm:
        assert clipped > 0  # otherwise clipping was not tested


def test_oracle_test_can_fail():
    """The tolerance is tight enough to see one forgotten moment of 24 in the sum: a moment carried one place off."""
    model, twin = network(), network()
    optimizer = optimizer_of(model)
    oracle = MaskedAdamW(dict(twin.named_parameters()), **HYPER)
    for name, indices in select_at_random(optimizer, 0.2, seed=1).items():
        oracle.set_mask(name, indices)
    for step in range(2):
        twin.load_state_dict(oracle.weights)
        optimizer.zero_grad()
        twin.zero_grad()
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        optimizer.step()
        oracle.step({name: p.grad for name, p in twin.named_parameters()})
        state = optimizer._sparse[model[2].weight]
        state.exp_avg[3] = 0.0
    assert (model[2].weight - oracle.weights["2.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_equal_the_oracle_on_masters(dtype: torch.dtype):
    """float32 masters of the selected entries: the weight is the master rounded, across refreshes too."""
    torch.manual_seed(0)
    start = torch.randn(20, 30).to(dtype)
    parameter, optimizer = sole(start, betas=(0.9, 0.95), weight_decay=0.1)
    oracle = MaskedAdamW({"w": start}, **HYPER, masters=torch.float32)
    for step in range(1, 13):
        if step in (1, 5, 9):
            indices = random_indices(600, {1: 100, 5: 300, 9: 60}[step], step)
            optimizer.set_indices(parameter, indices)
            oracle.set_mask("w", indices)
        optimizer.zero_grad()
        gradients = [torch.randn(20, 30).to(dtype) for _ in range(2)]
        for gradient in gradients:
            give(parameter, gradient)
        optimizer.step()
        oracle.step({"w": gradients[0].float() + gradients[1].float()})  # summed in float32, not in the narrow dtype
        at = indices.long()
        master = optimizer._sparse[parameter].master
        torch.testing.assert_close(master, oracle.masters["w"].view(-1)[at], rtol=0, atol=1e-6)
        assert torch.equal(parameter.detach().view(-1)[at], master.to(dtype))
        others = torch.ones(600, dtype=torch.bool)
        others[at] = False
        # Dropped entries stay where they were left; the oracle's masters may round differently by one unit.
        difference = (parameter.detach().float() - oracle.weights["w"].float()).abs()
        assert (difference <= 2.0**-7 * oracle.weights["w"].float().abs()).all()
        assert int((difference > 0).sum()) <= 3


# -------------------------------------------------------------------- invariant 2: full density


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_density_is_torchs_adamw_to_the_last_bit(dtype: torch.dtype, clip: bool):
    model, twin = network(dtype), network(dtype)
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 1.0, seed=0)
    reference = torch.optim.AdamW(twin.parameters(), **HYPER, fused=True)
    for step in range(12):
        if step == 6:
            select_at_random(optimizer, 1.0, seed=6)  # a refresh that changes nothing
        for net, opt in ((model, optimizer), (twin, reference)):
            opt.zero_grad()
            loss_of(net, step).backward()
            loss_of(net, step + 50).backward()
        if clip:
            mine = optimizer.clip_grad_norm_(1.0)
            theirs = torch.nn.utils.clip_grad_norm_([p for _, p in in_order(twin)], 1.0)
            assert torch.equal(mine, theirs)
        optimizer.step()
        reference.step()
        assert_same_bits(snapshot(model), snapshot(twin))


def in_order(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Sparse parameters first, as in the optimizer's groups."""
    return sorted(model.named_parameters(), key=lambda pair: pair[0] not in SPARSE)


def test_dense_groups_are_torchs_adamw():
    model, twin = network(), network()
    optimizer = SparseAdamW([{"params": list(model.named_parameters())}], **HYPER)
    reference = torch.optim.AdamW(twin.parameters(), **HYPER, fused=True)
    train(model, optimizer, range(8))
    train(twin, reference, range(8))
    assert_same_bits(snapshot(model), snapshot(twin))
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}


def test_groups_have_their_own_settings():
    """lr of one group 0, of the other 1e-2; weight decay of the second alone, on an entry without a gradient."""
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    groups = [
        {"params": [("a", first)], "sparse": True, "lr": 0.0},
        {"params": [("b", second)], "sparse": True, "weight_decay": 0.5},
    ]
    optimizer = SparseAdamW(groups, lr=1e-2)
    for parameter in (first, second):
        optimizer.set_indices(parameter, torch.tensor([0, 1]))
    (first.sum() + second[0] + 0 * second[1]).backward()
    optimizer.step()
    assert first.tolist() == [1.0] * 4
    # 1 - lr * 0.5 = 0.995, and the first step of Adam is lr: 0.985; without a gradient 0.995; the others untouched.
    torch.testing.assert_close(second.detach(), torch.tensor([0.985, 0.995, 1.0, 1.0]), rtol=0, atol=1e-6)


# -------------------------------------------------------------------- invariant 3: the other entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_entries_that_are_not_selected_keep_their_bits(dtype: torch.dtype):
    """40 steps with weight decay and three refreshes: what no mask ever held is the same, all that one held moved."""
    model = network(dtype)
    before = snapshot(model)
    optimizer = optimizer_of(model, weight_decay=0.5)
    ever = {name: torch.zeros(before[name].numel(), dtype=torch.bool) for name in SPARSE}
    for step in range(40):
        if step % 14 == 0:
            for name, indices in select_at_random(optimizer, 0.15, seed=step).items():
                ever[name][indices] = True
        train(model, optimizer, range(step, step + 1))
    for name in SPARSE:
        old, new = before[name].view(-1), dict(model.named_parameters())[name].detach().view(-1)
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert 0 < int(ever[name].sum()) < old.numel() // 2
        assert torch.equal(new[~ever[name]].view(words), old[~ever[name]].view(words))
        assert (new[ever[name]] != old[ever[name]]).all()


def test_a_dropped_entry_stays_where_it_was_and_starts_anew():
    """Entry 0 is selected, dropped and selected again: its moments are those of a new entry (Algorithm 1)."""
    parameter, optimizer = sole(torch.zeros(3), [0, 1])
    give(parameter, torch.tensor([1.0, 2.0, 3.0]))
    optimizer.step()
    left_at = parameter.detach()[0].clone()
    optimizer.set_indices(parameter, torch.tensor([1, 2]))
    state = optimizer._sparse[parameter]
    torch.testing.assert_close(state.exp_avg, torch.tensor([0.2, 0.0]))  # (1 - 0.9) * 2, and new
    torch.testing.assert_close(state.exp_avg_sq, torch.tensor([0.2, 0.0]))  # (1 - 0.95) * 4
    optimizer.zero_grad()
    give(parameter, 1.0)
    optimizer.step()
    assert torch.equal(parameter.detach()[0], left_at)
    optimizer.set_indices(parameter, torch.tensor([0, 1]))
    assert optimizer._sparse[parameter].exp_avg[0] == 0
    assert optimizer.state[parameter]["step"] == 2


@pytest.mark.parametrize(("beta2", "factor"), [(0.95, 0.4472), (0.999, 3.1623)])
def test_first_update_of_a_late_entry(beta2: float, factor: float):
    """Bias correction counts the parameter's steps: (1 - 0.9) / sqrt(1 - beta2) times lr when t is large."""
    parameter, optimizer = sole(torch.zeros(4), [2], lr=1e-3, betas=(0.9, beta2))
    optimizer.state[parameter]["step"].fill_(1e6)
    give(parameter, 5.0)
    optimizer.step()
    assert parameter[2].item() == pytest.approx(-1e-3 * factor, rel=1e-3)


# -------------------------------------------------------------------- steps that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["0.weight", "4.bias"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(where: str, bad: float, clip: bool):
    """In a sparse gradient alone, or in a dense one alone, it stops all groups; the next step is as if it never was."""
    model, twin = network(torch.bfloat16), network(torch.bfloat16)
    optimizer, reference = optimizer_of(model), optimizer_of(twin)
    for opt in (optimizer, reference):
        select_at_random(opt, 0.3, seed=0)
    train(model, optimizer, range(2))
    train(twin, reference, range(2))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    gradients = dict(zip([*SPARSE, "4.weight", "4.bias"], optimizer.gradients(), strict=True))
    gradients[where][1] = bad
    if clip:
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.attempted_steps == 3
    assert_same_bits(snapshot(model), snapshot(twin))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[mine].keys() == reference.state[theirs].keys()
        assert_same_bits(optimizer.state[mine], reference.state[theirs])
        if mine in optimizer._sparse:
            for key in ("exp_avg", "exp_avg_sq", "master"):
                old, new = (getattr(o._sparse[p], key) for o, p in ((reference, theirs), (optimizer, mine)))
                assert torch.equal(old, new)
    train(model, optimizer, range(3, 6))
    train(twin, reference, range(3, 6))
    assert_same_bits(snapshot(model), snapshot(twin))
    assert optimizer.skipped_steps.item() == 1
    assert (optimizer.attempted_steps, reference.attempted_steps) == (6, 5)


def test_what_is_not_finite_outside_the_selection_does_no_harm():
    parameter, optimizer = sole(torch.zeros(3), [0])
    give(parameter, torch.tensor([1.0, float("nan"), float("inf")]))
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert parameter[0] != 0
    assert parameter[1:].tolist() == [0.0, 0.0]


# -------------------------------------------------------------------- bfloat16 and masters


@pytest.mark.parametrize(("masters", "moves"), [(None, True), (True, True), (False, False)])
def test_small_updates_are_not_lost(masters: bool | None, moves: bool):
    """100 updates of about 1e-4 at 1.0. Half a unit of bfloat16 below 1 is 2^-9 = 0.00195, so each alone is lost."""
    parameter, optimizer = sole(torch.ones(4, dtype=torch.bfloat16), [1, 2], lr=1e-4, master_weights=masters)
    for _ in range(100):
        optimizer.zero_grad()
        give(parameter, 1.0)
        optimizer.step()
    expected = torch.tensor(1 - 100 * 1e-4).bfloat16().item() if moves else 1.0
    assert expected == (0.98828125 if moves else 1.0)
    assert parameter.tolist() == [1.0, expected, expected, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_have_no_masters(dtype: torch.dtype):
    for wanted in (None, True):
        parameter, optimizer = sole(torch.ones(4, dtype=dtype), [1], master_weights=wanted)
        assert optimizer._sparse[parameter].master is None


def test_what_something_else_writes_wins_over_the_master():
    parameter, optimizer = sole(torch.ones(4, dtype=torch.bfloat16), [1, 2], lr=1e-4)
    give(parameter, 1.0)
    optimizer.step()
    master = optimizer._sparse[parameter].master.clone()
    torch.testing.assert_close(master, torch.full((2,), 0.9999), rtol=0, atol=1e-6)
    with torch.no_grad():
        parameter[1] = 3.0
    optimizer.zero_grad()
    give(parameter, 1.0)
    optimizer.step()
    torch.testing.assert_close(optimizer._sparse[parameter].master, torch.tensor([2.9999, 0.9998]), rtol=0, atol=1e-6)
    assert parameter.tolist() == [1.0, 3.0, 1.0, 1.0]


def test_what_something_else_writes_wins_across_a_refresh():
    parameter, optimizer = sole(torch.ones(4, dtype=torch.bfloat16), [1, 2], lr=1e-4)
    give(parameter, 1.0)
    optimizer.step()
    with torch.no_grad():
        parameter[1], parameter[3] = 3.0, 5.0
    optimizer.set_indices(parameter, torch.tensor([1, 2, 3]))
    expected = torch.tensor([3.0, 0.9999, 5.0])  # written, kept with the bits that bfloat16 lost, new
    torch.testing.assert_close(optimizer._sparse[parameter].master, expected, rtol=0, atol=1e-6)


def test_loading_a_model_refreshes_the_masters():
    model, other = network(torch.bfloat16), network(torch.bfloat16, seed=5)
    optimizer = optimizer_of(model, weight_decay=0.0)
    select_at_random(optimizer, 0.3, seed=0)
    train(model, optimizer, range(3))
    model.load_state_dict(other.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    assert_same_bits(snapshot(model), snapshot(other))


# -------------------------------------------------------------------- invariant 7: no host synchronisation


def fake_step(dtype: torch.dtype, **settings) -> FakeTensorMode:
    """All of a step on tensors without values, where anything that asks for a value or a size raises."""
    model = network(dtype)
    optimizer = optimizer_of(model, **settings)
    optimizer.set_indices(model[0].weight, torch.arange(20))
    optimizer.set_indices(model[2].weight, torch.arange(0, 120, 3))
    for number in range(2):
        loss_of_fake(model).backward()
        optimizer.scale_grads_(torch.ones(()) / (number + 1))
    optimizer.clip_grad_norm_(1.0)
    optimizer.clip_grad_value_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def loss_of_fake(model: nn.Module) -> Tensor:
    return model(torch.ones(4, 6, dtype=next(model.parameters()).dtype)).square().sum()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    # What is checked once a refresh reads values, and may.
    monkeypatch.setattr(layout, "check_indices", lambda *_: None)
    monkeypatch.setitem(globals(), "network", fake_network)
    for signed in (True, False):
        eight_bit._numbers(signed)  # made once, of values
    monkeypatch.setattr(eight_bit, "_BOOKS", {})  # those of other tests are of values, too
    with FakeTensorMode() as mode:
        yield mode


def fake_network(dtype: torch.dtype) -> nn.Sequential:
    sizes = {"dtype": dtype}
    first, second = nn.Linear(6, 12, bias=False, **sizes), nn.Linear(12, 10, bias=False, **sizes)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(10, 3, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_step_traces_without_values(fake: FakeTensorMode, dtype: torch.dtype, release: bool, state_dtype: str):
    optimizer = fake_step(dtype, release_gradients=release, state_dtype=state_dtype)
    assert optimizer.attempted_steps == 1
    with pytest.raises(DataDependentOutputException):
        optimizer.skipped_steps.item()


@pytest.mark.parametrize(
    ("look", "error"),
    [
        (lambda found_inf, grads: found_inf.item(), DataDependentOutputException),
        (lambda found_inf, grads: bool(found_inf), DataDependentOutputException),
        (lambda found_inf, grads: grads[0].nonzero(), DynamicOutputShapeException),
    ],
)
def test_a_step_that_waits_for_the_device_would_be_found(fake, look, error, monkeypatch: pytest.MonkeyPatch):
    """The same trace with one look at a value, or one shape that depends on values, put into the update."""

    def update(values, grads, *rest, found_inf, **hyper):
        look(found_inf, grads)
        functional.adamw_update(values, grads, *rest, found_inf=found_inf, **hyper)

    monkeypatch.setattr(optimizer_module, "adamw_update", update)
    with pytest.raises(error):
        fake_step(torch.float32)
