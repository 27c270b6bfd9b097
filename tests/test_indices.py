"""The flat-index layout, against a stable sort and a dictionary.

Guards: torch.topk and an unstable sort leave open which of equal scores they take, so that two devices would train
different entries; a threshold that is bracketed from a sample must be the right one whatever the sample looked like;
and a carried moment that lands one place off is invisible in the loss.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import carry_by_dict, stable_top_k

from lift_lightning import indices as layout

INT_DTYPES = [torch.int32, torch.int64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("values", [1, 2, 3, 50])
@pytest.mark.parametrize("k", [0, 1, 7, 60, 119, 120])
def test_top_k_equals_a_stable_sort(k: int, values: int, largest: bool):
    """120 scores of 1 to 50 different values, so the threshold is nearly always a tie."""
    for seed in range(5):
        scores = torch.randint(values, (12, 10), generator=generator(seed)).float()
        found = layout.top_k_indices(scores, k, largest=largest)
        assert found.dtype == torch.int64
        assert torch.equal(found, stable_top_k(scores, k, largest=largest))


def test_top_k_literally():
    scores = torch.tensor([[1.0, 5.0, 5.0], [0.0, 5.0, 2.0]])
    assert layout.top_k_indices(scores, 2).tolist() == [1, 2]  # three entries tie at 5: the lower two win
    assert layout.top_k_indices(scores, 4).tolist() == [1, 2, 4, 5]
    assert layout.top_k_indices(scores, 2, largest=False).tolist() == [0, 3]
    assert layout.top_k_indices(scores.T, 2).tolist() == [2, 3]  # as it looks, not as it lies in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_k_of_distinct_scores(dtype: torch.dtype):
    scores = torch.randperm(200, generator=generator()).to(dtype)  # integers up to 256 are exact in bfloat16
    assert sorted(scores[layout.top_k_indices(scores, 20)].tolist()) == list(range(180, 200))


def test_top_k_takes_infinite_scores():
    scores = torch.tensor([1.0, float("inf"), 0.0, float("inf"), 2.0])
    assert layout.top_k_indices(scores, 1).tolist() == [1]
    assert layout.top_k_indices(scores, 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("k", [-1, 7])
def test_top_k_out_of_range(k: int):
    with pytest.raises(ValueError, match=f"k must be between 0 and the 6 scores there are, got {k}"):
        layout.top_k_indices(torch.ones(2, 3), k)


# ------------------------------------------------------------------ the bracket from a sample, and blocks of rows


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """A sample of 64 scores and blocks of 100, so that matrices of a few thousand entries take every path."""
    monkeypatch.setattr(layout, "_SAMPLE", 64)
    monkeypatch.setitem(layout._BLOCK_ENTRIES, "cpu", 100)


def some_k(entries: int) -> list[int]:
    return sorted({0, 1, 2, 7, entries // 20, entries // 2, entries * 19 // 20, entries - 2, entries - 1, entries})


def only_row(rows: int, columns: int, where: int) -> torch.Tensor:
    scores = torch.zeros(rows, columns)
    scores[where] = torch.rand(columns, generator=generator(3)) + 1
    return scores


def only_column(rows: int, columns: int, where: int) -> torch.Tensor:
    return only_row(columns, rows, where).T


def rows_of_any_magnitude(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    magnitudes = 10 ** (6 * torch.rand(rows, 1, generator=generator(seed)))
    return magnitudes * torch.rand(rows, columns, generator=generator(seed + 1))


INFINITE = torch.tensor([float("inf"), -float("inf"), 0.0, 1.0])
HARD = {
    "distinct": torch.randperm(2400, generator=generator()).view(40, 60).float(),
    "ascending": torch.arange(2400.0).view(40, 60),
    "descending": -torch.arange(2400.0).view(40, 60),
    "all equal": torch.full((40, 60), 0.25),
    "zeros of both signs": torch.tensor([0.0, -0.0]).repeat(1200).view(40, 60),
    "two values": torch.randint(2, (40, 60), generator=generator(1)).float(),
    "few values": torch.randint(9, (40, 60), generator=generator(2)).float(),
    "one value in a hundred": (torch.rand(40, 60, generator=generator(3)) < 0.01).float(),
    "infinities": INFINITE[torch.randint(4, (40, 60), generator=generator(4))],
    "rows of any magnitude": rows_of_any_magnitude(40, 60),
    "columns of any magnitude": rows_of_any_magnitude(60, 40).T,
    "the first row has all": only_row(40, 60, 0),
    "the second row has all": only_row(40, 60, 1),
    "the last row has all": only_row(40, 60, 39),
    "the first column has all": only_column(40, 60, 0),
    "the second column has all": only_column(40, 60, 1),
    "one row": torch.rand(1, 2400, generator=generator(5)),
    "one column": torch.rand(2400, 1, generator=generator(6)),
    "two columns": torch.rand(1200, 2, generator=generator(7)),
    "sorted in every row": torch.rand(40, 60, generator=generator(8)).sort().values,
    "sorted in every column": torch.rand(40, 60, generator=generator(9)).sort(dim=0).values,
    "as many as the sample": torch.rand(8, 8, generator=generator(10)),
    "the most that are not sampled": torch.rand(16, 16, generator=generator(11)),
    "one row more": torch.rand(17, 16, generator=generator(12)),
    "less than a sample": torch.rand(3, 5, generator=generator(13)),
    "a block and a part": torch.rand(7, 90, generator=generator(14)),
    "wider than a block": torch.rand(9, 300, generator=generator(15)),
}


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("name", HARD)
def test_hard_scores_equal_a_stable_sort(name: str, largest: bool, small_blocks: None):
    scores = HARD[name]
    shape = (scores.shape[0], scores.shape[1])
    for k in some_k(scores.numel()):
        expected = stable_top_k(scores, k, largest=largest)
        by_rows = layout.top_k_of_parts(scores.__getitem__, shape, k, scores.device, largest=largest)
        assert by_rows.dtype == torch.int64
        assert torch.equal(by_rows, expected)
        assert torch.equal(layout.top_k_indices(scores, k, largest=largest), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["distinct", "few values", "infinities", "zeros of both signs", "one column"])
def test_hard_scores_of_every_dtype(name: str, dtype: torch.dtype, small_blocks: None):
    scores = HARD[name].to(dtype)
    for k in some_k(scores.numel()):
        assert torch.equal(layout.top_k_indices(scores, k), stable_top_k(scores, k))
        assert torch.equal(layout.top_k_indices(scores, k, largest=False), stable_top_k(scores, k, largest=False))


@pytest.mark.parametrize("shape", [(2400,), (10, 12, 20), (4, 5, 6, 20), (2400, 1, 1)], ids=str)
def test_scores_of_any_shape(shape: tuple[int, ...], small_blocks: None):
    scores = rows_of_any_magnitude(40, 60).view(shape)
    for k in some_k(2400):
        assert torch.equal(layout.top_k_indices(scores, k), stable_top_k(scores, k))


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes_and_ties(seed: int, small_blocks: None):
    rng = generator(seed)
    rows, columns, values = (int(torch.randint(1, n, (), generator=rng)) for n in (120, 120, 3000))
    scores = torch.randint(values, (rows, columns), generator=rng).float()
    if seed % 2:
        scores *= rows_of_any_magnitude(rows, 1, seed)
    for k in torch.randint(rows * columns + 1, (6,), generator=rng).tolist():
        found = layout.top_k_of_parts(scores.__getitem__, (rows, columns), k, scores.device)
        assert torch.equal(found, stable_top_k(scores, k))


WRONG = {
    "nothing is known": (None, None),
    "the lower end is too high": (0.99, None),
    "the lower end is the threshold of fewer": (0.96, 0.97),
    "the upper end is too low": (0.1, 0.2),
    "both are above all": (2.0, 3.0),
    "both are below all": (-2.0, -1.0),
    "they are the wrong way round": (0.9, 0.1),
    "infinite": (-float("inf"), float("inf")),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_bracket_changes_what_is_found(name: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch):
    """The sample decides how much work there is and nothing else."""
    scores = (torch.rand(40, 60, generator=generator()) * 200).round() / 200  # with ties
    bracket = tuple(None if end is None else torch.tensor(end) for end in WRONG[name])
    monkeypatch.setattr(layout, "_bracket", lambda *_: bracket)
    for k in some_k(2400):
        found = layout.top_k_of_parts(scores.__getitem__, (40, 60), k, scores.device)
        assert torch.equal(found, stable_top_k(scores, k))


def test_ends_of_the_bracket_that_are_scores_themselves(small_blocks: None, monkeypatch: pytest.MonkeyPatch):
    """Every pair of scores as the bracket: off by one at an end would lose or repeat an entry."""
    scores = torch.randint(6, (4, 5), generator=generator()).float()
    for low in range(7):
        for high in range(-1, 7):
            monkeypatch.setattr(layout, "_bracket", lambda *_, ends=(low, high): tuple(map(torch.tensor, ends)))
            for k in range(21):
                found = layout.top_k_of_parts(scores.__getitem__, (4, 5), k, scores.device)
                assert torch.equal(found, stable_top_k(scores, k))


def test_a_bracket_that_holds_spares_the_second_pass(small_blocks: None):
    """Every row is asked for once, in blocks that follow each other, after one sample with a step."""
    scores = torch.rand(100, 50, generator=generator())
    asked = []

    def rows(part: tuple[slice, slice]) -> torch.Tensor:
        asked.append(part[0])
        return scores[part]

    assert torch.equal(layout.top_k_of_parts(rows, (100, 50), 250, scores.device), stable_top_k(scores, 250))
    sample, *blocks = asked
    assert sample.step > 1
    assert [(part.start, part.stop) for part in blocks] == [(at, at + 2) for at in range(0, 100, 2)]


@pytest.mark.parametrize("shape", [(4096, 11008), (14336, 4096), (4096, 128256), (16, 10**6), (10**6, 16)], ids=str)
def test_the_sample_is_a_small_share_of_the_scores(shape: tuple[int, int]):
    """All of it exists at one time, and what is made for it is made again for the blocks."""

    class Made(Exception):
        pass

    def rows(part: tuple[slice, slice]) -> torch.Tensor:
        raise Made(math.prod(len(range(*along.indices(size))) for along, size in zip(part, shape, strict=True)))

    with pytest.raises(Made) as made:
        layout._bracket(rows, shape, shape[0] * shape[1] // 20)
    assert made.value.args[0] <= shape[0] * shape[1] / 64


@pytest.mark.parametrize("columns", [1, 2**10, 2**18, 2**18 + 1, 2**40])
def test_a_block_has_a_row_at_least(columns: int):
    for device in ("cpu", "meta"):
        at_a_time = layout.rows_at_a_time(columns, torch.device(device))
        assert at_a_time >= 1
        assert at_a_time * columns <= max(columns, layout.rows_at_a_time(1, torch.device(device)))


@pytest.mark.parametrize("k", [-1, 7])
def test_rows_out_of_range(k: int):
    with pytest.raises(ValueError, match=f"k must be between 0 and the 6 scores there are, got {k}"):
        layout.top_k_of_parts(torch.ones(2, 3).__getitem__, (2, 3), k, torch.device("cpu"))


def test_scores_are_not_changed(small_blocks: None):
    scores = rows_of_any_magnitude(40, 60)
    before = scores.clone()
    for largest in (True, False):
        layout.top_k_indices(scores, 100, largest=largest)
    assert torch.equal(scores, before)


def test_index_dtype_changes_at_two_to_the_31():
    assert layout.index_dtype(1) == torch.int32
    assert layout.index_dtype(2**31 - 1) == torch.int32  # the largest index is 2^31 - 2
    assert layout.index_dtype(2**31) == torch.int64


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[0, 1]]), r"must be a vector of integers, got torch.int64 \(1, 2\)"),
        (torch.tensor([0.0, 1.0]), "got torch.float32"),
        (torch.tensor([True, False]), "got torch.bool"),
        (torch.tensor([-1, 3]), "indices from -1 to 3 do not lie in the 10 entries there are"),
        (torch.tensor([0, 10]), "indices from 0 to 10 do not lie in the 10 entries"),
        (torch.tensor([3, 1]), "ascending and without repeats"),
        (torch.tensor([1, 1]), "ascending and without repeats"),
        (torch.tensor([0, 50, 2]), "ascending and without repeats"),
    ],
)
def test_check_indices_refuses(indices: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=f"^layer.weight: .*{message}"):
        layout.check_indices(indices, 10, "layer.weight")


@pytest.mark.parametrize("indices", [[], [0], [9], [0, 9], list(range(10))])
@pytest.mark.parametrize("dtype", INT_DTYPES)
def test_check_indices_accepts(indices: list[int], dtype: torch.dtype):
    layout.check_indices(torch.tensor(indices, dtype=dtype), 10, "w")


@pytest.mark.parametrize("dtype", INT_DTYPES)
def test_gather_and_scatter_literally(dtype: torch.dtype):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    at = torch.tensor([1, 3, 5], dtype=dtype)
    picked = layout.gather(weight, at)
    assert picked.tolist() == [1.0, 3.0, 5.0]
    assert not picked.requires_grad
    layout.scatter(weight, at, torch.tensor([-1.0, -3.0, -5.0]))
    assert weight.tolist() == [[0.0, -1.0, 2.0], [-3.0, 4.0, -5.0]]


def test_gather_reads_a_strided_tensor_as_it_looks():
    grad = torch.arange(6.0).view(3, 2).T  # a gradient may come in other strides than its weight
    assert layout.gather(grad, torch.tensor([0, 1, 4])).tolist() == [0.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", INT_DTYPES)
@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16, torch.float64])
def test_scatter_leaves_all_other_bits(width: torch.dtype, dtype: torch.dtype):
    """The other entries hold NaNs with payloads, -0.0 and denormals, which arithmetic on them would change."""
    words = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}[width]
    info = torch.iinfo(words)
    bits = torch.randint(info.min, info.max, (20, 15), generator=generator(), dtype=words)
    bits[0, :3] = torch.tensor([1, info.min, info.min + 1], dtype=words)  # denormals and -0.0
    weight = bits.clone().view(width)
    at = torch.randperm(300, generator=generator(1))[:40].sort().values.to(dtype)
    layout.scatter(weight, at, torch.full((40,), 1.5))
    others = torch.ones(300, dtype=torch.bool)
    others[at.long()] = False
    after = weight.view(words).view(-1)
    assert torch.equal(after[others], bits.view(-1)[others])
    assert (weight.view(-1)[at.long()] == 1.5).all()


def test_scatter_needs_contiguous_memory():
    transposed = torch.ones(2, 3).T
    with pytest.raises(ValueError, match=r"shape \(3, 2\) with strides \(1, 3\) is not contiguous; replace"):
        layout.scatter(transposed, torch.tensor([0]), torch.tensor([2.0]))
    with pytest.raises(ValueError, match="is not contiguous"):
        layout.flat_view(transposed)


def test_flat_view_shares_memory_and_no_graph():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    view = layout.flat_view(weight)
    view[4] = 7.0
    assert weight[1, 1] == 7.0
    assert not view.requires_grad


@pytest.mark.parametrize("dtype", INT_DTYPES)
@pytest.mark.parametrize(("before", "after"), [(0, 5), (5, 0), (30, 30), (30, 80), (80, 30), (100, 100), (1, 1)])
def test_carry_equals_a_dictionary(before: int, after: int, dtype: torch.dtype):
    for seed in range(4):
        rng = generator(seed)
        old = torch.randperm(100, generator=rng)[:before].sort().values.to(dtype)
        new = torch.randperm(100, generator=rng)[:after].sort().values.to(dtype)
        values = torch.rand(before, generator=rng)
        carried = layout.carry(values, old, new, 100)
        assert carried.dtype == torch.float32
        assert carried.tolist() == carry_by_dict(old.tolist(), values.tolist(), new.tolist())


@given(st.data(), st.sampled_from(INT_DTYPES), st.integers(1, 50))
def test_moments_of_any_two_selections_are_carried_as_by_a_dictionary(data: st.DataObject, dtype: torch.dtype, at_once):
    """From none to all entries before and after, values of any size, in pieces of any size."""
    numel = data.draw(st.integers(1, 40))
    places = st.lists(st.integers(0, numel - 1), unique=True).map(sorted)
    old, new = data.draw(places), data.draw(places)
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
    values = data.draw(st.lists(finite, min_size=len(old), max_size=len(old)))
    arguments = torch.tensor(values), torch.tensor(old, dtype=dtype), torch.tensor(new, dtype=dtype), numel
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "_CARRIED_ENTRIES", at_once)
        assert layout.carry(*arguments).tolist() == carry_by_dict(old, values, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_carry_keeps_the_dtype(dtype: torch.dtype):
    for old in (torch.tensor([2, 4]), torch.tensor([], dtype=torch.int64)):
        values = torch.arange(1, 1 + old.numel(), dtype=dtype)
        carried = layout.carry(values, old, torch.tensor([3, 4, 9]), 10)
        assert carried.dtype == dtype
        assert carried.tolist() == ([0.0, 2.0, 0.0] if old.numel() else [0.0] * 3)


def test_carry_goes_through_large_parameters_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout, "_CARRIED_ENTRIES", 7)
    rng = generator()
    old = torch.randperm(100, generator=rng)[:40].sort().values
    new = torch.randperm(100, generator=rng)[:50].sort().values
    values = torch.rand(40, generator=rng)
    assert layout.carry(values, old, new, 100).tolist() == carry_by_dict(old.tolist(), values.tolist(), new.tolist())


@pytest.mark.parametrize("dtype", INT_DTYPES)
@pytest.mark.parametrize("shards", [1, 2, 3, 7, 100])
def test_slices_for_shards_partition_the_selection(shards: int, dtype: torch.dtype):
    at = torch.randperm(100, generator=generator())[:37].sort().values.to(dtype)
    edges = [round(i * 100 / shards) for i in range(shards + 1)]
    parts = [at[layout.slice_for_shard(at, a, b)] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    assert torch.equal(torch.cat(parts), at)
    for part, a, b in zip(parts, edges[:-1], edges[1:], strict=True):
        assert all(a <= i < b for i in part.tolist())


def test_slice_for_shard_literally():
    at = torch.tensor([2, 5, 6, 9], dtype=torch.int32)
    assert layout.slice_for_shard(at, 5, 9) == slice(1, 3)  # 5 is in, 9 is not
    assert layout.slice_for_shard(at, 0, 2) == slice(0, 0)
    assert layout.slice_for_shard(at, 0, 10) == slice(0, 4)
    assert layout.slice_for_shard(at[:0], 0, 10) == slice(0, 0)
