"""The matrices of checkpoints on disk: which there are and in which order, what is read, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_param_groups import MODELS
from tiny import save_tiny_llama, tiny_llama
from torch import nn

from lift_lightning.analysis.matrices import Place, layer_types, open_checkpoint, open_together, places_of
from lift_lightning.errors import ConfigError
from lift_lightning.models import ModelUnavailableError
from lift_lightning.param_groups import Target, build_param_groups, match_targets

HIDDEN, INNER, KEYS = 32, 48, 16
LLAMA_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def saved(name: str, folder: Path, **options) -> nn.Module:
    """One of the small models of the parameter groups' tests, written to a folder."""
    torch.manual_seed(5)
    model = MODELS[name]()
    model.save_pretrained(folder, **options)
    return model


# ------------------------------------------------------------------ places


def test_every_matrix_of_a_llama_is_there_in_the_models_order(tiny_model_dir: Path):
    with open_checkpoint(str(tiny_model_dir)) as found:
        places = found.places
        assert found.label == str(tiny_model_dir)
    assert places == [
        Place(f"model.layers.{depth}.{name}.weight", name.split(".")[1], depth, shape)
        for depth in range(2)
        for name, shape in LLAMA_SHAPES.items()
    ]


def test_matrices_are_read_as_they_are_in_the_model(tiny_model_dir: Path):
    weights = dict(tiny_llama().named_parameters())
    with open_checkpoint(str(tiny_model_dir)) as found:
        for place in found.places:
            assert torch.equal(found.read(place), weights[place.name].detach())


def test_matrices_of_narrow_weights_are_read_in_float32(tmp_path: Path):
    model = tiny_llama().bfloat16()
    model.save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path)) as found:
        matrix = found.read(found.places[0])
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, model.model.layers[0].self_attn.q_proj.weight.detach().float())


def test_weights_in_several_files_are_read(tmp_path: Path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = dict(model.named_parameters())
    with open_checkpoint(str(tmp_path)) as found:
        assert len(found.places) == 14
        assert all(torch.equal(found.read(place), weights[place.name].detach()) for place in found.places)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"self_attn.q_proj"}),
        ("mlp", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (["k_proj", r"layers\.1\.mlp\.up_proj"], {"self_attn.k_proj", "mlp.up_proj"}),
    ],
)
def test_the_matrices_can_be_named(tiny_model_dir: Path, targets, expected):
    with open_checkpoint(str(tiny_model_dir), target_modules=targets) as found:
        assert {".".join(place.name.split(".")[3:5]) for place in found.places} == expected


def test_a_pattern_that_matches_nothing_is_told_with_what_there_is(tiny_model_dir: Path):
    with (
        pytest.raises(ConfigError, match=r"'qproj' matched none(.|\n)*self_attn\.q_proj\.weight"),
        open_checkpoint(str(tiny_model_dir), target_modules="qproj"),
    ):
        pass


def test_conv1d_layers_are_matrices_of_outputs_and_inputs_too(tmp_path: Path):
    model = saved("gpt2", tmp_path)
    with open_checkpoint(str(tmp_path)) as found:
        assert found.places == [
            Place(f"transformer.h.{i}.{name}.weight", layer, i, shape)
            for i in range(2)
            for name, layer, shape in (
                ("attn.c_attn", "c_attn", (48, 16)),
                ("attn.c_proj", "attn.c_proj", (16, 16)),
                ("mlp.c_fc", "c_fc", (64, 16)),
                ("mlp.c_proj", "mlp.c_proj", (16, 64)),
            )
        ]
        for place in found.places:
            assert torch.equal(found.read(place), model.get_parameter(place.name).detach().T)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_matrix_that_is_not_finite_is_told_when_it_is_read(tmp_path: Path, bad: float):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    model.save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path), target_modules="up_proj") as found:
        first, second = found.places
        assert found.read(first).shape == (INNER, HIDDEN)
        with pytest.raises(ConfigError, match=rf"{second.name} of '{tmp_path}' holds NaN or infinity: the run that"):
            found.read(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_files(tmp_path: Path, dtype: torch.dtype):
    tiny_llama().to(dtype).save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path)) as found:
        assert {found.dtype(place) for place in found.places} == {dtype}


# ------------------------------------------------------------------ experts and halves


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "phi3"])
def test_each_expert_and_each_half_is_a_matrix_of_its_own(tmp_path: Path, name: str):
    model = saved(name, tmp_path, save_original_format=False)
    layers, inner, hidden = 2, 12, 16
    fused = {n: p.detach() for n, p in model.named_parameters() if "gate_up_proj" in n and "bias" not in n}
    assert len(fused) == layers

    def halves(parameter: torch.Tensor) -> list[torch.Tensor]:
        """Gate and up of each expert, by hand."""
        if name == "phi3":
            return [parameter[:inner], parameter[inner:]]
        if name == "mixtral":
            return [half for expert in parameter for half in (expert[:inner], expert[inner:])]
        return [half.T for expert in parameter for half in (expert[:, 0::2], expert[:, 1::2])]

    expected = {f"{n}[{i}]": part for n, p in fused.items() for i, part in enumerate(halves(p))}
    assert len(expected) == layers * (2 if name == "phi3" else 6)
    with open_checkpoint(str(tmp_path), target_modules="gate_proj") as found:
        assert [place.name for place in found.places] == list(expected)
        for i, place in enumerate(found.places):
            assert place.layer == f"gate_up_proj ({'up' if i % 2 else 'gate'})"
            assert place.depth == int(place.name.split(".")[2])
            assert place.shape == (inner, hidden)
            assert torch.equal(found.read(place), expected[place.name])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_experts_other_matrix_is_numbered_by_expert(tmp_path: Path, name: str):
    """GPT-OSS keeps its matrices as inputs and outputs."""
    model = saved(name, tmp_path, save_original_format=False)
    with open_checkpoint(str(tmp_path), target_modules="down_proj") as found:
        assert found.places == [
            Place(f"model.layers.{i}.mlp.experts.down_proj[{e}]", "down_proj", i, (16, 12))
            for i in range(2)
            for e in range(3)
        ]
        down = model.model.layers[1].mlp.experts.down_proj.detach()
        down = down.mT if name == "gpt_oss" else down
        assert all(torch.equal(found.read(place), down[e]) for e, place in enumerate(found.places[3:]))


def test_files_with_other_names_than_the_model_are_refused_with_the_remedy(tmp_path: Path):
    """By default transformers writes the experts of a Mixtral one by one, as the model was published."""
    saved("mixtral", tmp_path)
    with (
        pytest.raises(
            ConfigError, match=r"cannot be read matrix by matrix: the files have no model.*mlp.*save_original"
        ),
        open_checkpoint(str(tmp_path)),
    ):
        pass


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelUnavailableError, match="nowhere"), open_checkpoint(str(tmp_path / "nowhere")):
        pass


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "layer", "depth"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "q_proj", 11),
        ("transformer.h.3.mlp.c_fc.weight", "c_fc", 3),
        ("model.layers.2.mlp.experts.7.w1.weight", "w1", 2),
        ("model.layers.2.mlp.experts.down_proj", "down_proj", 2),
        ("lm_head.weight", "lm_head", -1),
        ("head.weight", "head", -1),
        ("net.2.weight", "2", 2),
    ],
)
def test_type_and_depth_are_read_from_the_name(name: str, layer: str, depth: int):
    alone, several = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(2, 3, 4))
    ((target, number, place),) = places_of([Target(name, alone, None)])
    assert (target.parameter is alone, number, place) == (True, 0, Place(name, layer, depth, (3, 4)))
    assert [place for _, _, place in places_of([Target(name, several, None)])] == [
        Place(f"{name}[{i}]", layer, depth, (3, 4)) for i in range(2)
    ]


def test_layers_of_one_name_at_different_places_are_of_different_types():
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.experts.4.up_proj.weight",
    ]
    types = ["q_proj", "q_proj", "experts.down_proj", "shared_expert.down_proj", "up_proj", "up_proj"]
    assert list(layer_types(names).items()) == list(zip(names, types, strict=True))
    assert layer_types(names[2:3]) == {names[2]: "down_proj"}


# ------------------------------------------------------------------ several checkpoints


def test_checkpoints_of_one_model_are_opened_together(tmp_path: Path):
    folders = [str(save_tiny_llama(tmp_path / f"seed{seed}", seed=seed)) for seed in range(3)]
    with open_together(folders, "v_proj") as found:
        assert [one.label for one in found] == folders
        for seed, one in enumerate(found):
            assert one.places == found[0].places
            expected = tiny_llama(seed).model.layers[1].self_attn.v_proj.weight.detach()
            assert torch.equal(one.read(one.places[1]), expected)


def test_none_are_opened_together():
    with open_together([]) as found:
        assert found == []


@pytest.mark.parametrize(
    ("other", "matrix"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.mlp\.down_proj\.weight \(32 x 48\)"),
        ({"num_key_value_heads": 4}, r"model\.layers\.0\.self_attn\.k_proj\.weight \((16|32) x 32\)"),
    ],
)
@pytest.mark.parametrize("place", [1, 2])
def test_checkpoints_of_different_models_are_refused_with_a_matrix(
    tmp_path: Path, other: dict, matrix: str, place: int
):
    folders = [str(save_tiny_llama(tmp_path / f"same{i}")) for i in range(2)]
    folders.insert(place, str(save_tiny_llama(tmp_path / "unlike", **other)))
    with (
        pytest.raises(
            ConfigError, match=rf"are not checkpoints of one model: {matrix} is in one of them only"
        ) as error,
        open_together(folders),
    ):
        pass
    assert str(tmp_path / "unlike") in str(error.value)


# ------------------------------------------------------------------ match_targets


@pytest.mark.parametrize("model", ["llama", "gpt2", "mixtral", "phi3", "deberta"])
@pytest.mark.parametrize("pattern", ["all-linear", ["attention", "mlp"], r"\.0\."])
def test_matched_targets_are_those_of_the_groups_in_the_models_order_and_nothing_is_frozen(model: str, pattern):
    built = MODELS[model]()
    first = next(iter(built.parameters()))
    first.requires_grad_(False)  # by the user: it stays so
    targets = match_targets(built, pattern)
    assert [p for p in built.parameters() if not p.requires_grad] == [first]
    order = {id(p): i for i, p in enumerate(built.parameters())}
    places = [order[id(target.parameter)] for target in targets]
    assert places == sorted(places)
    groups = build_param_groups(built, pattern)
    expected = {name: (p, group["halves"]) for group in groups for name, p in group["params"]}
    assert len(targets) == len(expected)
    for target in targets:
        assert expected[target.name][0] is target.parameter
        assert expected[target.name][1] == target.halves


@pytest.mark.parametrize(("pattern", "message"), [("qproj", "'qproj' matched none of the 14"), ("*q", "no valid reg")])
def test_a_pattern_that_does_not_match_freezes_nothing(pattern: str, message: str):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=f"target_modules: .*{message}"):
        match_targets(model, pattern)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("transposed", [False, True])
def test_which_way_experts_keep_their_matrices_is_seen_from_their_shapes_if_they_do_not_say(transposed: bool):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden_size = 6
            shapes = {"gate_up_proj": (8, 6), "down_proj": (6, 4)}
            for name, (outputs, inputs) in shapes.items():
                shape = (3, inputs, outputs) if transposed else (3, outputs, inputs)
                setattr(self, name, nn.Parameter(torch.randn(shape)))

    model = nn.Sequential(Experts())
    gate_up, down = match_targets(model)
    assert [matrix.shape for matrix in gate_up.matrices()] == [(4, 6)] * 6
    assert [matrix.shape for matrix in down.matrices()] == [(6, 4)] * 3
    other = torch.randn(down.parameter.shape)
    assert torch.equal(down.matrices(other)[2], other[2].T if transposed else other[2])


def test_types_of_layers_take_as_much_of_the_name_as_tells_them_apart():
    names = [
        f"encoder.layer.{i}.{part}.weight"
        for i in range(2)
        for part in ("attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense")
    ]
    assert list(layer_types(names).values())[:4] == [
        "query",
        "attention.output.dense",
        "*.output.dense",
        "intermediate.dense",
    ]
