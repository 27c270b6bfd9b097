"""Deltas of one base become one: disjoint ones exactly, overlapping ones as it is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, changed
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_lightning.delta import Delta, extract, merge
from lift_lightning.delta.bits import bits
from lift_lightning.delta.folder import applied
from lift_lightning.delta.sources import DictSource
from lift_lightning.errors import ConfigError, DeltaError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def delta_of(base: dict, trained: dict, label: str = "delta", **options) -> Delta:
    found = extract(DictSource(base, "base"), DictSource(trained, "trained"), **options)
    found.label = label
    return found


def readable_merge(base: list[float], ones: list[dict[int, float]], overlap: str) -> list[float]:
    """Entry by entry; in float64, which Python's numbers are."""
    merged = list(base)
    for i, before in enumerate(base):
        values = [one[i] for one in ones if i in one]
        if len(values) == 1 or (values and overlap == "last"):
            merged[i] = values[-1]
        elif values:
            total = 0.0
            for value in values:
                total += value - before
            merged[i] = before + (total / len(values) if overlap == "mean" else total)
    return merged


@st.composite
def situations(draw: st.DrawFn) -> tuple[torch.dtype, list[float], list[dict[int, float]]]:
    """A dtype, a base of N entries, and for each of two or three deltas the new values of some of them."""
    dtype = draw(st.sampled_from(DTYPES))
    numel = draw(st.integers(4, 60))
    number = st.floats(-8, 8, width=16)
    base = draw(st.lists(number, min_size=numel, max_size=numel))
    changes = st.dictionaries(st.integers(0, numel - 1), number, max_size=numel // 2)
    rounded = torch.tensor(base, dtype=dtype).tolist()
    ones = draw(st.lists(changes, min_size=2, max_size=3))
    known = [
        {i: value for i, value in zip(one, torch.tensor(list(one.values()), dtype=dtype).tolist(), strict=True)}
        for one in ones
    ]
    return dtype, rounded, known


def of_situation(
    dtype: torch.dtype, base: list[float], ones: list[dict[int, float]], **options
) -> tuple[dict[str, torch.Tensor], list[Delta], list[dict[int, float]]]:
    """The base, a delta of each, and what each does change: its bits differ from the base's."""
    weight = torch.tensor(base, dtype=dtype)
    deltas, known = [], []
    for one in ones:
        trained = weight.clone()
        for i, value in one.items():
            trained[i] = value
        where = (bits(trained) != bits(weight)).nonzero().squeeze(1).tolist()
        known.append({i: trained[i].item() for i in where})
        deltas.append(delta_of({"w": weight}, {"w": trained}, **options))
    return {"w": weight}, deltas, known


@settings(max_examples=200, deadline=None)
@given(situations(), st.sampled_from(["last", "mean", "sum"]))
def test_a_merge_is_that_of_the_definition(situation, overlap: str):
    dtype, base, ones = situation
    weights, deltas, known = of_situation(dtype, base, ones)
    merged = merge(deltas, overlap, base=DictSource(weights, "base"))
    expected = torch.tensor(readable_merge(base, known, overlap), dtype=torch.float64).to(dtype)
    # Entries that one delta or none changes: their own bits.
    assert_same_bits(dict(applied(DictSource(weights, "base"), merged)), {"w": expected})


@settings(max_examples=200, deadline=None)
@given(situations(), st.booleans(), st.booleans())
def test_disjoint_deltas_are_merged_exactly_whatever_is_chosen(situation, with_base: bool, base_values: bool):
    dtype, base, ones = situation
    apart: list[dict[int, float]] = []
    for one in ones:
        taken = {i for other in apart for i in other}
        # At most a fifth, so that they are stored sparsely and are not taken for changed everywhere.
        apart.append({i: value for i, value in list(one.items())[: len(base) // 5] if i not in taken})
    weights, deltas, known = of_situation(dtype, base, apart, store_base_values=base_values)
    source = DictSource(weights, "base")
    everything = {i: value for one in known for i, value in one.items()}
    expected = weights["w"].clone()
    for i, value in everything.items():
        expected[i] = value
    for overlap in ("refuse", "last", "mean", "sum") if with_base else ("refuse", "last"):
        merged = merge(deltas, overlap, base=source if with_base else None)
        assert_same_bits(dict(applied(source, merged)), {"w": expected})
        assert merged.description.base_values == base_values
        if base_values and merged.description.tensors["w"].kind == "sparse":
            where = merged.entries("w")[0].long()
            assert torch.equal(bits(merged.tensors["w.base_values"]), bits(weights["w"])[where])


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(20, 20, generator=generator) for name in ("a", "b", "c")}


def test_overlapping_deltas_are_refused_with_how_many():
    base = weights()
    one = delta_of(base, {**base, "a": changed(base["a"], [1, 2, 3, 4])}, "one")
    two = delta_of(base, {**base, "a": changed(base["a"], [3, 4, 9], seed=1)}, "two")
    message = "2 of the 5 changed entries of a are changed by more than one of one, two: choose overlap=last, mean or"
    with pytest.raises(DeltaError, match=message):
        merge([one, two])


def test_a_merged_delta_says_what_it_is_made_of(tmp_path: Path):
    base = weights()
    one = delta_of(base, {**base, "a": changed(base["a"], [1])}, "one", recipe={"lr": 1}, model_config={"x": 1})
    two = delta_of(base, {**base, "b": changed(base["b"], [1])}, "two")
    merged = merge([one, two])
    assert merged.description.recipe == {
        "overlap": "refuse",
        "merged": [{"delta": "one", "recipe": {"lr": 1}}, {"delta": "two", "recipe": None}],
    }
    assert merged.description.model_config == {"x": 1}
    kinds = {name: record.kind for name, record in merged.description.tensors.items()}
    assert kinds == {"a": "sparse", "b": "sparse", "c": "same"}
    back = Delta.from_pretrained(merged.save_pretrained(tmp_path / "merged"))
    assert_same_bits(back.tensors, merged.tensors)


def test_differences_that_cancel_leave_the_base():
    base = {"a": torch.ones(100)}
    up, down = base["a"].clone(), base["a"].clone()
    up[[3, 4]], down[3] = 1.5, 0.5
    merged = merge([delta_of(base, {"a": up}), delta_of(base, {"a": down})], "sum", base=DictSource(base, "base"))
    assert merged.entries("a")[0].tolist() == [4]


@pytest.mark.parametrize("base_values", [False, True])
def test_tensors_that_are_stored_whole(base_values: bool):
    base = weights()
    source, densely = DictSource(base, "base"), {**base, "a": base["a"] + 1}
    dense = delta_of(base, densely, "dense", store_base_values=base_values)
    sparse = delta_of(base, {**base, "a": changed(base["a"], [3])}, "sparse", store_base_values=base_values)
    assert dense.description.tensors["a"].kind == "whole"
    with pytest.raises(DeltaError, match="1 of the 400 changed entries of a"):
        merge([dense, sparse])
    merged = merge([dense, sparse], "last")
    expected = densely["a"].clone()
    expected.view(-1)[3] = changed(base["a"], [3]).view(-1)[3]
    assert_same_bits(dict(applied(source, merged)), {**base, "a": expected})
    assert_same_bits(dict(applied(source, merge([sparse, dense], "last"))), densely)
    if base_values:
        assert_same_bits({"a": merged.tensors["a.base_whole"]}, {"a": base["a"]})
    summed = dict(applied(source, merge([dense, dense], "sum", base=source)))
    assert torch.allclose(summed["a"], base["a"] + 2)


def test_tensors_of_the_trained_checkpoints_only():
    base = weights()
    trained = {**base, "a": changed(base["a"], [3])}
    one, two = {**trained, "head": torch.ones(2)}, {**base, "head": torch.zeros(2)}
    first, second = delta_of(base, one, "one"), delta_of(base, two, "two")
    with pytest.raises(DeltaError, match="2 deltas add head, whose entries cannot be told apart"):
        merge([first, second])
    source = DictSource(base, "base")
    assert_same_bits(dict(applied(source, merge([first, second], "last"))), {**trained, "head": torch.zeros(2)})
    alone = merge([delta_of(base, {**base, "b": changed(base["b"], [0])}), first])
    assert_same_bits(dict(applied(source, alone)), {**trained, "head": torch.ones(2), "b": changed(base["b"], [0])})
    longer = {**base, "c": torch.ones(21, 20)}
    with pytest.raises(DeltaError, match="2 deltas reshape c"):
        merge([delta_of(base, longer), delta_of(base, longer)], "mean", base=source)


def test_a_tensor_that_one_removes_and_another_keeps():
    base = weights()
    fewer = {name: tensor for name, tensor in base.items() if name != "c"}
    one, two = delta_of(base, fewer, "one"), delta_of(base, {**base, "a": changed(base["a"], [0])}, "two")
    with pytest.raises(DeltaError, match="one removes c, two keeps it: merge deltas that agree"):
        merge([one, two])
    with pytest.raises(DeltaError, match="one removes c, two keeps it"):
        merge([two, one])
    assert merge([one, one]).description.tensors["c"].kind == "removed"


def test_deltas_of_different_bases_are_refused():
    base = weights()
    other = {**base, "b": changed(base["b"], [0])}
    one = delta_of(base, {**base, "a": changed(base["a"], [0])}, "one")
    two = delta_of(other, {**other, "a": changed(base["a"], [1])}, "two")
    with pytest.raises(DeltaError, match="one and two are of different bases, 'base' and 'base': they differ in b"):
        merge([one, two])
    narrow = {name: tensor.bfloat16() for name, tensor in base.items()}
    with pytest.raises(DeltaError, match="is float32 in one and bfloat16 in three: extract both from"):
        merge([one, delta_of(base, narrow, "three")])
    with pytest.raises(DeltaError, match="is not that of the base of one"):
        merge([one, one], "sum", base=DictSource({**base, "a": base["a"] + 1}, "wrong"))
    with pytest.raises(DeltaError, match="'wrong' has no a: give the base, 'base'"):
        merge([one, one], "sum", base=DictSource({"b": base["b"]}, "wrong"))
    with pytest.raises(DeltaError, match="they differ in"):
        merge([one, delta_of({"a": base["a"]}, {"a": base["a"] + 1}, "four")])


def test_what_cannot_be_merged_is_refused():
    base = {"ids": torch.arange(100)}
    trained = {"ids": base["ids"].clone()}
    trained["ids"][3] = 0
    delta = delta_of(base, trained)
    with pytest.raises(ConfigError, match="at least 2 deltas, got 1"):
        merge([delta])
    with pytest.raises(ConfigError, match="overlap must be one of refuse, last, mean, sum, got 'first'"):
        merge([delta, delta], "first")
    with pytest.raises(ConfigError, match="overlap='mean' adds differences to the base's values: give the base"):
        merge([delta, delta], "mean")
    with pytest.raises(DeltaError, match="differences of torch.int64 are not added: choose overlap=last"):
        merge([delta, delta], "mean", base=DictSource(base, "base"))
