"""Spectra, ranks, eigenspaces and updates of single matrices against full decompositions in float64 and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import random_indices, random_matrix

from lift_lightning.analysis.spectra import (
    alignment_score,
    effective_rank,
    energy_shares,
    leading_right_vectors,
    numerical_rank,
    share_held,
    singular_spectrum,
    stable_rank,
    top_directions,
)
from lift_lightning.analysis.updates import compare_matrix
from lift_lightning.lowrank import DecompositionError

SHAPES = [(20, 30), (33, 16), (12, 12)]
EPS = torch.finfo(torch.float32).eps
DESCENDING = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(lambda v: sorted(v, reverse=True))


def of_rank(rows: int, columns: int, rank: int, *, seed: int = 0) -> torch.Tensor:
    return random_matrix(rows, rank, seed=seed) @ random_matrix(rank, columns, seed=seed + 1)


def with_values(values: list[float], rows: int, columns: int) -> torch.Tensor:
    """A float64 matrix of these singular values."""
    left, _ = torch.linalg.qr(random_matrix(rows, rows, seed=5).double())
    right, _ = torch.linalg.qr(random_matrix(columns, columns, seed=6).double())
    return (left[:, : len(values)] * torch.tensor(values, dtype=torch.float64)) @ right[: len(values)]


def leading_of_full_svd(matrix: torch.Tensor, k: int) -> torch.Tensor:
    return torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:k].T


# ------------------------------------------------------------------ singular values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_that_of_the_svd_in_float64(shape, dtype):
    matrix = random_matrix(*shape).to(dtype)
    found = singular_spectrum(matrix)
    expected = torch.linalg.svd(matrix.double()).S
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * EPS * float(expected[0]))


def test_the_spectrum_is_exact_far_below_what_a_gram_matrix_can_resolve():
    """Values of a 1e-10th of the largest would vanish in squares; float32's own noise is 1e-7 of it."""
    values = [1.0, 1e-3, 1e-5, 2e-6]
    found = singular_spectrum(with_values(values, 20, 30))
    assert found[:4].tolist() == pytest.approx(values, abs=5e-7)
    assert float(found[4]) < 5e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_has_no_spectrum(bad):
    matrix = random_matrix(4, 5)
    matrix[1, 2] = bad
    with pytest.raises(DecompositionError, match="1 of 20 entries are NaN or infinite"):
        singular_spectrum(matrix)


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numerical_rank_is_that_of_torch_with_ten_times_its_tolerance(shape, rank):
    matrix = of_rank(*shape, rank)
    values = singular_spectrum(matrix)
    found = numerical_rank(values, shape)
    assert found == int(torch.linalg.matrix_rank(matrix, rtol=10 * max(shape) * EPS)) == rank
    assert numerical_rank(values, shape, tolerance=1) == int(torch.linalg.matrix_rank(matrix))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("factor", [1.5, 9.0, 11.0, 100.0])
def test_a_value_counts_from_ten_times_the_default_threshold_on(shape, factor):
    """Of 30 x 20 the threshold is 30 eps of the largest, as of 20 x 30."""
    values = torch.tensor([2.0, 2.0 * factor * 30 * EPS], dtype=torch.float64)
    assert numerical_rank(values, shape) == (2 if factor > 10 else 1)
    assert numerical_rank(values, shape, tolerance=1) == 2
    assert numerical_rank(values, shape, tolerance=1000) == 1


def test_a_matrix_of_zeros_has_no_rank_of_any_kind():
    values = singular_spectrum(torch.zeros(5, 7))
    assert values.tolist() == [0.0] * 5
    assert numerical_rank(values, (5, 7)) == 0
    assert effective_rank(values) == 0.0
    assert stable_rank(values) == 0.0


@given(DESCENDING)
def test_effective_and_stable_rank_are_their_formulas(values):
    total, squares = math.fsum(values), math.fsum(v * v for v in values)
    entropy = -math.fsum(v / total * math.log(v / total) for v in values)
    tensor = torch.tensor(values, dtype=torch.float64)
    assert effective_rank(tensor) == pytest.approx(math.exp(entropy), rel=1e-9)
    assert stable_rank(tensor) == pytest.approx(squares / values[0] ** 2, rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_equal_values_are_of_effective_and_stable_rank_k(k):
    values = torch.tensor([3.0] * k + [0.0] * 4, dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(k)
    assert stable_rank(values) == pytest.approx(k)


def test_stable_rank_is_frobenius_norm_over_spectral_norm():
    matrix = random_matrix(20, 30)
    expected = float(torch.linalg.matrix_norm(matrix).square() / torch.linalg.matrix_norm(matrix, 2).square())
    assert stable_rank(singular_spectrum(matrix)) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ the top eigenspace


@pytest.mark.parametrize(
    ("shape", "asked", "expected"),
    [
        ((4096, 4096), None, 128),
        ((11008, 4096), None, 128),
        ((576, 192), None, 24),
        ((1536, 576), None, 72),
        ((16, 100), None, 2),
        ((7, 7), None, 1),
        ((16, 100), 5, 5),
        ((4096, 4096), 200, 200),
        ((16, 100), 50, 16),
    ],
)
def test_the_top_eigenspace_has_128_directions_or_an_eighth_unless_others_are_asked_for(shape, asked, expected):
    assert top_directions(shape, asked) == expected


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_leading_right_vectors_span_what_the_full_svd_says(shape, k):
    matrix = random_matrix(*shape)
    found, expected = leading_right_vectors(matrix, k), leading_of_full_svd(matrix, k)
    assert found.dtype == torch.float64
    assert found.shape == (shape[1], k)
    torch.testing.assert_close(found.T @ found, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-6)


def test_no_more_vectors_than_singular_values():
    assert leading_right_vectors(random_matrix(5, 9), 7).shape == (9, 5)
    assert leading_right_vectors(random_matrix(9, 5), 7).shape == (5, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_has_no_more_leading_right_vectors_than_its_rank(shape):
    matrix = of_rank(*shape, 2)
    found, expected = leading_right_vectors(matrix, 6), leading_of_full_svd(matrix, 2)
    assert found.shape == (shape[1], 2)
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-6)
    assert leading_right_vectors(torch.zeros(shape), 6).shape == (shape[1], 0)
    scaled = torch.diag(torch.tensor([1e6, 1.0, 1e-2, 0.0]))  # 1e-8 of the largest is rounding
    assert leading_right_vectors(scaled, 4).shape == (4, 2)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_alignment_score_is_the_papers_double_sum(k):
    before, after = (leading_of_full_svd(random_matrix(20, 30, seed=seed), k) for seed in (0, 1))
    expected = 0.0
    for i in range(k):
        for j in range(k):
            expected += float(torch.dot(after[:, i], before[:, j])) ** 2
    assert alignment_score(before, after) == pytest.approx(expected / k)
    assert 0 < alignment_score(before, after) < 1


def test_a_turn_within_the_eigenspace_is_none():
    before = leading_of_full_svd(random_matrix(20, 30), 5)
    turn, _ = torch.linalg.qr(random_matrix(5, 5, seed=3).double())
    assert alignment_score(before, before @ turn) == pytest.approx(1)


def test_half_of_the_directions_left_is_a_half():
    basis = torch.eye(30, dtype=torch.float64)
    assert alignment_score(basis[:, :4], basis[:, 4:8]) == 0
    assert alignment_score(basis[:, :4], basis[:, 2:6]) == 0.5


def test_a_random_eigenspace_has_k_of_n():
    scores = [
        alignment_score(
            leading_right_vectors(random_matrix(40, 40, seed=2 * i), 8),
            leading_right_vectors(random_matrix(40, 40, seed=2 * i + 1), 8),
        )
        for i in range(30)
    ]
    assert sum(scores) / len(scores) == pytest.approx(8 / 40, abs=0.02)


def test_eigenspaces_of_different_sizes_have_no_score():
    """As of a matrix that had fewer directions before than after."""
    basis = torch.eye(30, dtype=torch.float64)
    assert math.isnan(alignment_score(basis[:, :4], basis[:, :5]))
    assert math.isnan(alignment_score(basis[:, :0], basis[:, :0]))
    with pytest.raises(ValueError, match=r"of one space are compared, got \(30, 4\) and \(20, 4\)"):
        alignment_score(torch.zeros(30, 4), torch.zeros(20, 4))


# ------------------------------------------------------------------ energy


@given(DESCENDING)
def test_energy_shares_are_running_sums_of_squares(values):
    total = math.fsum(v * v for v in values)
    expected = [math.fsum(v * v for v in values[: i + 1]) / total for i in range(len(values))]
    assert energy_shares(torch.tensor(values, dtype=torch.float64)).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_held_is_a_sum_over_entries(dtype):
    matrix, indices = random_matrix(6, 9).to(dtype), random_indices(54, 17, seed=2)
    rows = matrix.double().tolist()
    held = math.fsum(rows[i // 9][i % 9] ** 2 for i in indices.tolist())
    total = math.fsum(entry**2 for row in rows for entry in row)
    assert share_held(matrix, indices) == pytest.approx(held / total, rel=1e-12)
    assert share_held(matrix, indices.int()) == pytest.approx(held / total, rel=1e-12)
    assert share_held(matrix, torch.arange(54)) == pytest.approx(1)
    assert share_held(matrix, torch.arange(0)) == 0


def test_a_matrix_of_zeros_has_no_energy():
    assert energy_shares(torch.zeros(4, dtype=torch.float64)).tolist() == [0.0] * 4
    assert share_held(torch.zeros(3, 4), torch.arange(5)) == 0


# ------------------------------------------------------------------ updates


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_of_known_rank_and_size_is_seen(shape):
    before, change = random_matrix(*shape), 0.01 * of_rank(*shape, 2, seed=7)
    after = before + change
    found = compare_matrix(before, after, 3)
    difference = (after.double() - before.double()).float()
    values = torch.linalg.svd(difference.double()).S
    shares = values / values.sum()
    assert found.changed == float((difference != 0).double().mean())
    assert found.norm == pytest.approx(float(difference.norm() / before.norm()), rel=1e-5)
    assert found.rank == int(torch.linalg.matrix_rank(difference, rtol=10 * max(shape) * EPS)) == 2
    entropy = float(torch.special.entr(shares).sum())
    assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
    assert found.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)
    assert found.spectral_norm_before == pytest.approx(float(torch.linalg.svd(before.double()).S[0]), rel=1e-5)
    assert found.spectral_norm_after == pytest.approx(float(torch.linalg.svd(after.double()).S[0]), rel=1e-5)
    old, new = leading_of_full_svd(before, 3), leading_of_full_svd(after, 3)
    assert found.alignment == pytest.approx(float((new.T @ old).square().sum() / 3), abs=1e-6)


def test_an_update_of_one_entry_is_of_rank_one():
    before = random_matrix(20, 30).bfloat16()
    after = before.clone()
    after[3, 4] += 1
    found = compare_matrix(before, after, 4)
    assert found.changed == 1 / 600
    assert (found.rank, found.effective_rank, found.stable_rank) == (1, pytest.approx(1), pytest.approx(1))
    size = abs(float(after[3, 4]) - float(before[3, 4]))
    assert found.norm == pytest.approx(size / float(before.float().norm()), rel=1e-5)
    assert found.alignment < 1


def test_no_update_is_of_rank_zero_and_turns_nothing():
    before = random_matrix(20, 30)
    found = compare_matrix(before, before.clone(), 4)
    assert (found.changed, found.norm, found.rank, found.effective_rank, found.stable_rank) == (0, 0, 0, 0, 0)
    assert found.alignment == pytest.approx(1)
    assert found.spectral_norm_before == found.spectral_norm_after


def test_an_update_of_a_matrix_of_zeros_has_a_size():
    found = compare_matrix(torch.zeros(6, 8), torch.eye(6, 8), 2)
    assert (found.changed, found.rank, found.spectral_norm_before) == (6 / 48, 6, 0)
    assert math.isfinite(found.norm)
    assert math.isnan(found.alignment)


def test_matrices_of_different_shapes_are_not_compared():
    with pytest.raises(ValueError, match=r"\(4, 5\) before and \(5, 4\) after"):
        compare_matrix(torch.zeros(4, 5), torch.zeros(5, 4), 1)


def test_an_update_that_is_not_finite_is_refused():
    after = torch.ones(4, 5)
    after[0, 0] = float("nan")
    with pytest.raises(DecompositionError, match="1 of 20 entries"):
        compare_matrix(torch.ones(4, 5), after, 1)
