"""One refresh over a model: every sparse parameter gets the mask of its weight as it is now.

Guards: a refresh that fails half-way must name the parameter; the overlap that is logged is counted over entries, not
averaged over parameters of different sizes; tied weights are selected once.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same_choice, low_rank
from tiny import tiny_llama
from torch import nn

from lift_lightning import DecompositionError, SelectionConfig, SparseAdamW, build_param_groups, refresh_masks
from lift_lightning.param_groups import find_targets

CONFIG = SelectionConfig(rank=1, lra_rank=4)


def llama_optimizer(target: str = "all-linear", **settings):
    model = tiny_llama()
    return model, SparseAdamW(build_param_groups(model, target), **settings)


def test_every_parameter_gets_its_mask():
    """Hidden 32, MLP 48, keys and values 16, two layers, K = 1 * (M + N) of each matrix:
    q, o: 64 each; k, v: 48 each; gate, up, down: 80 each; 2 * (128 + 96 + 240) = 928."""
    model, optimizer = llama_optimizer()
    report = refresh_masks(optimizer, CONFIG)
    assert optimizer.has_selection()
    for _, parameter, _ in optimizer.sparse_parameters():
        k = sum(parameter.shape)
        assert_same_choice(optimizer.indices(parameter).long(), low_rank(parameter, 4).abs(), k)
    assert report.selected == 928
    assert report.entries == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert report.density == 928 / report.entries
    assert report.overlap is None
    assert report.seconds > 0
    assert report.bases.keys() == {target.name for target in find_targets(model)}


def test_the_masks_follow_the_weights():
    model, optimizer = llama_optimizer()
    refresh_masks(optimizer, CONFIG)
    assert refresh_masks(optimizer, CONFIG).overlap == 1.0  # of a model that did not change
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    report = refresh_masks(optimizer, CONFIG)
    assert 0 < report.overlap < 0.5
    for _, parameter, _ in optimizer.sparse_parameters():
        assert_same_choice(optimizer.indices(parameter).long(), low_rank(parameter, 4).abs(), sum(parameter.shape))


def test_overlap_is_counted_over_entries():
    """Magnitudes, a tenth of 100 and of 1000 entries. All 10 of the small matrix change, none of the 100: 100 / 110."""
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 100, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.arange(layer.weight.numel()).view_as(layer.weight))
    optimizer = SparseAdamW(build_param_groups(model))
    config = SelectionConfig(criterion="magnitude", density=0.1)
    refresh_masks(optimizer, config)
    assert optimizer.indices(model[0].weight).tolist() == list(range(90, 100))
    with torch.no_grad():
        model[0].weight.copy_(99 - torch.arange(100).view(10, 10))
    report = refresh_masks(optimizer, config)
    assert optimizer.indices(model[0].weight).tolist() == list(range(10))
    assert report.overlap == 100 / 110


def test_overlap_is_a_share_of_the_new_selection():
    model = nn.Linear(10, 10, bias=False)
    optimizer = SparseAdamW(build_param_groups(model))
    refresh_masks(optimizer, SelectionConfig(criterion="magnitude", density=0.1))
    report = refresh_masks(optimizer, SelectionConfig(criterion="magnitude", density=0.4))
    assert report.overlap == 10 / 40
    report = refresh_masks(optimizer, SelectionConfig(criterion="magnitude", density=0.2))
    assert report.overlap == 1.0  # the 20 largest are among the 40


def test_moments_of_the_entries_that_stay_are_carried():
    parameter = nn.Parameter(torch.tensor([[4.0, 3.0], [1.0, 2.0]]))
    optimizer = SparseAdamW([{"params": [("w", parameter)], "sparse": True}], lr=0.0)
    config = SelectionConfig(criterion="magnitude", density=0.5)
    refresh_masks(optimizer, config)
    (parameter * torch.tensor([[10.0, 20.0], [30.0, 40.0]])).sum().backward()
    optimizer.step()
    with torch.no_grad():
        parameter[0, 1], parameter[1, 1] = 0.0, 9.0
    report = refresh_masks(optimizer, config)
    assert optimizer.indices(parameter).tolist() == [0, 3]
    assert report.overlap == 0.5
    torch.testing.assert_close(optimizer._sparse[parameter].exp_avg, torch.tensor([1.0, 0.0]))  # (1 - 0.9) * 10, new


def test_halves_reach_the_selection():
    """The first half is a thousand times larger: with one budget for both, the second would get nothing."""
    model = nn.ModuleDict({"gate_up_proj": nn.Linear(6, 8, bias=False)})
    weight = model["gate_up_proj"].weight
    with torch.no_grad():
        weight.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
        weight[:4] *= 1000
    optimizer = SparseAdamW(build_param_groups(model))
    report = refresh_masks(optimizer, SelectionConfig(criterion="magnitude", density=0.25))
    assert int((optimizer.indices(weight) < 24).sum()) == 6  # a quarter of each half's 24 entries
    assert report.selected == 12


def test_a_tied_weight_is_selected_once():
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False))
    model[1].weight = model[0].weight
    optimizer = SparseAdamW(build_param_groups(model))
    report = refresh_masks(optimizer, SelectionConfig(rank=1, lra_rank=2))
    assert (report.selected, report.entries) == (18, 81)
    assert_same_choice(optimizer.indices(model[1].weight).long(), low_rank(model[0].weight, 2).abs(), 18)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite_is_named(bad: float):
    model, optimizer = llama_optimizer()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = bad
    name = r"model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(DecompositionError, match=rf"cannot select entries of '{name}': 1 of 1536 entries are NaN"):
        refresh_masks(optimizer, CONFIG)
    assert optimizer.is_selected(model.model.layers[0].mlp.up_proj.weight)
    assert not optimizer.is_selected(model.model.layers[1].mlp.up_proj.weight)


def test_a_parameter_that_does_not_converge_is_named(monkeypatch: pytest.MonkeyPatch):
    def eigh(_):
        raise torch.linalg.LinAlgError("failed to converge")

    _, optimizer = llama_optimizer("q_proj")
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    message = (
        r"cannot select entries of 'model\.layers\.0\.self_attn\.q_proj\.weight': the eigensolver did not converge"
    )
    with pytest.raises(DecompositionError, match=message):
        refresh_masks(optimizer, CONFIG)


def test_a_failed_refresh_keeps_the_old_selection_of_the_others():
    model, optimizer = llama_optimizer("q_proj")
    refresh_masks(optimizer, CONFIG)
    second = model.model.layers[1].self_attn.q_proj.weight
    before = optimizer.indices(second)
    with torch.no_grad():
        second[0, 0] = float("nan")
    with pytest.raises(DecompositionError, match="layers.1"):
        refresh_masks(optimizer, CONFIG)
    assert torch.equal(optimizer.indices(second), before)


def test_progress_and_device():
    seen = []

    def progress(items):
        for item in items:
            seen.append(item[0])
            yield item

    _, optimizer = llama_optimizer("attention")
    refresh_masks(optimizer, CONFIG, device="cpu", progress=progress)
    assert seen == [name for name, _, _ in optimizer.sparse_parameters()]
    assert len(seen) == 8


def test_bases_are_handed_on(monkeypatch: pytest.MonkeyPatch):
    """What one refresh reports reaches the next, by the parameter's name and the number of its matrix."""
    from lift_lightning import refresh

    seen = {}
    real = refresh.select_matrices

    def spy(parameter, matrices, config, *, basis=None, device=None):
        seen[parameter.data_ptr()] = basis
        return real(parameter, matrices, config, basis=basis, device=device)[0], [torch.ones(1)] * len(matrices)

    monkeypatch.setattr(refresh, "select_matrices", spy)
    _, optimizer = llama_optimizer("q_proj")
    report = refresh_masks(optimizer, CONFIG)
    assert set(map(str, seen.values())) == {"None"}
    refresh_masks(optimizer, CONFIG, bases=report.bases)
    assert all(len(basis) == 1 and torch.equal(basis[0], torch.ones(1)) for basis in seen.values())


def test_density_of_the_model_must_be_resolved_first():
    model, optimizer = llama_optimizer()
    config = SelectionConfig(density=0.05, density_of="model")
    with pytest.raises(ValueError, match="call of_targets"):
        refresh_masks(optimizer, config)
    entries = sum(p.numel() for _, p, _ in optimizer.sparse_parameters())
    everything = sum(p.numel() for p in model.parameters())
    report = refresh_masks(optimizer, config.of_targets(entries, everything))
    assert report.selected == pytest.approx(0.05 * everything, rel=1e-2)  # K is rounded for each of 14 matrices


def test_nothing_is_recorded_for_autograd():
    model, optimizer = llama_optimizer("q_proj")
    refresh_masks(optimizer, CONFIG)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.grad_fn is None
    assert weight.grad is None


def test_random_masks_of_equal_shapes_differ_and_stay_over_refreshes():
    """One seed for all would train the same entries of every layer."""
    _, optimizer = llama_optimizer("q_proj")
    refresh_masks(optimizer, SelectionConfig(criterion="random", rank=1))
    first, second = [optimizer.indices(p).clone() for _, p, _ in optimizer.sparse_parameters()]
    assert not torch.equal(first, second)
    assert refresh_masks(optimizer, SelectionConfig(criterion="random", rank=1)).overlap == 1.0
    assert refresh_masks(optimizer, SelectionConfig(criterion="random", rank=1, seed=1)).overlap < 0.5


@pytest.mark.parametrize(("settings", "count"), [({"lra_rank": 31}, 4), ({"lra_rank": 15}, 0), ({"lra_rank": 32}, 14)])
def test_matrices_that_the_approximation_does_not_reduce_are_counted(settings, count):
    """Shorter sides: 16 for keys and values of two layers, 32 for the other ten matrices."""
    _, optimizer = llama_optimizer()
    assert refresh_masks(optimizer, SelectionConfig(rank=1, **settings)).unreduced == count
    assert refresh_masks(optimizer, SelectionConfig(criterion="magnitude", rank=1, **settings)).unreduced == 0
