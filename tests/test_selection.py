"""Masks against the full SVD in float64 and a stable sort.

Guards: the released code picks the *smallest* entries of W' by a sign error, and a low-rank approximation in float32
moves entries across the threshold. Whatever our mask and the oracle's differ in must lie within 1e-6 of the threshold.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import assert_same_choice, low_rank, stable_top_k
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from lift_lightning import DecompositionError, SelectionConfig, indices, select, select_indices
from lift_lightning.param_groups import find_targets, matrix_views
from lift_lightning.selection import Solved, select_matrices


def random_matrix(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def power_law(rows: int, columns: int, exponent: float) -> torch.Tensor:
    u, _ = torch.linalg.qr(random_matrix(rows, rows, 1, torch.float64))
    v, _ = torch.linalg.qr(random_matrix(columns, rows, 2, torch.float64))
    return ((u * torch.arange(1, rows + 1, dtype=torch.float64) ** -exponent) @ v.T).float()


def rank_deficient(rows: int, columns: int, rank: int) -> torch.Tensor:
    return random_matrix(rows, rank) @ random_matrix(rank, columns, seed=1)


# name: (weight, r, R)
MATRICES = {
    "random": (random_matrix(48, 64), 3, 5),
    "square": (random_matrix(40, 40), 2, 2),
    "wide": (random_matrix(10, 400), 2, 3),
    "tall": (random_matrix(400, 10), 2, 3),
    "1xN": (random_matrix(1, 50), 1, 1),  # K = min(1 * 51, 50): everything
    "Mx1": (random_matrix(50, 1), 1, 1),
    "2x2": (random_matrix(2, 2), 1, 1),  # K = min(1 * 4, 4)
    "rank-deficient, R below its rank": (rank_deficient(30, 50, 4), 2, 3),
    "rank-deficient, R above its rank": (rank_deficient(30, 50, 4), 2, 9),
    "power law": (power_law(48, 80, 1.0), 2, 8),
    "steep power law": (power_law(48, 80, 3.0), 2, 8),
    "bfloat16": (random_matrix(48, 64, dtype=torch.bfloat16), 3, 5),
    "float16": (random_matrix(48, 64, dtype=torch.float16), 3, 5),
    "float64": (random_matrix(48, 64, dtype=torch.float64), 3, 5),
    "tiny, 1e-20": (random_matrix(48, 64) * 1e-20, 3, 5),
    "huge, 1e15": (random_matrix(48, 64) * 1e15, 3, 5),
    "as small as a weight is": (random_matrix(48, 64) * 0.02, 3, 5),
    "transposed": (random_matrix(64, 48).T, 3, 5),
    "every second column": (random_matrix(48, 128)[:, ::2], 3, 5),
}


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("name", MATRICES)
def test_mask_is_that_of_the_full_svd(name: str, keep: str):
    weight, r, lra_rank = MATRICES[name]
    rows, columns = weight.shape
    config = SelectionConfig(rank=r, lra_rank=lra_rank, keep=keep)
    k = min(r * (rows + columns), rows * columns)
    scores = low_rank(weight, lra_rank).abs()
    assert_same_choice(select_indices(weight, config), scores, k, largest=keep == "largest")


def test_the_oracle_tells_masks_apart():
    """The tolerance does not let a wrong rank, a float32-sized error or the wrong end pass."""
    weight, _, _ = MATRICES["random"]
    scores = low_rank(weight, 5).abs()
    for wrong in (low_rank(weight, 6).abs(), scores * (1 + 1e-3 * random_matrix(48, 64).double()), -scores):
        with pytest.raises(AssertionError):
            assert_same_choice(stable_top_k(wrong, 336), scores, 336)


def test_lift_is_not_magnitude():
    weight, _, _ = MATRICES["random"]
    lift = select_indices(weight, SelectionConfig(rank=3, lra_rank=5))
    magnitude = select_indices(weight, SelectionConfig(criterion="magnitude", rank=3))
    assert not torch.equal(lift, magnitude)


def test_tiny_example_by_hand():
    """The best rank-1 approximation of diag(1, 2) is diag(0, 2): its largest entry is flat index 3."""
    config = SelectionConfig(density=0.25, lra_rank=1)  # K = 0.25 * 4 = 1
    assert select_indices(torch.diag(torch.tensor([1.0, 2.0])), config).tolist() == [3]


@pytest.mark.parametrize("value", [1.0, 0.1, 1 / 3, -0.02, 1e-20, 3e15])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 7)], ids=str)
def test_a_constant_matrix_takes_the_lowest_indices(value: float, shape: tuple[int, int]):
    """W' equals W up to float64's rounding, and rounding the scores to float32 makes the ties exact again."""
    weight = torch.full(shape, value)
    for dtype in (torch.float32, torch.bfloat16):
        config = SelectionConfig(rank=1, lra_rank=2)
        found = select_indices(weight.to(dtype), config)
        assert found.tolist() == list(range(sum(shape)))  # K = 1 * (M + N)
        assert torch.equal(found, select_indices(weight.to(dtype), config))
    for criterion in ("magnitude", "lift"):  # R = 100 is more than min(M, N)
        config = SelectionConfig(criterion=criterion, rank=1, lra_rank=100)
        assert select_indices(weight, config).tolist() == list(range(sum(shape)))


def test_magnitude_ties_go_to_the_lower_index_whatever_the_sign():
    weight = torch.tensor([[1.0, -2.0, 2.0], [-2.0, 0.5, 2.0]])
    config = SelectionConfig(criterion="magnitude", density=0.5)  # K = 3 of the four entries that tie at 2
    assert select_indices(weight, config).tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4)], ids=str)
def test_budget_is_capped_at_all_entries(shape: tuple[int, int]):
    weight = random_matrix(*shape)
    for config in (SelectionConfig(rank=1000), SelectionConfig(density=1.0), SelectionConfig(rank=1000, lra_rank=1)):
        assert select_indices(weight, config).tolist() == list(range(weight.numel()))


@pytest.mark.parametrize("lra_rank", [12, 13, 1000])
def test_rank_of_the_shorter_side_is_plain_magnitude(lra_rank: int):
    weight = random_matrix(12, 30)
    lift = select_indices(weight, SelectionConfig(rank=2, lra_rank=lra_rank))
    assert torch.equal(lift, select_indices(weight, SelectionConfig(criterion="magnitude", rank=2)))
    assert torch.equal(lift, stable_top_k(weight.abs(), 84))  # K = 2 * (12 + 30)


def test_budgets_and_defaults():
    assert SelectionConfig().budget(1000, 2000) == 128 * 3000
    assert SelectionConfig(rank=16).budget(576, 1536) == 16 * (576 + 1536)
    assert SelectionConfig(rank=16).budget(10, 10) == 100
    assert SelectionConfig(density=0.05).budget(576, 1536) == 44237  # 0.05 * 884736 = 44236.8
    assert SelectionConfig(density=1e-9).budget(10, 10) == 1  # at least one
    assert SelectionConfig().approximation_rank == 128
    assert SelectionConfig(rank=16).approximation_rank == 16
    assert SelectionConfig(rank=16, lra_rank=64).approximation_rank == 64
    assert SelectionConfig(density=0.05).approximation_rank == 128


def test_density_of_the_model_is_counted_over_the_targets():
    """5% of 1000 entries are 50; the targets hold 400, so 12.5% of each of them."""
    config = SelectionConfig(density=0.05, density_of="model")
    with pytest.raises(ValueError, match="call of_targets"):
        config.budget(10, 40)
    with pytest.raises(ValueError, match="call of_targets"):
        select(random_matrix(10, 40), config)
    of_targets = config.of_targets(400, 1000)
    assert (of_targets.density, of_targets.density_of) == (0.125, "targets")
    assert of_targets.budget(10, 40) == 50
    assert of_targets.of_targets(400, 1000) == of_targets
    assert SelectionConfig(rank=4).of_targets(1, 2) == SelectionConfig(rank=4)
    with pytest.raises(ValueError, match=r"density=0.5 of the model's 1000 entries .* 400 .* the most is 0.4000"):
        SelectionConfig(density=0.5, density_of="model").of_targets(400, 1000)


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("criterion", ["lift", "magnitude"])
@pytest.mark.parametrize(
    ("shape", "block"), [((8, 12), (2, 3)), ((8, 12), (8, 1)), ((6, 10), (3, 10)), ((9, 9), (1, 1))]
)
def test_blocks_equal_brute_force(shape: tuple[int, int], block: tuple[int, int], criterion: str, keep: str):
    weight, (high, wide) = random_matrix(*shape), block
    config = SelectionConfig(criterion=criterion, density=0.3, lra_rank=2, block=block, keep=keep)
    scores = (low_rank(weight, 2) if criterion == "lift" else weight).abs()
    blocks = {}
    for top, left in itertools.product(range(0, shape[0], high), range(0, shape[1], wide)):
        inside = [(r, c) for r in range(top, top + high) for c in range(left, left + wide)]
        blocks[sum(float(scores[r, c]) ** 2 for r, c in inside)] = [r * shape[1] + c for r, c in inside]
    take = max(1, round(0.3 * weight.numel()) // (high * wide))
    best = sorted(blocks, reverse=keep == "largest")[:take]
    assert select_indices(weight, config).tolist() == sorted(i for score in best for i in blocks[score])


def test_blocks_of_a_constant_matrix_are_the_first():
    config = SelectionConfig(criterion="magnitude", density=0.5, block=(2, 2))  # K = 8, two blocks of four
    assert select_indices(torch.ones(4, 4), config).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_blocks_of_a_transposed_matrix():
    weight = random_matrix(12, 8)
    config = SelectionConfig(criterion="magnitude", density=0.3, block=(2, 3))
    assert torch.equal(select_indices(weight.T, config), select_indices(weight.T.contiguous(), config))


def test_blocks_must_divide():
    with pytest.raises(ValueError, match="blocks of 3x2 do not divide a 8x12 matrix"):
        select(random_matrix(8, 12), SelectionConfig(rank=1, block=(3, 2)))


def test_random_is_reproducible_and_even():
    weight = random_matrix(100, 100)
    config = SelectionConfig(criterion="random", density=0.1, seed=7)
    found = select_indices(weight, config)
    assert torch.equal(found, select_indices(weight * 3, config))  # of the seed and the shape alone
    assert found.numel() == 1000
    other = select_indices(weight, SelectionConfig(criterion="random", density=0.1, seed=8))
    overlap = len(set(found.tolist()) & set(other.tolist()))
    assert 60 < overlap < 140  # 100 expected, standard deviation 9
    halves = int((found < 5000).sum())
    assert 430 < halves < 570  # 500 expected, standard deviation 15


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    select_indices(random_matrix(5, 5), SelectionConfig(criterion="random", density=0.5))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("criterion", ["lift", "magnitude", "random"])
def test_a_batch_of_matrices_is_each_of_them(criterion: str):
    weight = torch.stack([random_matrix(12, 20, seed=s) for s in range(3)])
    config = SelectionConfig(criterion=criterion, rank=1, lra_rank=2)
    result = select(weight, config)
    k = 32  # 1 * (12 + 20) of each
    assert result.indices.shape == (3 * k,)
    assert result.basis is None
    for e in range(3):
        mine = result.indices[e * k : (e + 1) * k] - e * 240
        if criterion == "random":
            assert ((mine >= 0) & (mine < 240)).all()
        else:
            scores = low_rank(weight[e], 2).abs() if criterion == "lift" else weight[e].double().abs()
            assert_same_choice(mine, scores, k)
    if criterion == "random":
        assert not torch.equal(result.indices[:k], result.indices[k : 2 * k] - 240)


def test_transposed_storage_gives_the_transposed_mask():
    """GPT-2's Conv1D stores W as (in, out): the same entries, numbered the other way round."""
    layer = Conv1D(30, 20)
    assert layer.weight.shape == (20, 30)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    config = SelectionConfig(rank=2, lra_rank=3)
    stored = select_indices(layer.weight, config)
    assert_same_choice(stored, low_rank(layer.weight, 3).abs(), 100)  # 2 * (20 + 30)
    as_linear = select_indices(layer.weight.detach().T.contiguous(), config)
    back = (as_linear % 20) * 30 + as_linear // 20
    assert torch.equal(back.sort().values, stored)


def tiny_experts(kind: str):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "vocab_size": 30,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes))
    return GptOssForCausalLM(GptOssConfig(**sizes, head_dim=8))


@pytest.mark.parametrize("criterion", ["lift", "magnitude"])
@pytest.mark.parametrize(("kind", "layout"), [("mixtral", "rows"), ("gpt_oss", "interleaved_columns")])
def test_halves_of_fused_experts_have_a_budget_each(kind: str, layout: str, criterion: str):
    """gate and up are (12, 16) or transposed, K = 1 * 28 each, of three experts: 3 * 2 * 28 = 168 entries."""
    model = tiny_experts(kind)
    (target,) = [t for t in find_targets(model) if t.name.endswith("gate_up_proj")]
    assert target.halves == layout
    parameter = target.parameter
    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    config = SelectionConfig(criterion=criterion, rank=1, lra_rank=3)
    found, bases, solved = select_matrices(parameter, matrix_views(parameter, target.halves), config)
    assert found.shape == (168,)
    assert bases == [None] * 6
    assert solved == ((Solved("exact", 0.0),) * 6 if criterion == "lift" else ())
    chosen = torch.zeros(parameter.numel(), dtype=torch.bool)
    chosen[found] = True
    chosen = chosen.view(parameter.shape)
    for expert in range(3):
        for half in (0, 1):
            part = slice(12 * half, 12 * half + 12) if layout == "rows" else slice(half, None, 2)
            where = (expert, part) if layout == "rows" else (expert, slice(None), part)
            matrix = parameter.detach()[where]
            scores = low_rank(matrix, 3).abs() if criterion == "lift" else matrix.double().abs()
            assert_same_choice(chosen[where].reshape(-1).nonzero().squeeze(1), scores, 28)


def test_halves_are_the_gate_and_the_up_that_the_model_computes_with():
    """With the gate's half at zero the experts' output is exactly zero (Mixtral: silu(0) * up), with up's half too."""
    for kind in ("mixtral", "gpt_oss"):
        model = tiny_experts(kind)
        experts = model.model.layers[0].mlp.experts
        (target,) = [t for t in find_targets(model) if t.name.endswith("gate_up_proj")]
        views = matrix_views(target.parameter, target.halves)
        assert [tuple(v.shape) for v in views] == [(12, 16) if kind == "mixtral" else (16, 12)] * 6
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_()
            for name, parameter in experts.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        hidden, chosen = torch.randn(5, 16), torch.tensor([[0, 1]] * 5)
        weights = torch.full((5, 2), 0.5)
        assert experts(hidden, chosen, weights).abs().max() > 0
        for gate in views[::2]:
            gate.zero_()
        assert experts(hidden, chosen, weights).abs().max() == 0


@pytest.mark.parametrize("halves", ["columns", "interleaved_rows", "columns 2-D", "rows 2-D"])
def test_every_layout_of_halves(halves: str):
    parameter = torch.stack([random_matrix(8, 12, seed=s) for s in range(2)])
    if halves.endswith("2-D"):
        parameter, halves = parameter[0].contiguous(), halves.split()[0]
    views = matrix_views(parameter, halves)
    config = SelectionConfig(criterion="magnitude", density=0.25)  # K = 12 of the 48 entries of each half
    found = select_matrices(parameter, views, config).indices
    expected = torch.zeros(parameter.shape, dtype=torch.bool)
    for view, mark in zip(views, matrix_views(expected, halves), strict=True):
        mark[view.abs() >= view.abs().flatten().sort(descending=True).values[11]] = True
    assert torch.equal(found, expected.view(-1).nonzero().squeeze(1))
    assert found.numel() == 12 * len(views)


def test_a_parameter_that_is_part_of_a_larger_storage():
    """Flat indices count from the parameter's own first entry."""
    storage = random_matrix(20, 16)
    parameter = storage[4:12]
    config = SelectionConfig(criterion="magnitude", density=0.25)
    for halves in (None, "rows"):
        inside = select_matrices(parameter, matrix_views(parameter, halves), config).indices
        alone = select_matrices(parameter.clone(), matrix_views(parameter.clone(), halves), config).indices
        assert torch.equal(inside, alone)


def test_device_is_where_the_computation_runs():
    weight = random_matrix(12, 20)
    config = SelectionConfig(rank=1, lra_rank=2)
    copy = weight + 0  # what `on_device` would give
    weight.zero_()
    found = select_matrices(weight, [weight], config, copies=iter([copy])).indices
    assert torch.equal(found, select_indices(copy, config))


@pytest.fixture
def blocks_of_rows(monkeypatch: pytest.MonkeyPatch):
    """48x64 matrices in nine blocks of five rows and one of three, after a sample of 64 scores."""
    monkeypatch.setitem(indices._BLOCK_ENTRIES, "cpu", 64 * 5)
    monkeypatch.setattr(indices, "_SAMPLE", 64)


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("criterion", ["lift", "magnitude", "random"])
@pytest.mark.parametrize("solver", ["exact", "subspace"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
def test_score_blocks_change_nothing(
    criterion: str, keep: str, solver: str, transposed: bool, request: pytest.FixtureRequest
):
    """Products of other numbers of rows may round another way, so a last-bit tie may fall to another entry."""
    weight = random_matrix(64, 48).T if transposed else random_matrix(48, 64)
    config = SelectionConfig(criterion=criterion, rank=3, lra_rank=5, keep=keep, solver=solver)
    whole = select_indices(weight, config)
    request.getfixturevalue("blocks_of_rows")
    found = select_indices(weight, config)
    if criterion == "lift" and solver == "subspace":
        assert int(torch.isin(found, whole).sum()) >= 335  # of 3 * (48 + 64) = 336
    else:
        assert torch.equal(found, whole)


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("criterion", ["lift", "magnitude"])
def test_masks_by_rows_are_those_of_the_full_svd(criterion: str, keep: str, blocks_of_rows: None):
    weight = random_matrix(48, 64)
    config = SelectionConfig(criterion=criterion, rank=3, lra_rank=5, keep=keep)
    scores = low_rank(weight, 5).abs() if criterion == "lift" else weight.double().abs()
    assert_same_choice(select_indices(weight, config), scores, 336, largest=keep == "largest")


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("solver", ["exact", "subspace"])
@pytest.mark.parametrize("block", [(1, 1), (2, 4), (3, 64), (16, 1), (48, 2), (48, 64)], ids=str)
def test_blocks_by_rows_equal_the_sum_over_the_whole_matrix(
    block: tuple[int, int], solver: str, keep: str, blocks_of_rows
):
    """A block of 16 rows is more than the five rows of scores that are made at a time."""
    weight, (high, wide) = random_matrix(48, 64), block
    config = SelectionConfig(rank=3, lra_rank=5, block=block, keep=keep, solver=solver)
    scores = low_rank(weight, 5).square().view(48 // high, high, 64 // wide, wide).sum(dim=(1, 3))
    take = max(1, 336 // (high * wide))
    best = torch.zeros(scores.numel(), dtype=torch.bool)
    best[stable_top_k(scores, take, largest=keep == "largest")] = True
    mask = best.view(48 // high, 1, 64 // wide, 1).expand(-1, high, -1, wide).reshape(-1)
    found = select_indices(weight, config)
    assert bool((found[1:] > found[:-1]).all())
    assert found.numel() == take * high * wide
    if solver == "exact":
        assert torch.equal(found, mask.nonzero().squeeze(1))
    else:
        assert int(mask[found].sum()) >= 0.99 * found.numel()


def test_random_scores_by_rows_do_not_depend_on_the_blocks(request: pytest.FixtureRequest):
    config = SelectionConfig(criterion="random", density=0.1, seed=3, keep="smallest")
    whole = select_indices(torch.zeros(48, 64), config)
    request.getfixturevalue("blocks_of_rows")
    assert torch.equal(select_indices(torch.zeros(48, 64), config), whole)


# ------------------------------------------------------------------ the subspace solver


def test_what_select_says_of_the_solver():
    weight = random_matrix(80, 100)
    exact = select(weight, SelectionConfig(rank=2, lra_rank=5, solver="exact"))
    assert (exact.solved, exact.basis) == ((Solved("exact", 0.0),), None)
    found = select(weight, SelectionConfig(rank=2, lra_rank=5, solver="subspace"))
    ((solver, error),) = found.solved
    assert solver == "subspace"
    assert 0 < error <= SelectionConfig().tolerance
    assert found.basis.shape == (80, 5 + 32)
    for config in (SelectionConfig(criterion="magnitude", rank=2), SelectionConfig(criterion="random", rank=2)):
        assert (select(weight, config).solved, select(weight, config).basis) == ((), None)
    assert select(weight, SelectionConfig(rank=2, lra_rank=80, solver="subspace")).solved == ()  # plain magnitude


def test_the_tolerance_reaches_the_solver():
    weight = random_matrix(120, 160)
    exact = select_indices(weight, SelectionConfig(density=0.05, lra_rank=8, solver="exact"))
    kept, errors = [], []
    for tolerance in (0.5, 1e-5):
        found = select(weight, SelectionConfig(density=0.05, lra_rank=8, solver="subspace", tolerance=tolerance))
        kept.append(int(torch.isin(found.indices, exact).sum()))
        errors.append(found.solved[0].error)
    assert errors[1] <= 1e-5 < errors[0] <= 0.5
    assert kept[0] < kept[1]
    assert kept[1] >= 959  # of 0.05 * 19200 = 960


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1e-3, 2.0, float("nan"), float("inf")])
def test_a_tolerance_out_of_range(tolerance: float):
    with pytest.raises(ValueError, match="tolerance must be above 0 and below 1, got"):
        SelectionConfig(tolerance=tolerance)


@pytest.mark.parametrize("shape", [(3, 60, 90), (3, 90, 60), (1, 60, 90)], ids=str)
def test_bases_of_a_batch_go_round(shape: tuple[int, int, int]):
    weight = torch.stack([random_matrix(*shape[1:], seed=s) for s in range(shape[0])])
    config = SelectionConfig(rank=1, lra_rank=4, solver="subspace")
    first = select(weight, config)
    assert first.basis.shape == (shape[0], 60, 36)
    assert [one.solver for one in first.solved] == ["subspace"] * shape[0]
    again = select(weight, config, basis=first.basis)
    for e in range(shape[0]):
        alone = select(weight[e], config)
        assert torch.equal(first.basis[e], alone.basis)
        assert first.solved[e] == alone.solved[0]
        assert torch.equal(again.basis[e], select(weight[e], config, basis=alone.basis).basis)
    assert int(torch.isin(again.indices, first.indices).sum()) >= 0.99 * first.indices.numel()


def test_a_batch_with_one_matrix_without_a_gap_starts_cold():
    """Its basis is missing, and a tensor of bases has no place for that."""
    orthogonal = torch.linalg.qr(random_matrix(260, 260, dtype=torch.float64)).Q.float()
    weight = torch.stack([random_matrix(260, 260), orthogonal])
    found = select(weight, SelectionConfig(rank=1, lra_rank=4))
    assert found.basis is None
    assert [one.solver for one in found.solved] == ["subspace", "exact after subspace"]


def test_bases_and_copies_of_several_matrices_are_taken_in_order():
    parameter = torch.stack([random_matrix(60, 90, seed=s) for s in range(3)])
    views = matrix_views(parameter)
    config = SelectionConfig(rank=1, lra_rank=4, solver="subspace")
    first = select_matrices(parameter, views, config)
    assert [basis.shape for basis in first.bases] == [(60, 36)] * 3
    assert [one.solver for one in first.solved] == ["subspace"] * 3
    copies = iter([view.clone() for view in views] + [torch.zeros(1, 1)])
    again = select_matrices(parameter, views, config, basis=first.bases, copies=copies)
    assert next(copies).shape == (1, 1)  # one was taken for each matrix
    for i in range(3):
        alone = select(views[i], config, basis=first.bases[i])
        assert torch.equal(again.bases[i], alone.basis)
        mine = (again.indices >= i * 5400) & (again.indices < (i + 1) * 5400)
        assert torch.equal(again.indices[mine] - i * 5400, alone.indices)
    some = select_matrices(parameter, views, config, basis=[first.bases[0], None, first.bases[2]])
    assert torch.equal(some.bases[1], first.bases[1])
    assert torch.equal(some.bases[2], again.bases[2])


def test_a_spectrum_without_a_gap_names_the_remedy():
    orthogonal = torch.linalg.qr(random_matrix(80, 80, dtype=torch.float64)).Q
    with pytest.raises(DecompositionError, match="take solver auto or exact, or another rank"):
        select(orthogonal, SelectionConfig(rank=1, lra_rank=4, solver="subspace"))


@pytest.mark.parametrize("criterion", ["lift", "magnitude"])
@pytest.mark.parametrize("lra_rank", [2, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(criterion: str, lra_rank: int, bad: float):
    weight = random_matrix(12, 20)
    weight[3, 4] = bad
    with pytest.raises(DecompositionError, match="1 of 240 entries are NaN or infinite"):
        select(weight, SelectionConfig(criterion=criterion, rank=1, lra_rank=lra_rank))


@pytest.mark.parametrize("shape", [(5,), (), (2, 2, 2, 2)], ids=str)
def test_neither_matrix_nor_batch(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"is \(M, N\) or \(E, M, N\), got shape"):
        select(torch.ones(shape), SelectionConfig(rank=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 4, "density": 0.1}, "rank=4 and density=0.1 both set the budget"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"lra_rank": -1}, "lra_rank must be at least 1, got -1"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
        ({"density": float("nan")}, "density must be above 0 and at most 1, got nan"),
        ({"density_of": "model"}, "density_of='model' needs a density"),
        (
            {"criterion": "newest"},
            "criterion must be one of lift, magnitude, gradient, movement, random, got 'newest'",
        ),
        ({"keep": "both"}, "keep must be one of largest, smallest, got 'both'"),
        ({"solver": "magic"}, "solver must be one of auto, exact, subspace, got 'magic'"),
        ({"density": 0.1, "density_of": "layer"}, "density_of must be one of targets, model, got 'layer'"),
        ({"block": (2,)}, r"block must be two positive sizes, rows and columns, or -1 .*, got \(2,\)"),
        ({"block": (0, 2)}, r"block must be two positive sizes"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 9, "density": 0.1}, "density=0.1 and count=9 both set the budget"),
        ({"floor": 1.5}, "floor must be between 0 and 1, got 1.5"),
        ({"energy": 0}, "energy must be above 0 and at most 1, got 0"),
        ({"gradient_power": 3}, "gradient_power must be one of 1, 2, got 3"),
        (
            {"directions": "smallest", "criterion": "random"},
            "directions=smallest is of the criterion lift, not of random",
        ),
        ({"directions": "hybrid", "solver": "subspace"}, "the largest directions only, not directions=hybrid"),
        ({"allocation": "energy", "criterion": "random"}, "set allocation to each or global"),
        ({"allocation": "energy", "lra_rank": 3}, "leave lra_rank null"),
        ({"allocation": "global", "block": (2, 2)}, "ranks single entries, not blocks"),
    ],
)
def test_bad_settings(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**values)


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        SelectionConfig().rank = 3
