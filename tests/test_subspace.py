"""The subspace solver against the full SVD in float64: its masks, the error it reports, its warm start, its refusals.

Guards: an iteration that stops early looks like one that converged, so the reported error must be close to the real
one; float32 products square the singular values, and what under- or overflows, or goes through TF32 or autocast,
changes masks without a word; a spectrum without a gap has no answer, and must be told instead of guessed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest
import torch
from oracles import low_rank, stable_top_k
from torch import Tensor

from lift_lightning import SelectionConfig, indices, lowrank, select, selection, subspace
from lift_lightning.lowrank import DEFAULT_TOLERANCE, DecompositionError, LowRankFactors, low_rank_factors
from lift_lightning.subspace import BASIS_DTYPE, OVERSAMPLING, leading_subspace

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(sigma: Tensor, length: int, seed: int = 0) -> Tensor:
    """(S, length) float64 with the given singular values and random directions."""
    u = torch.linalg.qr(gaussian(len(sigma), len(sigma), seed)).Q
    v = torch.linalg.qr(gaussian(length, len(sigma), seed + 1000)).Q
    return (u * sigma) @ v.T


def power_law(side: int, length: int, exponent: float, seed: int = 0) -> Tensor:
    return with_spectrum(torch.arange(1, side + 1, dtype=torch.float64) ** -exponent, length, seed)


def solve(weight: Tensor, rank: int, **settings) -> LowRankFactors:
    return low_rank_factors(weight, rank, solver="subspace", **settings)


def error_of(factors: LowRankFactors, weight: Tensor, rank: int) -> float:
    """Relative Frobenius error against the best approximation, whatever the scale."""
    expected = low_rank(weight, rank)
    largest = expected.abs().max()
    product = factors.left.double() @ factors.right.double()
    return float(((product - expected) / largest).norm() / (expected / largest).norm())


def share_that_differs(factors: LowRankFactors, weight: Tensor, rank: int, density: float = 0.05) -> float:
    """Share of the mask of the largest entries that is not in the mask of the full SVD."""
    k = max(1, round(density * weight.numel()))
    ours = stable_top_k((factors.left @ factors.right).abs(), k)
    exact = stable_top_k(low_rank(weight, rank).abs(), k)
    return 1 - int(torch.isin(ours, exact).sum()) / k


# What the Gram matrix in float32 may add to the error before it is given up.
GRAM_FLOOR = DEFAULT_TOLERANCE / 4
# Of masks of about a thousand entries, one of which is a thousandth.
MASK_FLOOR = 2 * DEFAULT_TOLERANCE

SPECTRA = {
    **{f"power law {a}": lambda s, n, a=a: power_law(s, n, a) for a in (0.2, 0.5, 1.0, 2.0)},
    "gaussian": gaussian,
}


@pytest.mark.parametrize("rank", [1, 8, 48])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (150, 150)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_masks_are_those_of_the_full_svd(spectrum: str, shape: tuple[int, int], rank: int):
    weight = SPECTRA[spectrum](min(shape), max(shape))
    weight = (weight if shape[0] <= shape[1] else weight.T).float()
    factors = solve(weight, rank)
    assert factors.solver == "subspace"
    assert (factors.left.shape, factors.right.shape) == ((shape[0], rank), (rank, shape[1]))
    assert factors.left.dtype == factors.right.dtype == torch.float32
    assert factors.basis.shape == (min(shape), min(rank + OVERSAMPLING, min(shape)))
    assert factors.basis.dtype == BASIS_DTYPE
    assert 0 < factors.error <= DEFAULT_TOLERANCE
    assert error_of(factors, weight, rank) <= 1.5 * max(factors.error, GRAM_FLOOR)
    assert share_that_differs(factors, weight, rank) <= MASK_FLOOR


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", ["power law 0.5", "gaussian"])
def test_weights_of_every_dtype_are_taken_at_their_values(spectrum: str, dtype: torch.dtype):
    weight = SPECTRA[spectrum](100, 180).to(dtype)
    before = weight.clone()
    factors = solve(weight, 12)
    assert torch.equal(weight, before)
    assert error_of(factors, weight, 12) <= 1.5 * max(factors.error, GRAM_FLOOR)
    assert share_that_differs(factors, weight, 12) <= MASK_FLOOR


def test_the_factors_have_the_rank_and_the_orthonormal_columns_they_say():
    factors = solve(power_law(90, 140, 0.7).float(), 10)
    gram = factors.left.double().T @ factors.left.double()
    torch.testing.assert_close(gram, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-5)
    basis = factors.basis.double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(42, dtype=torch.float64), rtol=0, atol=2e-3)
    assert not factors.left.requires_grad


# ------------------------------------------------------------------ the reported error


def errors_on_random_matrices() -> list[tuple[float, float]]:
    """(reported, real) for 36 matrices, stopped at different tolerances so that the errors cover two decades."""
    found = []
    for seed in range(12):
        side, rank = (80, 120, 160)[seed % 3], (2, 8, 24, 40)[seed % 4]
        weights = [
            gaussian(side, side + 40, seed),
            power_law(side, 2 * side, 0.3, seed),
            power_law(side, side, 1, seed),
        ]
        for weight, tolerance in zip(weights, (0.05, 0.02, DEFAULT_TOLERANCE), strict=True):
            factors = solve(weight.float(), rank, tolerance=tolerance)
            found.append((factors.error, error_of(factors, weight, rank)))
    return found


def test_the_reported_error_is_the_real_one():
    pairs = errors_on_random_matrices()
    for reported, real in pairs:
        assert real <= 1.6 * max(reported, GRAM_FLOOR)
    close = [real >= reported / 3 for reported, real in pairs if reported > GRAM_FLOOR]
    assert len(close) >= 15
    assert sum(close) >= 0.8 * len(close)
    assert 0.5 < statistics.median(real / reported for reported, real in pairs) < 1.5


def test_a_residual_that_is_not_looked_at_would_show(monkeypatch: pytest.MonkeyPatch):
    """The check above can fail: with the residual taken for zero, the solver stops at once, far off."""
    weight = power_law(200, 260, 0.2)
    honest = solve(weight.float(), 16)
    look = subspace._look

    def blind(ritz, angles, *, through_gram):
        return look(ritz, torch.zeros_like(angles), through_gram=False)

    monkeypatch.setattr(subspace, "_look", blind)
    stopped_early = solve(weight.float(), 16)
    assert stopped_early.error == 0
    assert error_of(stopped_early, weight, 16) > 2 * DEFAULT_TOLERANCE > 2 * error_of(honest, weight, 16) / 1.5
    assert share_that_differs(stopped_early, weight, 16) > 2 * share_that_differs(honest, weight, 16)


@pytest.mark.parametrize("spectrum", ["power law 0.2", "power law 0.5", "gaussian"])
def test_a_smaller_tolerance_gives_a_smaller_error(spectrum: str):
    weight = SPECTRA[spectrum](160, 220).float()
    loose, tight = solve(weight, 20, tolerance=0.2), solve(weight, 20, tolerance=1e-4)
    assert tight.error <= 1e-4
    assert error_of(tight, weight, 20) <= 1.5e-4
    assert error_of(loose, weight, 20) > 3 * error_of(tight, weight, 20)


# ------------------------------------------------------------------ warm start


@pytest.mark.parametrize("spectrum", ["power law 0.2", "power law 0.5", "gaussian"])
def test_a_warm_start_takes_fewer_products_than_a_cold_one(spectrum: str):
    weight = SPECTRA[spectrum](160, 220)
    cold = leading_subspace(weight.float(), 16, DEFAULT_TOLERANCE)
    again = leading_subspace(weight.float(), 16, DEFAULT_TOLERANCE, cold.basis)
    assert again.applications < cold.applications
    changed = weight + 1e-3 * weight.norm() / 188 * gaussian(160, 220, seed=9)  # sqrt(160 * 220) = 188
    warm = leading_subspace(changed.float(), 16, DEFAULT_TOLERANCE, cold.basis)
    assert warm.applications < cold.applications
    assert warm.error <= DEFAULT_TOLERANCE
    factors = LowRankFactors(warm.left, warm.right, warm.basis, "subspace", warm.error)
    assert error_of(factors, changed, 16) <= 1.5 * DEFAULT_TOLERANCE


@pytest.mark.parametrize("change", [1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("spectrum", ["power law 0.2", "power law 0.5", "gaussian"])
def test_what_the_last_filter_moved_bounds_the_error(monkeypatch: pytest.MonkeyPatch, spectrum: str, change: float):
    """Without a Gram matrix, where the first look was good enough, the second product of the last is never made."""
    weight = SPECTRA[spectrum](160, 400)
    changed = weight + change * weight.norm() / 253 * gaussian(160, 400, seed=9)  # sqrt(160 * 400) = 253
    basis = leading_subspace(weight.float(), 16, DEFAULT_TOLERANCE).basis
    calls, outside = [], subspace._Products.outside
    monkeypatch.setattr(subspace._Products, "outside", lambda self: calls.append(1) or outside(self))
    warm = leading_subspace(changed.float(), 16, DEFAULT_TOLERANCE, basis)
    factors = LowRankFactors(warm.left, warm.right, warm.basis, "subspace", warm.error)
    assert error_of(factors, changed, 16) <= 1.2 * warm.error <= 1.2 * DEFAULT_TOLERANCE
    if change <= 1e-3:
        assert len(calls) == warm.applications - 1


@pytest.mark.parametrize("shape", [(100, 160), (160, 100)], ids=["wide", "tall"])
@pytest.mark.parametrize("columns", [0, 1, 20, 44, 45, 90, 100], ids=lambda b: f"b={b}")
def test_a_basis_of_another_rank_is_taken(columns: int, shape: tuple[int, int]):
    """R = 12 iterates on 44 columns; what is missing is drawn, what is too much is left."""
    weight = power_law(100, 160, 0.3)
    weight = weight if shape[0] < shape[1] else weight.T
    basis = torch.linalg.qr(gaussian(100, 100, 5)).Q[:, :columns].to(BASIS_DTYPE)
    factors = solve(weight.float(), 12, basis=basis)
    assert factors.basis.shape == (100, 44)
    assert error_of(factors, weight, 12) <= 1.5 * DEFAULT_TOLERANCE


@pytest.mark.parametrize(("before", "after"), [(4, 24), (24, 4)])
def test_the_rank_may_change_between_two_calls(before: int, after: int):
    weight = power_law(120, 150, 0.4).float()
    basis = solve(weight, before).basis
    factors = solve(weight, after, basis=basis)
    assert factors.basis.shape == (120, after + OVERSAMPLING)
    assert error_of(factors, weight, after) <= 1.5 * DEFAULT_TOLERANCE


def test_another_weight_than_the_basis_is_of():
    basis = solve(power_law(100, 160, 0.5, seed=1).float(), 8).basis
    weight = power_law(100, 160, 0.5, seed=2)
    assert error_of(solve(weight.float(), 8, basis=basis), weight, 8) <= 1.5 * DEFAULT_TOLERANCE


def test_the_basis_of_a_zero_matrix_is_a_start_like_any_other():
    basis = solve(torch.zeros(100, 160), 8).basis
    assert torch.isfinite(basis).all()
    weight = power_law(100, 160, 0.5)
    assert error_of(solve(weight.float(), 8, basis=basis), weight, 8) <= 1.5 * DEFAULT_TOLERANCE


@pytest.mark.parametrize("basis", [torch.ones(99, 4), torch.ones(160, 4), torch.ones(100)], ids=lambda b: str(b.shape))
@pytest.mark.parametrize("shape", [(100, 160), (160, 100)], ids=["wide", "tall"])
def test_a_basis_that_does_not_fit(shape: tuple[int, int], basis: Tensor):
    with pytest.raises(ValueError, match=r"a basis for a matrix with a shorter side of 100 is \(100, b\), got \("):
        solve(gaussian(*shape).float(), 8, basis=basis)


# ------------------------------------------------------------------ no answer, and matrices at the edge


def without_a_gap() -> dict[str, Tensor]:
    plateau = torch.ones(320, dtype=torch.float64)
    plateau[:4], plateau[100:] = 5.0, 0.5  # R = 16 in the middle of 96 equal singular values, with 32 more columns
    return {"all equal": torch.linalg.qr(gaussian(320, 320)).Q, "plateau": with_spectrum(plateau, 400)}


@pytest.mark.parametrize("name", ["all equal", "plateau"])
def test_a_spectrum_without_a_gap_is_told(name: str):
    weight = without_a_gap()[name].float()
    with pytest.raises(DecompositionError, match=r"did not converge on a 320x\d+ matrix at rank 16: .* solver auto or"):
        solve(weight, 16)
    exact = low_rank_factors(weight, 16, solver="exact")
    auto = low_rank_factors(weight, 16)
    assert (auto.solver, auto.error, auto.basis) == ("exact after subspace", 0.0, None)
    assert torch.equal(auto.left, exact.left)
    assert torch.equal(auto.right, exact.right)


def test_a_plateau_that_the_extra_columns_cover_is_no_obstacle():
    """20 equal singular values around R = 16; the product is not unique, but its distance to the matrix is."""
    sigma = torch.linspace(1.0, 0.1, 150, dtype=torch.float64)
    sigma[:10], sigma[10:30], sigma[30:] = 3.0, 2.0, 0.3 * sigma[30:]
    weight = with_spectrum(sigma, 200)
    factors = solve(weight.float(), 16)
    best = sigma[16:].square().sum().sqrt()
    assert float((weight - factors.left.double() @ factors.right.double()).norm() / best) < 1 + 1e-4


def test_auto_takes_the_subspace_only_where_it_is_cheaper():
    weight = power_law(129, 180, 1.0).float()
    assert low_rank_factors(weight, 8).solver == "subspace"
    assert low_rank_factors(weight.T, 32).solver == "subspace"  # 2 * (32 + 32) = 128 < 129
    assert low_rank_factors(weight, 33).solver == "exact"
    assert low_rank_factors(weight[:128], 8).solver == "exact"
    assert low_rank_factors(weight, 8, solver="exact").solver == "exact"


def test_zero_matrix():
    factors = solve(torch.zeros(60, 90), 5)
    assert torch.equal(factors.left @ factors.right, torch.zeros(60, 90))
    assert factors.error == 0


@pytest.mark.parametrize("rank", [9, 30, 64, 100])
@pytest.mark.parametrize("true_rank", [1, 8])
def test_a_rank_deficient_matrix_is_reproduced(true_rank: int, rank: int):
    weight = (gaussian(100, true_rank) @ gaussian(true_rank, 130, 1)).float()
    factors = solve(weight, rank)
    assert float((factors.left @ factors.right - weight).norm() / weight.norm()) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (5, 40), (40, 5), (33, 33)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 1000])
def test_matrices_narrower_than_the_columns_iterated_on(shape: tuple[int, int], rank: int):
    """All of the space is in the basis, so the first look is exact."""
    weight = gaussian(*shape)
    factors = solve(weight.float(), rank)
    r = min(rank, *shape)
    assert (factors.left.shape, factors.right.shape) == ((shape[0], r), (r, shape[1]))
    assert factors.basis.shape == (min(shape), min(shape))
    assert error_of(factors, weight, r) < 1e-4


def test_rank_of_the_shorter_side_is_the_matrix_itself():
    weight = gaussian(70, 110).float()
    factors = solve(weight, 70)
    torch.testing.assert_close(factors.left @ factors.right, weight, rtol=0, atol=1e-4)


SCALES = [1e-38, 1e-20, 1e-9, 1e-6, 1e6, 1e9, 1e15, 1e37]


@pytest.mark.parametrize("scale", SCALES)
def test_scale_does_not_matter(scale: float):
    weight = power_law(100, 150, 0.7)
    weight = (weight * (scale / weight.abs().max())).float()
    factors = solve(weight, 10)
    assert 0 < factors.error <= DEFAULT_TOLERANCE
    assert error_of(factors, weight, 10) <= 1.5 * max(factors.error, GRAM_FLOOR)


@pytest.mark.parametrize("exponent", [-12, -11.5, -11, -10.5, -10, 10, 10.5, 11, 11.5, 12])
def test_scales_whose_residuals_leave_float32_when_squared(exponent: float):
    """Residuals go with the square of the weight, their norm with the fourth power."""
    weight = gaussian(160, 200)
    weight = (weight * (10.0**exponent / weight.abs().max())).float()
    factors = solve(weight, 10)
    assert 0 < factors.error <= DEFAULT_TOLERANCE
    assert error_of(factors, weight, 10) <= 1.5 * max(factors.error, GRAM_FLOOR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted(bad: float):
    weight = gaussian(40, 50).float()
    weight[1, 2] = weight[3, 0] = bad
    with pytest.raises(DecompositionError, match="2 of 2000 entries are NaN or infinite"):
        solve(weight, 4)


def test_an_eigensolver_that_fails_is_told(monkeypatch: pytest.MonkeyPatch):
    def eigh(_):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(DecompositionError, match="did not converge on a 40x60 matrix.*the algorithm failed"):
        solve(gaussian(40, 60).float(), 2)


# ------------------------------------------------------------------ float32 and its limits


class Spy:
    """Stands in for `_Products` and keeps every instance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[subspace._Products] = []
        self.had_gram: list[bool] = []
        spy = self

        class Products(subspace._Products):
            def __init__(self, *arguments) -> None:
                super().__init__(*arguments)
                spy.made.append(self)
                spy.had_gram.append(self.gram is not None)

        monkeypatch.setattr(subspace, "_Products", Products)


@pytest.mark.parametrize("rank", [8, 32])
def test_outliers_make_the_solver_drop_the_gram_matrix(rank: int, monkeypatch: pytest.MonkeyPatch):
    """sigma_1 is 1000 times sigma_2: squared in float32, what is below 3e-4 of the largest is noise."""
    spy = Spy(monkeypatch)
    sigma = 1e-3 * torch.arange(1, 161, dtype=torch.float64) ** -0.5
    sigma[0] = 1.0
    weight = with_spectrum(sigma, 200)
    factors = solve(weight.float(), rank)
    assert spy.had_gram == [True]
    assert spy.made[0].gram is None
    assert factors.error <= DEFAULT_TOLERANCE
    assert error_of(factors, weight, rank) <= 1.5 * factors.error


@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2, 1e-1])
def test_outliers_do_not_spoil_the_error(ratio: float):
    sigma = ratio * torch.arange(1, 161, dtype=torch.float64) ** -0.5
    sigma[:2] = torch.tensor([1.0, 0.8])
    weight = with_spectrum(sigma, 200)
    factors = solve(weight.float(), 8)
    assert error_of(factors, weight, 8) <= 1.5 * max(factors.error, GRAM_FLOOR)
    assert share_that_differs(factors, weight, 8) <= MASK_FLOOR


@pytest.mark.parametrize("outlier", [1.0, 3.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("where", ["entry", "row", "column"])
def test_something_huge_never_hides_the_rest_of_the_mask(where: str, outlier: float):
    """It makes nearly all of the norm, so that an error relative to the norm says little about the other entries. What
    float32 cannot resolve beside it is not passed off as solved."""
    weight = power_law(300, 400, 0.5)
    part = {"entry": (3, 5), "row": (3,), "column": (slice(None), 5)}[where]
    weight[part] = weight[part].clamp(-1, 1).sign() * outlier
    factors = low_rank_factors(weight.float(), 32)
    assert factors.solver in ("subspace", "exact after subspace")
    assert share_that_differs(factors, weight, 32) <= 4 * DEFAULT_TOLERANCE
    if where == "entry" and outlier < 10:
        assert factors.solver == "subspace"


@pytest.mark.parametrize("exponent", [0.3, 1.0])
def test_a_direction_that_an_old_basis_cannot_see_is_found(exponent: float):
    """The 101st singular value becomes the first: the old basis, of the first 40, is orthogonal to its direction."""
    sigma = torch.arange(1, 161, dtype=torch.float64) ** -exponent
    basis = solve(with_spectrum(sigma, 240).float(), 8).basis
    sigma[100] = 2.0
    weight = with_spectrum(sigma, 240)
    factors = solve(weight.float(), 8, basis=basis)
    assert error_of(factors, weight, 8) <= 1.5 * DEFAULT_TOLERANCE


def test_the_gram_matrix_stays_where_it_does_no_harm(monkeypatch: pytest.MonkeyPatch):
    spy = Spy(monkeypatch)
    solve(power_law(120, 160, 0.5).float(), 8)
    assert spy.had_gram == [True]
    assert spy.made[0].gram is not None


def test_both_ways_of_multiplying_give_the_same(monkeypatch: pytest.MonkeyPatch):
    weight = power_law(120, 160, 0.5).float()
    with_gram = solve(weight, 8)
    real = subspace._Products.__init__

    def without(self, *arguments) -> None:
        real(self, *arguments)
        self.gram = None

    monkeypatch.setattr(subspace._Products, "__init__", without)
    alone = solve(weight, 8)
    torch.testing.assert_close(with_gram.left @ with_gram.right, alone.left @ alone.right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(80, 120), (120, 80)], ids=["wide", "tall"])
def test_float32_weights_are_not_copied(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    spy = Spy(monkeypatch)
    weight = gaussian(*shape).float()
    solve(weight, 4)
    assert spy.made[0].matrix.data_ptr() == weight.data_ptr()


def test_strided_views_are_taken_as_they_look():
    storage = gaussian(120, 200).float()
    for view in (storage.T, storage[:, ::2], storage[::2]):
        assert error_of(solve(view, 6), view, 6) <= 1.5 * DEFAULT_TOLERANCE


# ------------------------------------------------------------------ the same bits, whatever is set for training


def mask_and_basis(weight: Tensor, solver: str = "subspace") -> tuple[Tensor, Tensor | None]:
    found = select(weight, SelectionConfig(density=0.05, lra_rank=8, solver=solver))
    return found.indices, found.basis


def test_the_same_bits_twice():
    weight = gaussian(150, 200).float()
    torch.manual_seed(1)
    first = mask_and_basis(weight)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = mask_and_basis(weight)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.fixture
def precision():
    """Sets the precision of float32 products; all settings are back after the test."""
    before = torch.get_float32_matmul_precision()
    backends = [b for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if hasattr(b, "fp32_precision")]
    apart = [backend.fp32_precision for backend in backends]
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)
    for backend, value in zip(backends, apart, strict=True):
        backend.fp32_precision = value


def settings_now() -> list:
    backends = [b for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if hasattr(b, "fp32_precision")]
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return [torch.get_float32_matmul_precision(), autocast, *(b.fp32_precision for b in backends)]


@pytest.mark.parametrize("solver", ["subspace", "exact"])
@pytest.mark.parametrize("value", ["medium", "high"])
def test_the_precision_of_training_does_not_matter_and_is_put_back(value: str, solver: str, precision):
    weight = gaussian(150, 200).float()
    expected = mask_and_basis(weight, solver)[0]
    precision(value)
    before = settings_now()
    assert torch.equal(mask_and_basis(weight, solver)[0], expected)
    assert settings_now() == before
    assert before[0] == value
    weight[0, 0] = float("nan")
    with pytest.raises(DecompositionError):
        mask_and_basis(weight, solver)
    assert settings_now() == before


SET_FOR_ONE_BACKEND = """
import torch
from lift_lightning import SelectionConfig, select_indices

weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
config = SelectionConfig(rank=1, lra_rank=4, solver="subspace")
expected = select_indices(weight, config)
matmul = torch.backends.{backend}.matmul
if hasattr(matmul, "fp32_precision"):  # older torch has only the older way
    matmul.fp32_precision = "tf32"
    assert torch.equal(select_indices(weight, config), expected)
    assert matmul.fp32_precision == "tf32"
"""


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_precisions_that_were_set_for_one_backend_do_not_stand_in_the_way(backend: str):
    """The newer way to set TF32. In a process of its own: what the older way answers depends on all that was set."""
    script = SET_FOR_ONE_BACKEND.format(backend=backend)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize("value", ["highest", "medium"])
def test_the_settings_are_put_back_after_an_exception_half_way(value: str, precision, monkeypatch):
    def eigh(_):
        if hasattr(torch.backends.mkldnn.matmul, "fp32_precision"):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert not torch.is_autocast_enabled("cpu")
        raise torch.linalg.LinAlgError("failed to converge")

    precision(value)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with torch.autocast("cpu", torch.bfloat16):
        before = settings_now()
        with pytest.raises(DecompositionError):
            solve(gaussian(40, 60).float(), 4)
        assert settings_now() == before


@pytest.mark.parametrize("solver", ["subspace", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_matter(dtype: torch.dtype, solver: str):
    weight = gaussian(150, 200).to(dtype)
    expected = mask_and_basis(weight, solver)
    with torch.autocast("cpu", torch.bfloat16):
        found = mask_and_basis(weight, solver)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found[0], expected[0])
    assert solver == "exact" or torch.equal(found[1], expected[1])


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("solver", ["subspace", "exact"])
def test_scores_are_made_a_block_at_a_time(solver: str, monkeypatch: pytest.MonkeyPatch):
    """No (M, N) matrix of scores exists; only the sample, a small share of them, may be larger than a block."""
    weight = gaussian(300, 400).float()
    expected = select(weight, SelectionConfig(density=0.05, lra_rank=8, solver=solver)).indices
    monkeypatch.setitem(indices._BLOCK_ENTRIES, "cpu", 4096)
    monkeypatch.setattr(indices, "_SAMPLE", 1024)
    sizes, real = [], selection.top_k_of_parts

    def spy(rows, shape, *arguments, **settings):
        def counted(part):
            block = rows(part)
            sizes.append((part[0].step is None, block.numel()))
            return block

        return real(counted, shape, *arguments, **settings)

    monkeypatch.setattr(selection, "top_k_of_parts", spy)
    assert torch.equal(select(weight, SelectionConfig(density=0.05, lra_rank=8, solver=solver)).indices, expected)
    blocks = [size for is_block, size in sizes if is_block]
    assert sum(blocks) == 300 * 400  # every score is made once
    assert max(blocks) <= 4096
    samples = [size for is_block, size in sizes if not is_block]
    assert len(samples) == 1
    assert samples[0] <= 300 * 400 / 4


def test_the_weight_is_looked_at_before_it_is_solved(monkeypatch: pytest.MonkeyPatch):
    """A weight that is not finite never reaches the iteration, where NaN would look like no convergence."""
    monkeypatch.setattr(lowrank, "leading_subspace", None)
    with pytest.raises(DecompositionError, match="NaN or infinite"):
        low_rank_factors(torch.full((300, 300), float("nan")), 4)
