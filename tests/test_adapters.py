"""Adapters on a model: what they train, that they come back from their folder, and that they merge."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification, PreTrainedModel

from lift_lightning.adapters import (
    METHODS,
    Adapter,
    AdapterName,
    adapter_targets,
    by_peft,
    load_adapter,
    matched_rank,
    merge_adapter,
    put_on,
    selected_entries,
    trained_entries,
)
from lift_lightning.adapters.spectral import SpectralLinear
from lift_lightning.errors import CheckpointError, ConfigError
from lift_lightning.selection import SelectionConfig

IDS = torch.arange(3, 60).view(3, 19)
NAMES = list(get_args(AdapterName))
# PiSSA and DoRA compute the base's part by another sum.
START = {"pissa": 1e-5, "dora": 1e-5}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(
    method: str, model: PreTrainedModel | None = None, rank: int = 3, **settings
) -> tuple[Adapter, list[float]]:
    """After five steps towards answering 1 always, with the losses."""
    torch.manual_seed(0)
    adapter = put_on(tiny_llama() if model is None else model, method, rank, **settings)
    optimizer = torch.optim.AdamW([p for group in adapter.param_groups() for _, p in group["params"]], lr=2e-2)
    losses = []
    for _ in range(5):
        out = adapter.model(IDS).logits.flatten(0, -2)
        loss = nn.functional.cross_entropy(out, torch.ones(len(out), dtype=torch.int64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return adapter, losses


def test_the_registry_has_every_method():
    assert list(METHODS) == NAMES
    assert all(METHODS[name].name == name for name in NAMES)


@pytest.mark.parametrize("method", NAMES)
def test_only_the_adapter_is_trained_and_the_loss_falls(method: str):
    base = tiny_llama()
    before = logits(base)
    torch.manual_seed(0)
    adapter = put_on(base, method, 3)
    difference = (logits(base) - before).abs().max()
    assert difference <= START.get(method, 0)
    frozen = {n: p.clone() for n, p in base.named_parameters() if n not in adapter.trained}
    buffers = {name: buffer.clone() for name, buffer in base.named_buffers()}
    assert set(adapter.trained) == {name for name, p in base.named_parameters() if p.requires_grad}
    assert adapter.dense == ()
    del base
    same, losses = trained(method)
    assert losses[-1] < losses[0] - 0.02
    after = dict(same.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert all(torch.equal(value, dict(same.model.named_buffers())[name]) for name, value in buffers.items())
    if method != "pissa":  # which takes its start out of the base
        weights = {name.replace(".base_layer", ""): p for name, p in frozen.items()}
        assert all(torch.equal(value, weights[name]) for name, value in tiny_llama().named_parameters())


@pytest.mark.parametrize("method", NAMES)
def test_what_is_trained_is_counted_by_the_formula(method: str):
    adapter = put_on(tiny_llama(), method, 4, target_modules=["q_proj", "down_proj"])
    shapes = [(32, 32), (32, 48)] * 2
    per_matrix = [4 * (m + n) + (m if method == "dora" else 0) for m, n in shapes]
    assert sum(adapter.model.get_parameter(name).numel() for name in adapter.trained) == sum(per_matrix)
    assert adapter.entries == trained_entries(method, shapes, 4) == sum(per_matrix)
    adapted = {
        name.rpartition(".self_attn." if "self" in name else ".mlp.")[2].split(".")[0] for name in adapter.trained
    }
    assert adapted == {"q_proj", "down_proj"}
    assert adapter.alpha == {"shira": None, "spectral": None, "pissa": 4}.get(method, 8)


@pytest.mark.parametrize("method", NAMES)
def test_it_comes_back_from_its_folder_and_merges(method: str, tmp_path: Path):
    adapter, _ = trained(method)
    expected = logits(adapter.model)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-3
    folder = adapter.save_pretrained(tmp_path / "a/b", base="user/base")
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    # PiSSA's is the difference of two products instead of one on a reduced base.
    tolerance = 1e-5 if method == "pissa" else 0
    again = tiny_llama()
    assert load_adapter(again, folder) == ("lora" if method == "pissa" else method)
    assert (logits(again) - expected).abs().max() <= tolerance
    assert not any(p.requires_grad for p in again.parameters())
    if METHODS[method].by_peft:
        found = PeftModel.from_pretrained(tiny_llama(), str(folder))
        assert (logits(found) - expected).abs().max() <= tolerance
        content = json.loads((folder / "adapter_config.json").read_text())
        assert content["base_model_name_or_path"] == "user/base"
        assert content["r"] == (6 if method == "pissa" else 3)
    for model in (again, adapter.model):
        merge_adapter(model)
        assert model.state_dict().keys() == tiny_llama().state_dict().keys()
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no adapter that could be merged"):
        merge_adapter(again)


@pytest.mark.parametrize("method", ["lora", "pissa", "shira", "spectral"])
def test_a_head_that_is_trained_whole_is_in_the_folder(method: str, tmp_path: Path):
    base = LlamaForSequenceClassification(tiny_llama().config).eval()
    adapter, _ = trained(method, copy.deepcopy(base), modules_to_train=["^score", "model.norm"])
    assert adapter.dense == ("model.norm.weight", "score.weight")
    assert not torch.equal(adapter.model.score.weight, base.score.weight)
    folder = adapter.save_pretrained(tmp_path / "out", base="b")
    again = copy.deepcopy(base)
    load_adapter(again, folder)
    torch.testing.assert_close(logits(again), logits(adapter.model), rtol=0, atol=1e-5)
    merge_adapter(again)
    assert again.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(again), logits(adapter.model), rtol=0, atol=1e-5)


def test_masks_of_shira_follow_the_seed_and_differ():
    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        model = put_on(tiny_llama(), "shira", 2, target_modules="q_proj").model
        return [layer.shira_indices["default"] for _, layer in by_peft.tuner_layers(model)]

    first, again, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


# ---------------------------------------------------------------- the Spectral Adapter


@pytest.mark.parametrize(("rows", "columns", "rank"), [(7, 5, 2), (5, 9, 5), (6, 6, 1)])
def test_spectral_is_the_dense_weight_of_the_paper(rows: int, columns: int, rank: int):
    torch.manual_seed(3)
    base = nn.Linear(columns, rows, dtype=torch.float64)
    layer = SpectralLinear(copy.deepcopy(base).float(), rank).double()
    x = torch.randn(4, 3, columns, dtype=torch.float64)
    rounded = layer.base_layer
    assert torch.equal(layer(x), rounded(x))
    nn.init.normal_(layer.spectral_a_u)
    nn.init.normal_(layer.spectral_a_v)
    u, s, vh = torch.linalg.svd(rounded.weight.detach().float(), full_matrices=False)
    u, s, vh = u.double(), s.double(), vh.double()
    new_u, new_v = u[:, :rank] + layer.spectral_a_u, vh[:rank].T + layer.spectral_a_v
    rest = rounded.weight.detach() - u[:, :rank] @ s[:rank].diag() @ vh[:rank]
    weight = rest + new_u @ s[:rank].diag() @ new_v.T
    torch.testing.assert_close(layer(x), x @ weight.T + rounded.bias, rtol=1e-10, atol=1e-10)
    merged = layer.merged()
    torch.testing.assert_close(merged.weight, weight, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- budgets


def test_the_selections_budget_is_matched_from_below():
    model = tiny_llama()
    entries = sum(p.numel() for p in model.parameters())
    for method in NAMES:
        targets = adapter_targets(model, method)
        shapes = list(targets.shapes.values())
        for config in (
            SelectionConfig(rank=4),
            SelectionConfig(density=0.3),
            SelectionConfig(density=0.2, density_of="model"),
        ):
            budget = selected_entries(config, targets.groups, entries)
            rank = matched_rank(method, shapes, budget)
            assert trained_entries(method, shapes, rank) <= budget < trained_entries(method, shapes, rank + 1)
        lift_at_4 = selected_entries(SelectionConfig(rank=4), targets.groups, entries)
        assert matched_rank(method, shapes, lift_at_4) == (3 if method == "dora" else 4)
        bound = METHODS[method].largest_rank(16, 32)
        whole = sum(m * n for m, n in shapes)
        assert matched_rank(method, shapes, whole) <= (whole if bound is None else bound)
    with pytest.raises(ConfigError, match=r"trains 928 numbers at rank 1 already, and the selection .* 927 entries"):
        matched_rank("lora", shapes, 927)


# ---------------------------------------------------------------- refusals


class Mixed(nn.Module):
    """Layers of the kinds that a transformers model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2))


def test_conv1d_is_served_by_some_and_refused_by_name_by_others():
    for method in ("lora", "dora", "pissa"):
        model = Mixed().gpt2
        expected = logits(model)
        adapter = put_on(model, method, 2)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        assert adapter.entries == sum(model.get_parameter(name).numel() for name in adapter.trained)
    for method in ("shira", "spectral"):
        with pytest.raises(
            ConfigError, match=r"transformer\.h\.0\.attn\.c_attn\.weight is a layer of Conv1D, .*nn.Linear only"
        ):
            put_on(Mixed().gpt2, method, 2)


def test_experts_are_refused_by_name():
    from test_weight_files import tiny_mixtral

    for method in NAMES:
        with pytest.raises(ConfigError, match=r"experts\.\w+ is a parameter of fused experts, and method="):
            put_on(tiny_mixtral(), method, 2)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"rank": 0}, "adapter_rank must be at least 1, got 0"),
        ("lora", {"rank": 2, "alpha": 0.0}, "adapter_alpha must be above 0"),
        ("shira", {"rank": 2, "alpha": 4.0}, "adapter_alpha=4.0: method='shira' has no alpha"),
        (
            "pissa",
            {"rank": 17},
            "adapter_rank=17 is too large .*k_proj is 16 x 32, which allows 16; set adapter_rank to at",
        ),
        ("spectral", {"rank": 17}, "adapter_rank=17 is too large for method='spectral'"),
        ("shira", {"rank": 11}, "k_proj is 16 x 32, which allows 10"),
        ("lora", {"rank": 2, "target_modules": "nothing_like_it"}, "matched none of the"),
    ],
)
def test_what_cannot_be_put_on(method: str, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        put_on(tiny_llama(), method, **settings)


def test_peft_is_optional(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(by_peft, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(ConfigError, match=r"method='dora' needs peft: install .*lift-lightning\[baselines\]"):
        put_on(tiny_llama(), "dora", 2)
    put_on(tiny_llama(), "spectral", 2)


def test_folders_that_are_refused(tmp_path: Path):
    adapter = put_on(tiny_llama(), "spectral", 2)
    folder = adapter.save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out holds an adapter; choose another folder, or set overwrite"):
        adapter.save_pretrained(folder)
    adapter.save_pretrained(folder, overwrite=True)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is there and is no adapter, so it is not replaced"):
        adapter.save_pretrained(tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="is no adapter: it has neither adapter_config.json nor spectral.json"):
        load_adapter(tiny_llama(), tmp_path)
    with pytest.raises(CheckpointError, match=r"has an adapter for .*, a linear layer of .*load it on its base"):
        load_adapter(tiny_llama(hidden_size=16), folder)
    tied = put_on(tiny_llama(), "lora", 2, modules_to_train="embed_tokens")
    with pytest.raises(
        ConfigError, match="modules_to_train has model.embed_tokens.weight, which is tied to lm_head.weight"
    ):
        tied.save_pretrained(tmp_path / "tied")
