"""What of sharding needs no second process; the rest is in test_distributed.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lift_lightning.sharding import VectorSum, all_ranks, local, owned, ranks_of, total_norm


class Work:
    """A sum that is there when it is waited for, and not before."""

    def __init__(self, tensor: Tensor, ranks: int) -> None:
        self.tensor, self.ranks = tensor, ranks

    def wait(self) -> None:
        self.tensor.mul_(self.ranks)


class Alike:
    """Stands in for `Ranks`: three that all hold the same."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def start_sum_(self, tensor: Tensor) -> Work:
        self.sizes.append(tensor.numel())
        return Work(tensor, 3)

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(3)


def test_a_plain_tensor_is_all_here():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    mine = owned(weight)
    assert (mine.shape, mine.start, mine.stop, mine.group, mine.numel) == ((3, 4), 0, 12, None, 12)
    assert local(weight).data_ptr() == weight.data_ptr()
    assert not local(weight).requires_grad
    assert ranks_of([weight]) is None
    assert all_ranks() is None


def vectors(sizes: dict[str, int]) -> dict[str, Tensor]:
    return {key: torch.full((size,), float(i + 1)) for i, (key, size) in enumerate(sizes.items())}


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_buckets_start_in_one_order_whatever_is_ready_first(order: str):
    sizes = {"a": 2, "b": 3, "c": 10, "d": 1}
    ranks: Any = Alike()
    summing = VectorSum(ranks, {key: 4 * size for key, size in sizes.items()}, bucket_bytes=20)
    own = vectors(sizes)
    for key in order:
        summing.ready(key, own[key])
    assert ranks.sizes == [5, 10, 1]  # a and b fit together, c is larger than a bucket, d finds no room beside it
    found = summing.finish()
    assert {key: total.tolist() for key, total in found.items()} == {key: (3 * own[key]).tolist() for key in sizes}
    assert summing.nbytes == 64


def test_a_bucket_starts_as_soon_as_it_is_complete():
    ranks: Any = Alike()
    summing = VectorSum(ranks, {"a": 8, "b": 8}, bucket_bytes=8)
    summing.ready("b", torch.ones(2))
    assert ranks.sizes == []  # b must not overtake a: another rank may have a first
    assert summing.missing() == ["a"]
    summing.ready("a", torch.ones(2))
    assert ranks.sizes == [2, 2]
    assert summing.missing() == []


def test_a_sum_of_nothing():
    assert VectorSum(Alike(), {}).finish() == {}


def test_the_norm_counts_what_is_split_once_for_each_part():
    whole, split = [torch.tensor([3.0])], [torch.tensor([2.0, 2.0])]
    ranks: Any = Alike()
    found = total_norm(whole, split, ranks, torch.device("cpu"))
    assert float(found) == pytest.approx((9 + 3 * 8) ** 0.5)
    assert float(total_norm(whole, split, None, torch.device("cpu"))) == pytest.approx(17**0.5)
    assert float(total_norm([], [], ranks, torch.device("cpu"))) == 0
