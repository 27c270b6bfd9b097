"""The rank-R approximation is the truncated SVD, to float64's precision, or an error that says why not.

Guards: a Gram matrix in float32, or without scaling, mixes singular vectors (squared singular values) or overflows; and
a decomposition that does not converge must never turn into a silent mask.
"""

from __future__ import annotations

import pytest
import torch
from oracles import low_rank

from lift_lightning import lowrank
from lift_lightning.lowrank import DecompositionError, check_finite, low_rank_factors

SHAPES = [(24, 40), (40, 24), (17, 17), (2, 2), (1, 9), (9, 1), (1, 1), (8, 300), (300, 8)]


def random_matrix(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7, 1000])
def test_product_is_the_truncated_svd(shape: tuple[int, int], rank: int):
    weight = random_matrix(*shape)
    left, right, basis, solver, error = low_rank_factors(weight, rank)
    r = min(rank, *shape)
    assert (left.shape, right.shape, basis) == ((shape[0], r), (r, shape[1]), None)
    assert (solver, error) == ("exact", 0.0)
    assert left.dtype == right.dtype == torch.float64
    expected = low_rank(weight, rank)
    assert (left @ right - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_residual_has_the_energy_of_the_discarded_singular_values(rank: int):
    """Eckart-Young: no rank-R matrix is closer, and the squared distance is the sum of the discarded squares."""
    weight = random_matrix(20, 30)
    left, right, *_ = low_rank_factors(weight, rank)
    discarded = torch.linalg.svdvals(weight)[rank:].square().sum()
    assert (weight - left @ right).square().sum().item() == pytest.approx(discarded.item(), rel=1e-10)


def test_a_diagonal_matrix_keeps_its_largest_entries():
    left, right, *_ = low_rank_factors(torch.diag(torch.tensor([3.0, -5.0, 1.0, 4.0])), 2)
    expected = torch.diag(torch.tensor([0.0, -5.0, 0.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_weights_are_taken_at_their_exact_values(dtype: torch.dtype):
    weight = random_matrix(20, 33, dtype=dtype)
    before = weight.clone()
    left, right, *_ = low_rank_factors(weight, 5)
    torch.testing.assert_close(left @ right, low_rank(weight, 5), rtol=0, atol=1e-10)
    assert torch.equal(weight, before)


def test_rank_deficient_matrix_is_reproduced():
    weight = random_matrix(30, 3) @ random_matrix(3, 20, seed=1)
    left, right, *_ = low_rank_factors(weight, 8)  # 5 more than there are singular values
    torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-12 * float(weight.abs().max()))


def test_zero_matrix_gives_zeros():
    left, right, *_ = low_rank_factors(torch.zeros(4, 6), 2)
    assert torch.equal(left @ right, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e15, 1e37])
def test_scale_does_not_matter(scale: float):
    """Squares of these leave float32, those of 1e-200 would leave float64 too."""
    weight = random_matrix(16, 24).mul(scale).float()
    left, right, *_ = low_rank_factors(weight, 4)
    expected = low_rank(weight, 4)
    assert ((left @ right - expected).abs() <= 1e-10 * expected.abs().max()).all()


def test_the_scale_of_float64_does_not_matter():
    weight = random_matrix(16, 24)
    for scale in (2.0**-600, 2.0**600):  # the squares leave float64; powers of two, so that only the range is tested
        left, right, *_ = low_rank_factors(weight * scale, 4)
        torch.testing.assert_close(left @ right / scale, low_rank(weight, 4), rtol=0, atol=1e-10)


def test_close_singular_values_are_told_apart():
    """sigma_R and sigma_R+1 1e-6 apart: a Gram matrix in float32 would mix the two vectors completely."""
    u, _ = torch.linalg.qr(random_matrix(32, 32))
    v, _ = torch.linalg.qr(random_matrix(48, 32, seed=1))
    sigma = torch.linspace(2.0, 1.0, 32, dtype=torch.float64)
    sigma[8] = sigma[7] * (1 - 1e-6)
    left, right, *_ = low_rank_factors((u * sigma) @ v.T, 8)
    expected = (u[:, :8] * sigma[:8]) @ v[:, :8].T
    torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-8)


def test_blocks_of_the_gram_matrix_change_nothing(monkeypatch: pytest.MonkeyPatch):
    weight = random_matrix(10, 64)
    whole = low_rank_factors(weight, 3)
    monkeypatch.setattr(lowrank, "_BLOCK_ENTRIES", 70)  # 7 columns at a time, the last block has 64 - 9 * 7 = 1
    blocked = low_rank_factors(weight, 3)
    torch.testing.assert_close(blocked.left @ blocked.right, whole.left @ whole.right, rtol=0, atol=1e-12)


def test_strided_views_are_taken_as_they_look():
    storage = random_matrix(12, 40)
    for view in (storage.T, storage[:, ::2], storage[::3]):
        left, right, *_ = low_rank_factors(view, 3)
        torch.testing.assert_close(left @ right, low_rank(view, 3), rtol=0, atol=1e-10)


def test_parameters_and_repeats():
    weight = torch.nn.Parameter(random_matrix(12, 9))
    first, second = low_rank_factors(weight, 4), low_rank_factors(weight, 4, solver="exact", basis=torch.ones(9, 4))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert not first.left.requires_grad
    assert not first.right.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted(bad: float):
    weight = random_matrix(4, 5)
    weight[1, 2] = weight[3, 0] = bad
    with pytest.raises(DecompositionError, match="2 of 20 entries are NaN or infinite"):
        low_rank_factors(weight, 2)
    with pytest.raises(DecompositionError, match="2 of 20"):
        check_finite(weight)


def test_what_is_finite_has_a_largest_magnitude():
    assert check_finite(torch.tensor([[1.0, -3.0], [2.0, 0.0]])) == 3.0
    assert check_finite(torch.tensor([[1.0, 4.0], [2.0, 0.0]], dtype=torch.bfloat16)) == 4.0
    assert check_finite(torch.empty(0, 4)) == 0.0


def test_no_convergence_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def eigh(_):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(DecompositionError, match="did not converge on a 4x6 matrix.*the algorithm failed"):
        low_rank_factors(random_matrix(4, 6), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 1), r"takes one matrix, got a tensor of shape \(3,\)"),
        ((torch.ones(2, 3, 4), 1), r"got a tensor of shape \(2, 3, 4\)"),
        ((torch.ones(2, 3), 0), "rank must be at least 1, got 0"),
        ((torch.ones(2, 3), -4), "rank must be at least 1, got -4"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        low_rank_factors(*arguments)


def test_unknown_solver():
    with pytest.raises(ValueError, match="unknown solver 'magic': choose one of auto, exact, subspace"):
        low_rank_factors(torch.ones(2, 3), 1, solver="magic")


def test_the_error_is_a_value_error():
    assert issubclass(DecompositionError, ValueError)
