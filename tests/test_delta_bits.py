"""Entries are told apart by their bits, in every dtype that weights come in."""

from __future__ import annotations

import hashlib

import pytest
import torch

from lift_lightning.delta.bits import bits, checksum, differing, positions, same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_compared_in_every_dtype(dtype: torch.dtype):
    left = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype)
    right = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    assert positions(differing(left, right)).tolist() == [2, 4]
    assert same_bits(left, left.clone())
    assert not same_bits(left, right)
    assert not same_bits(left, left[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_compares_equal_or_never_equal_is_told_by_its_bits(dtype: torch.dtype):
    zeros = torch.tensor([0.0, -0.0, 1.0]).to(dtype)
    assert positions(differing(zeros, torch.zeros(3, dtype=dtype))).tolist() == [1, 2]
    nan = torch.tensor([float("nan")] * 2).to(dtype)
    other = nan.clone()
    bits(other)[1] += 1  # another payload
    assert positions(differing(nan, other)).tolist() == [1]
    assert positions(differing(nan, nan.clone())).tolist() == []


def test_the_checksum_is_of_the_bytes_in_order():
    tensor = torch.tensor([[1.0, -0.0], [2.0, 3.0]], dtype=torch.bfloat16)
    expected = hashlib.sha256(tensor.view(torch.int16).numpy().tobytes()).hexdigest()
    assert checksum(tensor) == expected
    assert checksum(tensor.T.contiguous().T) == expected  # a transposed view of the same matrix
    assert checksum(tensor.abs()) != expected
    assert checksum(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()
    assert len(checksum(torch.tensor(1.0))) == 64  # of no dimension


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="at most 8 can be compared"):
        bits(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="not contiguous"):
        bits(torch.zeros(2, 3).T)
