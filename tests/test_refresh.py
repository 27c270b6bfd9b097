"""One refresh over a model: every sparse parameter gets the mask of its weight as it is now.

Guards: a refresh that fails half-way must name the parameter; the overlap that is logged is counted over entries, not
averaged over parameters of different sizes; tied weights are selected once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import assert_same_choice, low_rank, stable_top_k
from tiny import tiny_llama
from torch import nn

from lift_lightning import DecompositionError, SelectionConfig, SparseAdamW, build_param_groups, lowrank, refresh_masks
from lift_lightning.param_groups import find_targets
from lift_lightning.selection import Solved

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

    seen, made = {}, {}
    real = refresh.select_matrices

    def spy(parameter, matrices, config, *, basis=None, **others):
        seen[parameter.data_ptr()] = basis
        found = real(parameter, matrices, config, basis=basis, **others)
        made[parameter.data_ptr()] = [torch.ones(1)] * len(matrices)
        return found._replace(bases=made[parameter.data_ptr()])

    monkeypatch.setattr(refresh, "select_matrices", spy)
    _, optimizer = llama_optimizer("q_proj")
    report = refresh_masks(optimizer, CONFIG)
    assert set(map(str, seen.values())) == {"None"}
    assert report.bases == {name: made[p.data_ptr()] for name, p, _ in optimizer.sparse_parameters()}
    expected = dict(made)
    refresh_masks(optimizer, CONFIG, bases=report.bases)
    assert seen.keys() == expected.keys()
    assert all(seen[key] is not None and seen[key][0] is expected[key][0] for key in seen)


# ------------------------------------------------------------------ the subspace solver

WIDE = SelectionConfig(density=0.05, lra_rank=8)


def two_layers() -> tuple[nn.Module, SparseAdamW]:
    """300 x 400, which `auto` gives to the subspace solver, and 60 x 400, which it does not."""
    model = nn.Sequential(nn.Linear(400, 300, bias=False), nn.ReLU(), nn.Linear(300, 60, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
    return model, SparseAdamW(build_param_groups(model))


def share_of_the_exact_mask(optimizer: SparseAdamW, parameter: nn.Parameter) -> float:
    ours = optimizer.indices(parameter).long()
    return int(torch.isin(ours, stable_top_k(low_rank(parameter, 8).abs(), ours.numel())).sum()) / ours.numel()


def test_the_report_says_which_solver_it_was():
    model, optimizer = two_layers()
    report = refresh_masks(optimizer, WIDE)
    assert report.solvers == {"subspace": 1, "exact": 1}
    assert 0 < report.error <= WIDE.tolerance
    assert share_of_the_exact_mask(optimizer, model[0].weight) >= 1 - 2 * WIDE.tolerance
    assert share_of_the_exact_mask(optimizer, model[2].weight) == 1
    assert report.bases.keys() == {"0.weight", "2.weight"}
    (basis,) = report.bases["0.weight"]
    assert (basis.shape, basis.dtype, basis.device.type) == ((300, 40), torch.float16, "cpu")
    assert report.bases["2.weight"] == [None]
    exact = refresh_masks(optimizer, replace(WIDE, solver="exact"))
    assert (exact.solvers, exact.error) == ({"exact": 2}, 0.0)
    assert exact.bases == {"0.weight": [None], "2.weight": [None]}
    both = refresh_masks(optimizer, replace(WIDE, solver="subspace"))
    assert both.solvers == {"subspace": 2}
    for criterion in ("magnitude", "random"):
        report = refresh_masks(optimizer, SelectionConfig(criterion=criterion, density=0.05))
        assert (report.solvers, report.error) == ({}, 0.0)


def test_the_error_is_the_largest_of_all_matrices(monkeypatch: pytest.MonkeyPatch):
    from lift_lightning import refresh

    errors = iter([1e-4, 5e-4])
    real = refresh.select_matrices

    def spy(*arguments, **settings):
        return real(*arguments, **settings)._replace(solved=(Solved("subspace", next(errors)),))

    monkeypatch.setattr(refresh, "select_matrices", spy)
    _, optimizer = two_layers()
    assert refresh_masks(optimizer, WIDE).error == 5e-4


def applications_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found, real = [], lowrank.leading_subspace

    def spy(*arguments):
        result = real(*arguments)
        found.append(result.applications)
        return result

    monkeypatch.setattr(lowrank, "leading_subspace", spy)
    return found


def test_the_second_refresh_starts_where_the_first_ended(monkeypatch: pytest.MonkeyPatch):
    applications = applications_of(monkeypatch)
    model, optimizer = two_layers()
    first = refresh_masks(optimizer, WIDE)
    with torch.no_grad():
        weight = model[0].weight
        weight += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    second = refresh_masks(optimizer, WIDE, bases=first.bases)
    cold, warm = applications
    assert warm < cold
    assert second.error <= WIDE.tolerance
    assert second.overlap > 0.95
    assert share_of_the_exact_mask(optimizer, model[0].weight) >= 1 - 2 * WIDE.tolerance


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("basis_device", [None, "cpu", "meta"])
def test_bases_wait_where_they_are_told_to(basis_device: str | None, device: str | None):
    _, optimizer = two_layers()
    report = refresh_masks(optimizer, WIDE, device=device, basis_device=basis_device)
    (basis,) = report.bases["0.weight"]
    assert (basis.device.type, basis.dtype) == (basis_device or "cpu", torch.float16)


def test_bases_of_another_rank_or_of_parameters_that_are_gone():
    model, optimizer = two_layers()
    narrow = refresh_masks(optimizer, replace(WIDE, lra_rank=2))
    gone = {**narrow.bases, "no.such.weight": [torch.ones(3, 3)]}
    report = refresh_masks(optimizer, WIDE, bases=gone)
    assert report.bases["0.weight"][0].shape == (300, 40)
    assert share_of_the_exact_mask(optimizer, model[0].weight) >= 1 - 2 * WIDE.tolerance
    assert "no.such.weight" not in report.bases


@pytest.mark.parametrize("several_at_once", [True, False])
def test_the_number_of_threads_changes_no_mask(several_at_once: bool, monkeypatch: pytest.MonkeyPatch):
    """Small matrices run beside each other; the others one by one."""
    from lift_lightning import refresh

    if not several_at_once:
        monkeypatch.setattr(refresh, "_SMALL", 0)
    before = torch.get_num_threads()
    masks = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _, optimizer = llama_optimizer()
            refresh_masks(optimizer, CONFIG)
            assert torch.get_num_threads() == threads
            masks.append([optimizer.indices(p) for _, p, _ in optimizer.sparse_parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*masks, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_training_settings_do_not_reach_the_masks_and_are_put_back(precision: str, threads: int):
    """Several threads that each set and reset them would leave them as they should not be."""
    _, optimizer = two_layers()
    refresh_masks(optimizer, WIDE)
    expected = [optimizer.indices(p).clone() for _, p, _ in optimizer.sparse_parameters()]
    old = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            refresh_masks(optimizer, WIDE)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == precision
        assert torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision(old[0])
        torch.set_num_threads(old[1])
    found = [optimizer.indices(p) for _, p, _ in optimizer.sparse_parameters()]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failed_refresh_puts_the_settings_back(threads: int):
    model, optimizer = two_layers()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    old = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(threads)
    try:
        with pytest.raises(DecompositionError, match="'2.weight'"):
            refresh_masks(optimizer, WIDE)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads
    finally:
        torch.set_float32_matmul_precision(old[0])
        torch.set_num_threads(old[1])


def test_an_exception_of_the_progress_puts_the_settings_back():
    """The generators that hold the settings are closed with the refresh, not when the traceback is forgotten."""
    _, optimizer = two_layers()

    def progress(items):
        yield from list(items)[:1]
        raise KeyboardInterrupt

    old = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            refresh_masks(optimizer, WIDE, progress=progress)
        assert caught.value.__traceback__ is not None
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == 2
    finally:
        del caught
        torch.set_float32_matmul_precision(old[0])
        torch.set_num_threads(old[1])


def test_a_spectrum_without_a_gap_is_counted_apart():
    model, optimizer = two_layers()
    with torch.no_grad():
        nn.init.orthogonal_(model[0].weight, generator=torch.Generator().manual_seed(0))
    report = refresh_masks(optimizer, WIDE)
    assert report.solvers == {"exact after subspace": 1, "exact": 1}
    assert report.error == 0
    assert report.bases["0.weight"] == [None]
    with pytest.raises(DecompositionError, match="cannot select entries of '0.weight': the subspace solver did not"):
        refresh_masks(optimizer, replace(WIDE, solver="subspace"))


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
