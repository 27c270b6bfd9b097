"""The flat-index layout, against a stable sort and a dictionary.

Guards: torch.topk and an unstable sort leave open which of equal scores they take, so that two devices would train
different entries; and a carried moment that lands one place off is invisible in the loss.
"""

from __future__ import annotations

import pytest
import torch
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
        position, kept = layout.locate(old, new)
        carried = layout.carry(values, position, kept)
        assert carried.dtype == torch.float32
        assert carried.tolist() == carry_by_dict(old.tolist(), values.tolist(), new.tolist())
        filled = layout.carry(values, position, kept, fill=-2.0)
        assert filled.tolist() == carry_by_dict(old.tolist(), values.tolist(), new.tolist(), fill=-2.0)
        assert kept.tolist() == [i in set(old.tolist()) for i in new.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_carry_keeps_the_dtype(dtype: torch.dtype):
    for old in (torch.tensor([2, 4]), torch.tensor([], dtype=torch.int64)):
        position, kept = layout.locate(old, torch.tensor([3, 4, 9]))
        values = torch.arange(1, 1 + old.numel(), dtype=dtype)
        carried = layout.carry(values, position, kept)
        assert carried.dtype == dtype
        assert carried.tolist() == ([0.0, 2.0, 0.0] if old.numel() else [0.0] * 3)


def test_carry_fills_from_a_tensor():
    new = torch.tensor([0, 4, 9])
    fill = torch.tensor([10.0, 20.0, 30.0])
    position, kept = layout.locate(torch.tensor([2, 4]), new)
    assert layout.carry(torch.tensor([1.0, 2.0]), position, kept, fill=fill).tolist() == [10.0, 2.0, 30.0]
    position, kept = layout.locate(torch.tensor([], dtype=torch.int64), new)
    assert layout.carry(torch.tensor([]), position, kept, fill=fill).tolist() == [10.0, 20.0, 30.0]


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
