"""Which parameters are sparse, dense and frozen, on the architectures whose names and storage differ.

Guards: a pattern that matches nothing must not fall back in silence; a new head must not be trained at a few entries by
a preset; `module.` as a wrapper's name must not eat into a layer called `submodule`.
"""

from __future__ import annotations

import re

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lift_lightning.param_groups import PRESETS, build_param_groups, clean_name, find_targets, matrix_views

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 1}


def gpt2():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


def deberta():
    relative = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**SIZES, **relative, share_att_key=True, num_labels=3, pooler_hidden_size=16)
    return DebertaV2ForSequenceClassification(config)


def distilbert():
    config = DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2, vocab_size=30)
    return DistilBertForSequenceClassification(config)


MODELS = {
    "llama": tiny_llama,
    "gpt2": gpt2,
    "deberta": deberta,
    "distilbert": distilbert,
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=3)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**DECODER, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**DECODER)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **DECODER,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            num_experts=3,
            num_experts_per_tok=2,
        )
    ),
}
LLAMA_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
DEBERTA_QKV = ["attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"]


def kinds(groups: list[dict], sparse: bool = True) -> list[str]:
    """The names without what stands before and inside a layer's number, sorted, each once."""
    names = [name for group in groups if group["sparse"] is sparse for name, _ in group["params"]]
    short = {re.sub(r"^.*\.(layers|layer|h)\.\d+\.", "", name).removesuffix(".weight") for name in names}
    return sorted(short)


@pytest.mark.parametrize(
    ("model", "preset", "expected"),
    [
        ("llama", "all-linear", LLAMA_ATTENTION + LLAMA_MLP),
        ("llama", "attention", LLAMA_ATTENTION),
        ("llama", "mlp", LLAMA_MLP),
        *[
            ("llama", single, [name])
            for single in PRESETS
            for name in LLAMA_ATTENTION + LLAMA_MLP
            if f".{single}" in name
        ],
        ("gpt2", "all-linear", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("gpt2", "attention", ["attn.c_attn", "attn.c_proj"]),
        ("gpt2", "mlp", ["mlp.c_fc", "mlp.c_proj"]),
        ("gpt2", "o_proj", ["attn.c_proj"]),
        ("gpt2", "up_proj", ["mlp.c_fc"]),
        ("gpt2", "down_proj", ["mlp.c_proj"]),
        ("deberta", "all-linear", [*DEBERTA_QKV, "attention.output.dense", "intermediate.dense", "output.dense"]),
        ("deberta", "attention", [*DEBERTA_QKV, "attention.output.dense"]),
        ("deberta", "mlp", ["intermediate.dense", "output.dense"]),
        ("deberta", "q_proj", ["attention.self.query_proj"]),
        ("deberta", "k_proj", ["attention.self.key_proj"]),
        ("deberta", "v_proj", ["attention.self.value_proj"]),
        ("deberta", "o_proj", ["attention.output.dense"]),
        ("deberta", "up_proj", ["intermediate.dense"]),
        ("deberta", "down_proj", ["output.dense"]),
        ("distilbert", "attention", [f"attention.{name}_lin" for name in ("q", "k", "v", "out")]),
        ("distilbert", "mlp", ["ffn.lin1", "ffn.lin2"]),
        (
            "distilbert",
            "all-linear",
            [*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"],
        ),
        ("mixtral", "all-linear", [*LLAMA_ATTENTION, "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("mixtral", "mlp", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("mixtral", "gate_proj", ["mlp.experts.gate_up_proj"]),
        ("mixtral", "up_proj", ["mlp.experts.gate_up_proj"]),
        ("mixtral", "down_proj", ["mlp.experts.down_proj"]),
        ("gpt_oss", "all-linear", [*LLAMA_ATTENTION, "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("gpt_oss", "attention", LLAMA_ATTENTION),
        ("phi3", "all-linear", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
        ("phi3", "gate_proj", ["mlp.gate_up_proj"]),
        (
            "qwen2_moe",
            "mlp",
            [
                *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
                *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
            ],
        ),
    ],
)
def test_presets(model: str, preset: str, expected: list[str]):
    groups = build_param_groups(MODELS[model](), preset)
    assert kinds(groups) == sorted(expected)
    assert all(group["sparse"] for group in groups)


@pytest.mark.parametrize("model", MODELS)
def test_heads_poolers_routers_and_embeddings_are_in_no_preset(model: str):
    built = MODELS[model]()
    for preset in PRESETS:
        try:
            groups = build_param_groups(built, preset)
        except ValueError as error:
            assert "matched none" in str(error)  # noqa: PT017 - GPT-2 has no q_proj, and others lack others
            continue
        for name, parameter in (pair for group in groups for pair in group["params"]):
            assert not re.search(r"lm_head|classifier|pooler|router|\bgate\b|shared_expert_gate|embed|wte|wpe", name)
            assert parameter.ndim >= 2


@pytest.mark.parametrize(
    ("model", "halves"),
    [
        ("llama", {}),
        ("mixtral", {"gate_up_proj": "rows"}),
        ("gpt_oss", {"gate_up_proj": "interleaved_columns"}),
        ("phi3", {"gate_up_proj": "rows"}),
        ("qwen2_moe", {"gate_up_proj": "rows"}),
    ],
)
def test_halves(model: str, halves: dict[str, str]):
    built = MODELS[model]()
    for target in find_targets(built):
        expected = next((value for part, value in halves.items() if part in target.name), None)
        assert target.halves == expected, target.name
    by_group = {group["halves"]: [name for name, _ in group["params"]] for group in build_param_groups(built)}
    assert set(by_group) == {None, *halves.values()}
    assert all(("gate_up_proj" in name) == (kind is not None) for kind, names in by_group.items() for name in names)


def test_matrix_views_share_the_parameters_memory():
    parameter = nn.Parameter(torch.arange(24.0).view(2, 2, 6))
    assert [v.tolist() for v in matrix_views(parameter)] == parameter.tolist()
    interleaved = matrix_views(parameter, "interleaved_columns")
    assert interleaved[0].tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]  # the gate of expert 0
    assert interleaved[1].tolist() == [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]  # its up
    assert matrix_views(parameter, "columns")[1].tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]
    assert matrix_views(parameter, "rows")[1].tolist() == [[6.0, 7.0, 8.0, 9.0, 10.0, 11.0]]
    assert matrix_views(parameter, "interleaved_rows")[3].tolist() == [[18.0, 19.0, 20.0, 21.0, 22.0, 23.0]]
    interleaved[3][0, 0] = -1.0  # up of expert 1 begins at its second column
    assert parameter[1, 0, 1] == -1.0


def test_a_plain_model():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 3)))
    groups = build_param_groups(model)
    assert [[name for name, _ in group["params"]] for group in groups] == [["1.weight", "3.0.weight"]]
    assert groups[0]["params"][0][1] is model[1].weight
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"1.weight", "3.0.weight"}


def test_a_lone_layer():
    (group,) = build_param_groups(nn.Linear(3, 4))
    assert [name for name, _ in group["params"]] == ["weight"]


def test_everything_else_is_frozen_and_what_is_trained_is_thawed():
    model = tiny_llama()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    build_param_groups(model, "q_proj")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_regular_expressions_and_lists():
    model = tiny_llama()
    assert kinds(build_param_groups(model, r"layers\.1\..*(q|v)_proj")) == ["self_attn.q_proj", "self_attn.v_proj"]
    (group,) = build_param_groups(model, ["attention", r"layers\.0\.mlp\.up_proj"])
    assert len(group["params"]) == 4 * 2 + 1
    assert kinds([group]) == sorted([*LLAMA_ATTENTION, "mlp.up_proj"])
    (group,) = build_param_groups(model, ["q_proj", "attention", "q_proj"])  # what two patterns match is there once
    assert len(group["params"]) == 8


def test_an_expression_takes_what_a_preset_leaves_out():
    assert kinds(build_param_groups(tiny_llama(tie_word_embeddings=False), "lm_head")) == ["lm_head"]
    assert kinds(build_param_groups(deberta(), ["^classifier", "^pooler"])) == ["classifier", "pooler.dense"]
    assert kinds(build_param_groups(MODELS["qwen2_moe"](), "shared_expert_gate")) == ["mlp.shared_expert_gate"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.fc1 = nn.Linear(4, 2), nn.Linear(4, 4)

    assert kinds(build_param_groups(Block())) == ["fc1"]
    assert kinds(build_param_groups(Block(), "router")) == ["router"]


def test_presets_match_layers_at_the_top_of_a_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))

    assert kinds(build_param_groups(Block(), "q_proj")) == ["q_proj"]
    assert kinds(build_param_groups(Block(), "mlp")) == ["mlp.0"]


def test_an_output_head_that_is_the_embedding_is_no_target():
    names = [target.name for target in find_targets(tiny_llama(tie_word_embeddings=True))]
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert len(names) == 2 * 7
    with pytest.raises(ValueError, match="'lm_head' matched none of the 14 names"):
        build_param_groups(tiny_llama(tie_word_embeddings=True), "lm_head")
    assert "lm_head.weight" in [t.name for t in find_targets(tiny_llama(tie_word_embeddings=False))]


def test_tied_layers_are_there_once_under_their_first_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    (group,) = build_param_groups(model)
    assert [name for name, _ in group["params"]] == ["0.weight", "1.weight"]


def test_dense_wins_over_sparse_for_a_tied_parameter_with_two_names():
    """The holder has the parameter under a name of its own before the layer does: torch lists it there alone."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.layer.weight = self.table

    groups = build_param_groups(Tied(), modules_to_train="table")
    assert kinds(groups) == ["other"]
    assert kinds(groups, sparse=False) == ["table"]


def test_modules_to_train():
    model = deberta()
    groups = build_param_groups(model, "all-linear", modules_to_train=["classifier", "pooler"], weight_decay=0.1)
    assert [group["sparse"] for group in groups] == [True, False]
    assert [name for name, _ in groups[1]["params"]] == [
        "pooler.dense.weight",
        "pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    assert groups[1]["halves"] is None
    assert all(p.requires_grad for _, p in groups[1]["params"])
    trained = sum(p.requires_grad for p in model.parameters())
    assert trained == 2 * 6 + 4


def test_modules_to_train_wins_over_targets():
    groups = build_param_groups(tiny_llama(), "attention", modules_to_train="q_proj")
    assert kinds(groups) == sorted(LLAMA_ATTENTION[1:])
    assert kinds(groups, sparse=False) == ["self_attn.q_proj"]
    with pytest.raises(ValueError, match="target_modules='q_proj' is trained densely already, by 'attention'"):
        build_param_groups(tiny_llama(), "q_proj", modules_to_train="attention")


def test_dense_alone():
    (group,) = build_param_groups(tiny_llama(), [], modules_to_train=r"norm")
    assert group["sparse"] is False
    assert len(group["params"]) == 2 * 2 + 1
    assert build_param_groups(tiny_llama(), []) == []


@pytest.mark.parametrize("decay", [None, 0.0, 0.1])
def test_weight_decay(decay: float | None):
    groups = build_param_groups(deberta(), modules_to_train="classifier", weight_decay=decay)
    assert len(groups) == 2
    for group in groups:
        assert group.get("weight_decay") == decay
        assert ("weight_decay" in group) == (decay is not None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("_orig_mod.model.layers.0.weight", "model.layers.0.weight"),
        ("module.model.weight", "model.weight"),
        ("_fsdp_wrapped_module.model._fsdp_wrapped_module.a.weight", "model.a.weight"),
        ("layers.0._checkpoint_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("_orig_mod.module._fsdp_wrapped_module._checkpoint_wrapped_module.a", "a"),
        ("submodule.weight", "submodule.weight"),
        ("a.my_module.0.weight", "a.my_module.0.weight"),
        ("modules.0.weight", "modules.0.weight"),
    ],
)
def test_clean_name(name: str, expected: str):
    assert clean_name(name) == expected


class Wrapper(nn.Module):
    """As torch.compile, FSDP, DDP and the checkpoint wrapper hold what they wrap."""

    def __init__(self, attribute: str, inner: nn.Module):
        super().__init__()
        setattr(self, attribute, inner)


@pytest.mark.parametrize("attribute", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
def test_names_and_groups_are_the_same_under_every_wrapper(attribute: str):
    plain, wrapped = tiny_llama(), tiny_llama()
    for i, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[i] = Wrapper(attribute, layer)
    wrapped = Wrapper(attribute, wrapped)
    for target, dense in (("all-linear", ()), (r"^model\.layers\.0\.self_attn", r"^model\.norm\.weight$")):
        names = [
            [name for group in build_param_groups(model, target, dense) for name, _ in group["params"]]
            for model in (plain, wrapped)
        ]
        assert names[0] == names[1]


def test_compiled_model():
    model = torch.compile(nn.Sequential(nn.Linear(3, 3)))
    (group,) = build_param_groups(model)
    assert [name for name, _ in group["params"]] == ["0.weight"]


@pytest.mark.parametrize("argument", ["target_modules", "modules_to_train"])
def test_a_pattern_that_matches_nothing_lists_what_there_is(argument: str):
    with pytest.raises(ValueError, match=f"{argument}: 'qproj' matched none of the") as caught:
        build_param_groups(tiny_llama(), **{argument: ["qproj"]})
    lines = str(caught.value).splitlines()
    assert "  model.layers.*.self_attn.q_proj.weight" in lines  # one line for both layers
    assert len(lines) == 1 + (
        7 if argument == "target_modules" else 7 + 2 + 3
    )  # a layer's norms; embedding, norm, tied head


def test_one_of_several_patterns_that_matches_nothing_raises():
    with pytest.raises(ValueError, match="'c_attn' matched none"):
        build_param_groups(tiny_llama(), ["attention", "c_attn"])
    with pytest.raises(ValueError, match="'q_proj' matched none"):
        build_param_groups(gpt2(), "q_proj")


@pytest.mark.parametrize("argument", ["target_modules", "modules_to_train"])
def test_invalid_expression(argument: str):
    with pytest.raises(ValueError, match=rf"{argument}: '\*q' is no valid regular expression: nothing to repeat"):
        build_param_groups(tiny_llama(), **{argument: "*q"})


def test_a_failure_freezes_nothing():
    model = tiny_llama()
    with pytest.raises(ValueError, match="matched none"):
        build_param_groups(model, "nothing_like_it")
    assert all(p.requires_grad for p in model.parameters())


def test_packed_weights_are_no_targets():
    """A quantised layer keeps integers in `weight`: there is nothing to train in it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    (group,) = build_param_groups(model)
    assert [name for name, _ in group["params"]] == ["1.weight"]


def test_a_tied_head_is_known_by_its_own_name():
    model = tiny_llama()  # lm_head shares the embedding
    (group,) = build_param_groups(model, (), "lm_head")
    assert [p is model.model.embed_tokens.weight for _, p in group["params"]] == [True]


def test_a_preset_among_the_dense_modules_means_matrices_only():
    model = tiny_llama()
    groups = build_param_groups(model, "q_proj", ["mlp", r"\.norm\.weight"])
    sparse, dense = ([name for name, _ in group["params"]] for group in groups)
    assert len(sparse) == 2
    assert len(dense) == 2 * 3 + 1  # three projections of two layers, and the final norm
    assert not any("layernorm" in name or "embed" in name for name in dense)
