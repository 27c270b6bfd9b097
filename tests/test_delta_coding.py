"""The code of positions gives them back, whatever they are, and is as short as it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lift_lightning.delta.coding import coded_bytes, decode, encode, low_bits


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[int], int]:
    """K ascending indices below N: from none to all, scattered or in runs."""
    numel = draw(st.integers(1, 400))
    kept = draw(st.lists(st.booleans(), min_size=numel, max_size=numel))
    return [i for i, one in enumerate(kept) if one], numel


def readable_code(indices: list[int], numel: int) -> bytes:
    """The definition, bit by bit."""
    if not indices:
        return b""
    low = math.floor(math.log2(numel / len(indices)))
    steps, before = "", 0
    for index in indices:
        steps += "0" * ((index >> low) - before) + "1"
        before = index >> low
    steps += "0" * (((numel - 1) >> low) - before)
    rows = [steps, *("".join(str(index >> bit & 1) for index in indices) for bit in range(low))]
    packed = b""
    for row in rows:
        row += "0" * (-len(row) % 8)
        packed += bytes(int(row[i : i + 8][::-1], 2) for i in range(0, len(row), 8))
    return packed


@given(selections())
@example(([], 1))
@example(([0], 1))
@example(([399], 400))
@example((list(range(400)), 400))
def test_the_code_is_that_of_the_definition_and_gives_the_indices_back(selection: tuple[list[int], int]):
    indices, numel = selection
    code = encode(torch.tensor(indices, dtype=torch.int32), numel)
    assert bytes(code.tolist()) == readable_code(indices, numel)
    assert code.numel() == coded_bytes(len(indices), numel)
    back = decode(code, len(indices), numel)
    assert back.tolist() == indices
    assert back.dtype == torch.int32


@given(st.integers(0, 2**40), st.data())
def test_few_indices_into_very_many_entries(last: int, data: st.DataObject):
    """Also beyond 2^31, where int32 ends: with N = 2^40 + 1 and few indices there are up to 40 low bits."""
    numel = 2**40 + 1
    indices = sorted({*data.draw(st.lists(st.integers(0, last), max_size=20)), last})
    back = decode(encode(torch.tensor(indices), numel), len(indices), numel)
    assert back.tolist() == indices
    assert back.dtype == torch.int64


@given(selections())
def test_an_index_takes_at_most_the_bits_that_are_promised(selection: tuple[list[int], int]):
    count, numel = len(selection[0]), selection[1]
    if count:
        promised = count * (2 + math.ceil(math.log2(numel / count))) + 8 * (low_bits(count, numel) + 1)
        assert 8 * coded_bytes(count, numel) <= promised  # each row is filled up to a byte


def test_five_percent_take_less_than_a_byte_each():
    # l = floor(log2(20)) = 4; one for each index, 20 / 2^4 = 1.25 steps, 4 low bits: 6.25 bits.
    assert coded_bytes(50_000, 1_000_000) * 8 / 50_000 == pytest.approx(6.25, abs=0.01)


@given(selections(), st.data())
def test_what_is_no_code_is_refused_or_another_selection(selection: tuple[list[int], int], data: st.DataObject):
    """A changed byte never gives something that is no selection. The checksum tells the rest."""
    indices, numel = selection
    code = encode(torch.tensor(indices, dtype=torch.int64), numel)
    if not code.numel():
        return
    code[data.draw(st.integers(0, code.numel() - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(code, len(indices), numel).tolist()
    except ValueError:
        return
    assert found == sorted(set(found))
    assert len(found) == len(indices)
    assert all(0 <= index < numel for index in found)


def test_a_code_of_another_length_or_count_is_refused():
    code = encode(torch.tensor([3, 5, 90]), 100)  # 5 low bits; 3 ones and 3 steps
    with pytest.raises(ValueError, match=r"3 indices below 100 is 6 bytes, got \(5,\)"):
        decode(code[:-1], 3, 100)
    with pytest.raises(ValueError, match=r"got \(6,\) torch.int8"):
        decode(code.to(torch.int8), 3, 100)
    code[0] |= 7
    with pytest.raises(ValueError, match="are said to be in it"):
        decode(code, 3, 100)
    # Two of one index: K = 2, N = 4, one low bit; both steps at 0 and both low bits 1.
    with pytest.raises(ValueError, match="not of ascending indices below 4"):
        decode(torch.tensor([0b011, 0b11], dtype=torch.uint8), 2, 4)
