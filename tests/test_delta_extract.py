"""What differs is found to the last bit, in every dtype and however a checkpoint is stored."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from deltas import assert_same_bits, changed, delta_of, read, write
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_lightning.delta import diff, open_folder
from lift_lightning.delta.bits import bits, checksum
from lift_lightning.delta.extract import Parts, extract
from lift_lightning.delta.folder import applied
from lift_lightning.delta.sources import DictSource
from lift_lightning.errors import DeltaError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"embed.weight": (10, 8), "layers.0.weight": (40, 30), "layers.1.weight": (40, 30), "norm.weight": (8,)}
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_delta_is_what_differs(dtype: torch.dtype, shards: int, tmp_path: Path):
    base = weights(dtype)
    trained = {
        **base,
        "layers.0.weight": changed(base["layers.0.weight"], [0, 7, 1199]),
        "norm.weight": base["norm.weight"] + 1,  # densely trained: whole is shorter than positions and values
    }
    delta = delta_of(
        write(tmp_path / "base", base, shards=shards), write(tmp_path / "trained", trained, shards=4 - shards)
    )
    kinds = {name: (record.kind, record.changed) for name, record in delta.description.tensors.items()}
    assert kinds == {
        "embed.weight": ("same", 0),
        "layers.0.weight": ("sparse", 3),
        "layers.1.weight": ("same", 0),
        "norm.weight": ("whole", 8),
    }
    indices, values = delta.entries("layers.0.weight")
    assert indices.tolist() == [0, 7, 1199]
    assert torch.equal(bits(values), bits(trained["layers.0.weight"])[indices.long()])
    assert delta.description.tensors["embed.weight"].base_sha256 == checksum(base["embed.weight"])
    assert sorted(delta.tensors) == ["layers.0.weight.indices", "layers.0.weight.values", "norm.weight.whole"]
    with open_folder(str(tmp_path / "base")) as source:
        assert_same_bits(dict(applied(source, delta)), trained)
        assert_same_bits(dict(applied(source, delta)), trained)  # what was read first was not written to


# float16 first: numbers that hypothesis likes are then not all infinite in it.
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_bits_come_back(dtype: torch.dtype, data: st.DataObject):
    """Zeros of both signs, infinities and NaNs of any payload, in the base and in what came of it."""
    size = {torch.float32: 32}.get(dtype, 16)
    integers = {32: torch.int32, 16: torch.int16}[size]
    drawn = st.integers(-(2 ** (size - 1)), 2 ** (size - 1) - 1)
    count = data.draw(st.integers(1, 40))
    patterns = data.draw(st.lists(drawn, min_size=count, max_size=count))
    others = data.draw(st.lists(st.one_of(st.none(), drawn), min_size=count, max_size=count))
    base = torch.tensor(patterns, dtype=integers).view(dtype)
    trained = torch.tensor(
        [old if new is None else new for old, new in zip(patterns, others, strict=True)], dtype=integers
    ).view(dtype)
    before, after = DictSource({"w": base.clone()}, "base"), DictSource({"w": trained}, "trained")
    delta = extract(before, after, store_base_values=data.draw(st.booleans()))
    expected = sum(new is not None and new != old for old, new in zip(patterns, others, strict=True))
    assert delta.description.tensors["w"].changed == expected
    assert_same_bits(dict(applied(before, delta)), {"w": trained})
    assert_same_bits({"w": before.read("w")}, {"w": base})


def test_minus_zero_and_a_nan_of_another_payload_are_changes():
    base = torch.tensor([0.0, float("nan"), 1.0, 2.0] + [3.0] * 60)
    trained = base.clone()
    trained[0] = -0.0
    bits(trained)[1] += 1
    delta = extract(DictSource({"w": base}, "base"), DictSource({"w": trained}, "trained"))
    assert delta.entries("w")[0].tolist() == [0, 1]


@pytest.mark.parametrize(("stored", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_base_in_another_dtype_is_compared_as_it_is_loaded(stored: torch.dtype, loaded: torch.dtype, tmp_path: Path):
    base = weights(stored)
    trained = {name: tensor.to(loaded) for name, tensor in base.items()}
    trained["layers.0.weight"] = changed(trained["layers.0.weight"], [3, 400])
    delta = delta_of(write(tmp_path / "base", base), write(tmp_path / "trained", trained))
    assert {name: record.changed for name, record in delta.description.tensors.items() if record.changed} == {
        "layers.0.weight": 2
    }
    with open_folder(str(tmp_path / "base")) as source:
        assert_same_bits(dict(applied(source, delta)), trained)


def test_tensors_of_one_checkpoint_only_and_of_another_shape(tmp_path: Path):
    """A classifier has a new head and lost the old one; added tokens make the embedding longer."""
    base = {**weights(), "lm_head.weight": torch.randn(10, 8).bfloat16()}
    trained = {name: tensor for name, tensor in base.items() if name != "lm_head.weight"}
    trained["score.weight"] = torch.randn(3, 8).bfloat16()
    trained["embed.weight"] = torch.cat([base["embed.weight"], torch.randn(2, 8).bfloat16()])
    delta = delta_of(write(tmp_path / "base", base), write(tmp_path / "trained", trained))
    kinds = {name: record.kind for name, record in delta.description.tensors.items()}
    assert kinds["lm_head.weight"] == "removed"
    assert kinds["score.weight"] == "added"
    assert kinds["embed.weight"] == "whole"
    assert delta.description.tensors["embed.weight"].base_shape == (10, 8)
    with open_folder(str(tmp_path / "base")) as source:
        assert_same_bits(dict(applied(source, delta)), trained)


def test_base_values_are_stored_on_request(tmp_path: Path):
    base = weights()
    trained = {**base, "layers.0.weight": changed(base["layers.0.weight"], [5, 6]), "norm.weight": -base["norm.weight"]}
    delta = delta_of(write(tmp_path / "base", base), write(tmp_path / "trained", trained), store_base_values=True)
    values = delta.tensors["layers.0.weight.base_values"]
    assert torch.equal(bits(values), bits(base["layers.0.weight"])[5:7])
    assert torch.equal(delta.tensors["norm.weight.base_whole"], base["norm.weight"])


def test_integer_and_bool_tensors_are_compared_too():
    base = {"ids": torch.arange(100), "mask": torch.ones(100, dtype=torch.bool)}
    trained = {"ids": base["ids"].clone(), "mask": base["mask"].clone()}
    trained["ids"][7], trained["mask"][9] = -1, False
    delta = extract(DictSource(base, "base"), DictSource(trained, "trained"))
    assert delta.entries("ids")[0].tolist() == [7]
    assert delta.entries("mask")[0].tolist() == [9]
    assert_same_bits(dict(applied(DictSource(base, "base"), delta)), trained)


def test_what_cannot_be_compared_is_refused(tmp_path: Path):
    base = {"w": torch.zeros(4)}
    with pytest.raises(DeltaError, match="w is torch.float32 in one checkpoint and torch.int64 in the other"):
        extract(DictSource(base, "base"), DictSource({"w": torch.zeros(4, dtype=torch.int64)}, "trained"))
    with pytest.raises(DeltaError, match=r"no tensor of the same name \(such as 'w' and 'model.w'\)"):
        extract(DictSource(base, "base"), DictSource({"model.w": torch.zeros(4)}, "trained"))


def test_the_names_config_and_recipe_are_kept(tmp_path: Path):
    base, trained = weights(), {**weights(), "norm.weight": weights()["norm.weight"] * 2}
    folders = write(tmp_path / "base", base), write(tmp_path / "trained", trained, config='{"model_type": "llama"}')
    delta = delta_of(*folders, base_name="user/model", revision="abc", recipe={"lr": 1e-3})
    assert delta.description.base_label == "'user/model' at revision abc"
    assert delta.description.recipe == {"lr": 1e-3}
    assert delta.description.model_config == {"model_type": "llama"}
    assert delta_of(*folders).description.base_label == repr(str(tmp_path / "base"))


def test_diff_tells_how_much_and_how_far(tmp_path: Path):
    left = weights(torch.float32)
    right = {**left, "norm.weight": left["norm.weight"].clone(), "new": torch.zeros(2)}
    right["norm.weight"][[1, 2]] += torch.tensor([0.5, -3.0])
    right["embed.weight"] = left["embed.weight"][:5].clone()
    del right["layers.1.weight"]
    with open_folder(str(write(tmp_path / "l", left))) as one, open_folder(str(write(tmp_path / "r", right))) as other:
        found = {difference.name: difference for difference in diff(one, other)}
    assert {name: (one.kind, one.changed) for name, one in found.items()} == {
        "embed.weight": ("reshaped", 40),
        "layers.0.weight": ("same", 0),
        "layers.1.weight": ("left only", 1200),
        "new": ("right only", 2),
        "norm.weight": ("changed", 2),
    }
    assert found["norm.weight"].largest == pytest.approx(3.0, abs=1e-6)


def test_no_two_whole_models_are_in_memory(tmp_path: Path):
    """One tensor of each checkpoint is read at a time, and let go."""
    alive, most = 0, 0

    def let_go() -> None:
        nonlocal alive
        alive -= 1

    class Watched(DictSource):
        def read(self, name: str) -> torch.Tensor:
            nonlocal alive, most
            tensor = super().read(name).clone()
            weakref.finalize(tensor, let_go)
            alive += 1
            most = max(most, alive)
            return tensor

    base = {f"layers.{i}": torch.randn(20, 20) for i in range(12)}
    trained = {name: changed(tensor, [1]) for name, tensor in base.items()}
    extract(Watched(base, "base"), Watched(trained, "trained"))
    assert 2 <= most <= 4  # the pair that is compared, and perhaps the one before it


def test_parts_need_a_tensor():
    with pytest.raises(AssertionError, match="in one of them"):
        Parts().compare("w", None, None)


def test_read_gives_what_was_written(tmp_path: Path):
    assert_same_bits(read(write(tmp_path / "base", weights(), shards=2)), weights())
