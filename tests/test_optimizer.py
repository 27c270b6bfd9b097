"""SparseAdamW is a masked dense AdamW, step by step, with states of length K.

Guards, each the story of a test below: `Optimizer.load_state_dict` casts state to the weight's dtype, so that with
bfloat16 weights the indices [1, 257, 89999] come back as [1, 256, 90112]; hooks of a forgotten optimizer take the
gradients away from a new one; bfloat16 weights lose every update smaller than half a unit; a `.item()` in the step
makes the host wait for the device at every step.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from oracles import MaskedAdamW
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import get_scheduler

from lift_lightning import SparseAdamW, functional
from lift_lightning import indices as layout
from lift_lightning import optimizer as optimizer_module

SPARSE = ["0.weight", "2.weight"]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Two sparse layers of 12 x 6 = 72 and 10 x 12 = 120 entries, and a dense head of 3 x 10 + 3."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 12, bias=False), nn.Tanh(), nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 3)]
    return nn.Sequential(*layers).to(dtype)


def optimizer_of(model: nn.Module, **settings) -> SparseAdamW:
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if n in SPARSE], "sparse": True},
        {"params": [(n, p) for n, p in named.items() if n not in SPARSE]},
    ]
    return SparseAdamW(groups, **{**HYPER, **settings})


def random_indices(numel: int, k: int, seed: int) -> Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def select_at_random(optimizer: SparseAdamW, share: float, seed: int) -> dict[str, Tensor]:
    chosen = {}
    for i, (name, parameter, _) in enumerate(optimizer.sparse_parameters()):
        chosen[name] = random_indices(parameter.numel(), round(share * parameter.numel()), seed + 100 * i)
        optimizer.set_indices(parameter, chosen[name])
    return chosen


def micro_batch(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1000 + number)
    inputs, targets = torch.randn(4, 6, generator=rng), torch.randn(4, 3, generator=rng)
    return inputs.to(dtype), targets.to(dtype)


def loss_of(model: nn.Module, number: int) -> Tensor:
    inputs, targets = micro_batch(number, next(model.parameters()).dtype)
    return (model(inputs) - targets).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def sole(weight: Tensor, indices: list[int] | None = None, **settings) -> tuple[nn.Parameter, SparseAdamW]:
    """One sparse parameter called `w` and its optimizer."""
    parameter = nn.Parameter(weight.clone())
    optimizer = SparseAdamW([{"params": [("w", parameter)], "sparse": True}], **{"lr": 1e-2, **settings})
    if indices is not None:
        optimizer.set_indices(parameter, torch.tensor(indices, dtype=torch.int64))
    return parameter, optimizer


def give(parameter: nn.Parameter, gradient: Tensor | float) -> None:
    """Back-propagate exactly this gradient, through the hooks."""
    (parameter * torch.as_tensor(gradient, dtype=parameter.dtype)).sum().backward()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name


def saved_and_loaded(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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


# -------------------------------------------------------------------- gradients: hooks, accumulation, clipping


def test_the_dense_gradient_is_gone_after_backward():
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.1, seed=0)
    loss_of(model, 0).backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is None
    assert model[4].weight.grad is not None  # dense
    twin = network()
    loss_of(twin, 0).backward()
    for mine, theirs in ((model[0].weight, twin[0].weight), (model[2].weight, twin[2].weight)):
        expected = theirs.grad.view(-1)[optimizer.indices(mine).long()]
        assert torch.equal(optimizer._sparse[mine].grad, expected)


def test_gradients_of_a_model_never_exist_together():
    """At no moment of backward is there more than one dense gradient of a sparse parameter."""
    parameters = [nn.Parameter(torch.eye(4)) for _ in range(6)]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    optimizer = SparseAdamW([{"params": named, "sparse": True}])
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in parameters))

    for parameter in parameters:
        optimizer.set_indices(parameter, torch.tensor([0, 5]))
        parameter.register_post_accumulate_grad_hook(count)  # runs after the optimizer's own
    product = torch.ones(4)
    for parameter in parameters:
        product = torch.tanh(parameter @ product)
    product.sum().backward()
    assert most == 0
    assert all(state.has_grad for state in optimizer._sparse.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_gradients_give_the_same_bits(dtype: torch.dtype):
    models = [network(dtype), network(dtype)]
    for model, release in zip(models, (True, False), strict=True):
        optimizer = optimizer_of(model, release_gradients=release)
        select_at_random(optimizer, 0.3, seed=0)
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            assert (model[0].weight.grad is None) == release
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            assert model[0].weight.grad is None
    assert_same_bits(snapshot(models[0]), snapshot(models[1]))


def test_accumulation_is_in_float32():
    """256 + 1 rounds to 256 in bfloat16: the sum of 1 + 256 times 1 would stop there."""
    parameter, optimizer = sole(torch.zeros(2, dtype=torch.bfloat16), [1])
    for _ in range(257):
        give(parameter, 1.0)
    assert optimizer.gradients()[0].tolist() == [257.0]
    assert optimizer.gradients()[0].dtype == torch.float32


def test_accumulation_of_float64_is_in_float64():
    parameter, optimizer = sole(torch.zeros(2, dtype=torch.float64), [1])
    for gradient in (1.0, 1e-12):
        give(parameter, gradient)
    assert optimizer.gradients()[0].item() == 1.0 + 1e-12


def test_zero_grad_forgets_what_was_collected():
    parameter, optimizer = sole(torch.zeros(2), [1])
    give(parameter, 7.0)
    optimizer.zero_grad()
    assert optimizer.gradients() == []
    optimizer.step()
    assert parameter.tolist() == [0.0, 0.0]
    give(parameter, 1.0)
    assert optimizer.gradients()[0].tolist() == [1.0]


def test_zero_grad_drops_dense_gradients_too():
    model = network()
    optimizer = optimizer_of(model, release_gradients=False)
    select_at_random(optimizer, 0.5, seed=0)
    loss_of(model, 0).backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.gradients() == []


def test_set_indices_drops_what_was_collected():
    parameter, optimizer = sole(torch.zeros(3), [1])
    give(parameter, 7.0)
    optimizer.set_indices(parameter, torch.tensor([1, 2]))
    assert optimizer.gradients() == []


def test_a_gradient_in_other_strides():
    parameter, optimizer = sole(torch.zeros(2, 3), [1, 3], release_gradients=False)
    parameter.grad = torch.arange(6.0).view(3, 2).T  # reads [[0, 2, 4], [1, 3, 5]]
    assert optimizer.gradients()[0].tolist() == [2.0, 1.0]


def test_clipping_equals_torchs_on_what_is_trained():
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.3, seed=0)
    loss_of(model, 0).backward()
    copies = [g.clone() for g in optimizer.gradients()]
    assert [c.numel() for c in copies] == [22, 36, 30, 3]  # round(0.3 * 72), 0.3 * 120, the head
    for copied in copies:
        copied.grad = copied.clone()
    unclipped = optimizer.clip_grad_norm_()
    assert all(torch.equal(g, c) for g, c in zip(optimizer.gradients(), copies, strict=True))
    norm = optimizer.clip_grad_norm_(0.5)
    expected = torch.nn.utils.clip_grad_norm_(copies, 0.5)
    assert torch.equal(norm, expected)
    assert torch.equal(norm, unclipped)
    assert all(torch.equal(g, c.grad) for g, c in zip(optimizer.gradients(), copies, strict=True))
    assert optimizer.clip_grad_norm_().item() == pytest.approx(0.5, rel=1e-5)
    optimizer.clip_grad_value_(0.01)
    torch.nn.utils.clip_grad_value_(copies, 0.01)
    assert all(torch.equal(g, c.grad) for g, c in zip(optimizer.gradients(), copies, strict=True))


def test_a_large_limit_clips_nothing():
    parameter, optimizer = sole(torch.zeros(2), [0, 1])
    give(parameter, torch.tensor([3.0, 4.0]))
    assert optimizer.clip_grad_norm_(100.0).item() == 5.0
    assert optimizer.gradients()[0].tolist() == [3.0, 4.0]


def test_entries_that_are_not_selected_do_not_count_in_the_norm():
    parameter, optimizer = sole(torch.zeros(3), [0, 2])
    give(parameter, torch.tensor([3.0, 1e6, 4.0]))
    assert optimizer.clip_grad_norm_(1.0).item() == 5.0


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5)])
def test_scale_grads(factor: float | Tensor):
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.3, seed=0)
    optimizer.scale_grads_(factor)  # nothing to scale yet
    loss_of(model, 0).backward()
    before = [g.clone() for g in optimizer.gradients()]
    optimizer.scale_grads_(factor)
    assert all(torch.equal(g, b * 0.5) for g, b in zip(optimizer.gradients(), before, strict=True))


def test_nothing_to_clip():
    _, optimizer = sole(torch.zeros(3), [0])
    assert optimizer.clip_grad_norm_(1.0).item() == 0.0
    optimizer.clip_grad_value_(1.0)


def test_unused_parameter_is_left_alone():
    """As in torch: no gradient, no weight decay, no step counted."""
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.3, seed=0)
    before = snapshot(model)
    model[4](torch.ones(1, 10)).sum().backward()
    optimizer.step()
    for name in SPARSE:
        assert torch.equal(dict(model.named_parameters())[name], before[name])
    assert optimizer.state[model[0].weight]["step"] == 0
    assert optimizer.state[model[4].weight]["step"] == 1


def test_a_step_without_any_gradient_counts_as_an_attempt():
    parameter, optimizer = sole(torch.ones(3), [0])
    optimizer.step()
    assert parameter.tolist() == [1.0] * 3
    assert optimizer.attempted_steps == 1
    assert optimizer.skipped_steps == 0


def test_an_empty_selection():
    """An expert's shard may hold no selected entry at all."""
    model = network()
    optimizer = optimizer_of(model)
    optimizer.set_indices(model[0].weight, torch.tensor([], dtype=torch.int64))
    optimizer.set_indices(model[2].weight, torch.tensor([5]))
    before = snapshot(model)
    for max_norm in (1e-3, float("inf")):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert int((model[2].weight != before["2.weight"]).sum()) == 1
    assert optimizer.skipped_steps == 0


def test_closure():
    model, twin = network(), network()
    for net, closed in ((model, True), (twin, False)):
        optimizer = optimizer_of(net)
        select_at_random(optimizer, 0.3, seed=0)

        def closure(net: nn.Module = net, optimizer: SparseAdamW = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        if closed:
            assert optimizer.step(closure) == loss_of(network(), 0)
        else:
            closure()
            assert optimizer.step() is None
    assert_same_bits(snapshot(model), snapshot(twin))


def test_tied_parameter_gets_the_sum_of_its_gradients():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    model = Tied()
    optimizer = SparseAdamW([{"params": [("a", model.a.weight)], "sparse": True}])
    optimizer.set_indices(model.a.weight, torch.arange(16))
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(inputs).sum(), model.a.weight)[0]
    model(inputs).sum().backward()
    assert torch.equal(optimizer.gradients()[0], expected.view(-1))


# -------------------------------------------------------------------- hooks and the optimizer's life


def test_before_the_first_selection_the_gradient_stays_and_step_says_what_to_do():
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, 0).backward()
    assert model[0].weight.grad is not None
    assert not optimizer.has_selection()
    message = "'0.weight' has no selected entries yet: add MaskRefreshCallback .* or call refresh_masks.*set_indices"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    with pytest.raises(RuntimeError, match=message):
        optimizer.indices(model[0].weight)
    optimizer.set_indices(model[0].weight, torch.tensor([1]))
    assert optimizer.is_selected(model[0].weight)
    with pytest.raises(RuntimeError, match=r"'2\.weight' has no selected entries"):
        optimizer.step()
    optimizer.set_indices(model[2].weight, torch.tensor([1]))
    assert optimizer.has_selection()
    optimizer.step()  # with the gradient that stayed
    assert optimizer.state[model[0].weight]["step"] == 1


@pytest.mark.parametrize("first_lives", [False, True])
@pytest.mark.parametrize("release", [True, False])
def test_a_second_optimizer_on_the_same_model_is_not_starved(first_lives: bool, release: bool):
    model, twin = network(), network()
    first = optimizer_of(model)
    select_at_random(first, 0.2, seed=9)
    if not first_lives:
        del first
    second, reference = optimizer_of(model, release_gradients=release), optimizer_of(twin)
    for optimizer in (second, reference):
        select_at_random(optimizer, 0.3, seed=0)
    train(model, second, range(4))
    train(twin, reference, range(4))
    assert_same_bits(snapshot(model), snapshot(twin))


def test_a_second_optimizer_may_train_densely_what_the_first_trained_sparsely():
    model, twin = network(), network()
    first = optimizer_of(model)
    select_at_random(first, 0.2, seed=9)
    second = SparseAdamW([{"params": list(model.named_parameters())}], **HYPER)
    train(model, second, range(4))
    train(twin, torch.optim.AdamW(twin.parameters(), **HYPER, fused=True), range(4))
    assert_same_bits(snapshot(model), snapshot(twin))
    assert first.has_selection()


def test_the_first_optimizer_can_take_over_again():
    """Its hooks are gone, so it reads the dense gradients at the step."""
    model, twin = network(), network()
    first, reference = optimizer_of(model), optimizer_of(twin)
    second = optimizer_of(model)
    del second
    for optimizer in (first, reference):
        select_at_random(optimizer, 0.3, seed=0)
    train(model, first, range(3))
    train(twin, reference, range(3))
    assert_same_bits(snapshot(model), snapshot(twin))


def test_a_forgotten_optimizer_is_collected_and_its_hooks_are_gone():
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.2, seed=0)
    train(model, optimizer, range(2))
    assert len(model[0].weight._post_accumulate_grad_hooks) == 1
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert not model[0].weight._post_accumulate_grad_hooks
    model.zero_grad()
    loss_of(model, 0).backward()
    assert model[0].weight.grad is not None


def test_the_optimizer_does_not_keep_hooks_on_a_model_that_is_saved():
    """Saving and copying a model take the weights along, not the optimizer."""
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.2, seed=0)
    copied = copy.deepcopy(model)
    loss_of(copied, 0).backward()
    assert copied[0].weight.grad is not None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    loss_of(loaded, 0).backward()
    assert torch.equal(loaded[0].weight.grad, copied[0].weight.grad)
    assert optimizer.gradients() == []


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
    assert state["sparse"].keys() == {"attempted_steps", "skipped_steps", "parameters", "dense_grads"}
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
    with FakeTensorMode() as mode:
        yield mode


def fake_network(dtype: torch.dtype) -> nn.Sequential:
    sizes = {"dtype": dtype}
    first, second = nn.Linear(6, 12, bias=False, **sizes), nn.Linear(12, 10, bias=False, **sizes)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(10, 3, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
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
        ({"state_dtype": torch.int32}, "state_dtype must be a floating dtype, got torch.int32"),
        ({"state_dtype": "int8"}, "state_dtype must be a floating dtype, got int8"),
        ({"state_dtype": "bf16"}, "state_dtype must be a floating dtype, got bf16"),
        ({"state_dtype": "nn"}, "state_dtype must be a floating dtype, got nn"),
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
