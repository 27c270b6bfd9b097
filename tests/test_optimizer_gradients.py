"""Gradients of SparseAdamW: gathered in hooks, summed in float32, clipped together with the dense ones.

Guards: hooks of a forgotten optimizer take the gradients away from a new one; dense gradients of a whole model exist
together.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref

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
    select_at_random,
    snapshot,
    sole,
    train,
)
from torch import Tensor, nn

from lift_lightning import SparseAdamW

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
    assert all(state.grad is not None for state in optimizer._sparse.values())


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


def test_hooks_come_and_go():
    model = network()
    optimizer = optimizer_of(model)
    select_at_random(optimizer, 0.3, seed=0)
    optimizer.remove_hooks()
    loss_of(model, 0).backward()
    assert model[0].weight.grad is not None
    pending = optimizer.sparse_state_dict()["parameters"]["0.weight"]["grad"].clone()  # collected for the checkpoint
    optimizer.zero_grad()
    optimizer.attach_hooks()
    optimizer.attach_hooks()  # twice is once
    loss_of(model, 0).backward()
    assert model[0].weight.grad is None
    assert torch.equal(optimizer.sparse_state_dict()["parameters"]["0.weight"]["grad"], pending)
