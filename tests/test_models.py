"""Loading from folders, the hub and its cache; what goes wrong there; and the way back to a folder."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    T5Config,
)

from lift_lightning import models
from lift_lightning.models import (
    ModelUnavailableError,
    check_export_folder,
    export_model,
    keep_buffer_dtypes,
    load_model,
    load_tokenizer,
)

REMEDY = r"--model\.model_name_or_path /path/to/folder$"


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_ready_to_train(tiny_model_dir: Path) -> None:
    model, new = load_model(tiny_model_dir)
    assert new == []  # the tied lm_head is not in the file, and not new
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    original = tiny_llama().state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_dtype_is_the_default_dtype_not_the_checkpoints(folder: Path) -> None:
    """bf16-true sets the default dtype while the model is made; transformers 5 would take the checkpoint's instead."""
    export_model(tiny_llama().to(torch.bfloat16), byte_tokenizer(), folder, overwrite=True)
    assert load_model(folder).model.dtype == torch.float32
    assert load_model(folder, dtype=torch.float16).model.dtype == torch.float16
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load_model(folder).model
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_attention_implementation_is_passed_on(tiny_model_dir: Path) -> None:
    assert load_model(tiny_model_dir, attn_implementation="eager").model.config._attn_implementation == "eager"


def test_a_home_folder_is_found(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_dir.parent))
    assert load_model(f"~/{tiny_model_dir.name}").new_parameters == []


def test_a_fresh_head_is_new(tiny_model_dir: Path) -> None:
    model, new = load_model(tiny_model_dir, task="sequence_classification", num_labels=3)
    assert new == ["score.weight"]
    assert model.score.out_features == 3
    assert model.config.pad_token_id == 0
    assert model.training


def test_a_fresh_pooler_is_new_too(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, pad_token_id=0
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    new = load_model(tmp_path, task="sequence_classification").new_parameters
    assert new == [
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"),
    ]


def test_a_trained_head_is_kept_unless_its_shape_is_another(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    assert load_model(tmp_path, task="sequence_classification").model.score.out_features == 3
    assert load_model(tmp_path, task="sequence_classification", num_labels=3).new_parameters == []
    model, new = load_model(tmp_path, task="sequence_classification", num_labels=2)
    assert new == ["score.weight"]
    assert model.score.weight.shape == (2, 32)
    assert torch.isfinite(model.score.weight).all()


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_classifier_without_a_pad_token_gets_the_one_that_batches_have(tmp_path: Path, with_tokenizer: bool) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=259, bos_token_id=1, eos_token_id=2)
    assert config.pad_token_id is None
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    if with_tokenizer:
        byte_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, task="sequence_classification").model
    assert model.config.pad_token_id == (0 if with_tokenizer else 2)
    ids = torch.tensor([[5, 6, 7], [5, model.config.pad_token_id, model.config.pad_token_id]])
    assert model(input_ids=ids).logits.shape == (2, 2)


def test_a_classifier_without_a_pad_token_gets_the_tokenizers_eos(tmp_path: Path) -> None:
    """Of the several of LLaMA-3-Instruct's config, batches are padded with the tokenizer's, and it took the first."""
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=259, bos_token_id=1, eos_token_id=[9, 2])
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer(pad=False).save_pretrained(tmp_path)
    assert load_model(tmp_path, task="sequence_classification").model.config.pad_token_id == 2


def test_tokenizer_is_loaded(tiny_model_dir: Path) -> None:
    assert load_tokenizer(tiny_model_dir)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_bad_arguments_raise(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="task must be one of causal_lm, sequence_classification, got 'seq2seq'"):
        load_model(tiny_model_dir, task="seq2seq")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_labels must be at least 1 .* got 0"):
        load_model(tiny_model_dir, task="sequence_classification", num_labels=0)
    with pytest.raises(ValueError, match="is for sequence_classification only, got 2"):
        load_model(tiny_model_dir, num_labels=2)


# --- folders that cannot be loaded -----------------------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama9"}))


def other_type(folder: Path) -> None:
    T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8).save_pretrained(folder)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def foreign_bin(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"<html>not found</html>")


def empty_bin(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def missing_shard(folder: Path) -> None:
    no_weights(folder)
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    next(folder.glob("model-00002*")).unlink()


def missing_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_config, "the folder has no config.json"),
        (broken_config, "its config.json cannot be used: .* not a valid JSON file"),
        (unknown_type, "its config.json cannot be used: .*llama9"),
        (other_type, "transformers has no causal_lm class for model type 't5'"),
        (no_weights, "its weights cannot be read: .*no file named model.safetensors"),
        (truncated_weights, "its weights cannot be read: .*incomplete metadata"),
        (foreign_bin, "its weights cannot be read"),
        (empty_bin, "its weights cannot be read: EOFError"),
        (missing_shard, "its weights cannot be read: .*model-00002-of"),
        (missing_layer, r"its weights lack 9 parameters .*\(model.layers.1.self_attn.q_proj.weight, .*, \.\.\.\)"),
        (wrong_shape, r"its weights lack 1 parameters .* in another shape \(model.norm.weight\)"),
    ],
)
def test_a_damaged_folder_gives_one_clear_error(
    folder: Path, damage: Callable[[Path], None], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(ModelUnavailableError, match=rf"^Cannot load the model '{folder}': {reason}.*{REMEDY}") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_classifier_may_lack_its_head_but_no_layer(folder: Path) -> None:
    missing_layer(folder)
    with pytest.raises(ModelUnavailableError, match="its weights lack 9 parameters"):
        load_model(folder, task="sequence_classification")


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./models/llama", "~/models/llama", "a/b/c", "a/", r"C:\llama", ""]
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "get_hf_file_metadata", lambda _: pytest.fail("asked the hub"))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelUnavailableError, match=f": there is no such folder.*{REMEDY}"):
            load(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelUnavailableError, match="this is a file; the folder that holds it is wanted"):
        load_model(folder / "model.safetensors")


@pytest.mark.parametrize("text", [None, "{", '{"model": 1}'])
def test_a_tokenizer_that_is_missing_or_broken(folder: Path, text: str | None) -> None:
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelUnavailableError, match=f"^Cannot load the tokenizer .* missing or broken: .*{REMEDY}"):
        load_tokenizer(folder)


# --- the hub, played by a server on this machine ---------------------------------------------------------------------

ANSWERS = {
    "gated": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "revision": (404, "RevisionNotFound"),
    "empty": (404, "EntryNotFound"),
    "down": (503, ""),
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers a HEAD request for a file of repository org/<key of ANSWERS> as the hub does."""

    requests: list[str] = []

    def do_HEAD(self) -> None:
        self.requests.append(self.path)
        status, code = ANSWERS[self.path.split("/")[2]]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Requests that reached the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = http.server.HTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    real = huggingface_hub.hf_hub_url
    monkeypatch.setattr(models, "hf_hub_url", lambda *args, **kwargs: real(*args, **kwargs, endpoint=endpoint))
    FakeHub.requests.clear()
    yield FakeHub.requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "gated",
            "it is gated, .* no access to it. Request access on its page and log in with `hf auth login`, or use",
        ),
        ("private", "the hub knows no such repository, or it is private. Use"),
        ("revision", "it has no revision 'v9'. Use"),
        ("down", r"the hub cannot be reached \(HfHubHTTPError: .*503.*\). Use"),
    ],
)
def test_a_hub_id_out_of_reach(hub: list[str], load: Callable[..., object], name: str, reason: str) -> None:
    with pytest.raises(ModelUnavailableError, match=rf"'org/{name}': there is no such folder, .*{reason} .*{REMEDY}"):
        load(f"org/{name}", revision="v9")
    assert len(hub) == 1  # no retries


def test_a_repository_without_a_config(hub: list[str]) -> None:
    with pytest.raises(ModelUnavailableError, match=rf"its repository on the hub has no config.json.*{REMEDY}"):
        load_model("org/empty")


def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "hf_hub_url", lambda *_, **__: "http://127.0.0.1:9/config.json")  # nobody listens
    with pytest.raises(ModelUnavailableError, match=rf"the hub cannot be reached \(ConnectError: .*\). Use .*{REMEDY}"):
        load_model("meta-llama/Llama-3.2-1B")


def test_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailableError, match=rf"not in the local cache, and HF_HUB_OFFLINE .*{REMEDY}"):
        load_model("meta-llama/Llama-3.2-1B")


def test_no_valid_hub_id() -> None:
    with pytest.raises(ModelUnavailableError, match=f"neither a folder nor a valid hub id.*{REMEDY}"):
        load_model("no such name!")


@pytest.mark.parametrize("offline", [True, False])
def test_the_cache_serves_when_the_hub_is_out_of_reach(
    tiny_model_dir: Path, tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    repository, commit = tmp_path / "models--org--down", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_model_dir, repository / "snapshots" / commit)
    assert load_model("org/down").new_parameters == []
    assert load_tokenizer("org/down").eos_token_id == 2
    assert len(hub) == (0 if offline else 2)


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_folder_gives_the_same_logits_to_the_last_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_llama()
    with keep_buffer_dtypes(model):
        model.to(dtype)
    model.eval()
    ids = torch.arange(3, 200).reshape(1, -1)
    before = model(input_ids=ids).logits
    target = export_model(model, byte_tokenizer(), tmp_path / "new" / "export")
    assert sorted(path.name for path in target.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert [path.name for path in target.parent.iterdir()] == ["export"]  # nothing left beside it
    plain = AutoModelForCausalLM.from_pretrained(target).eval()  # transformers alone, in the dtype of the file
    assert plain.dtype == dtype
    assert torch.equal(plain(input_ids=ids).logits, before)
    assert torch.equal(load_model(target, dtype=dtype).model.eval()(input_ids=ids).logits, before)
    assert load_tokenizer(target)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_export_replaces_only_what_it_may(tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    export_model(tiny_llama(seed=0), byte_tokenizer(), target)  # empty: fine
    old = (target / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty; choose another folder, or set overwrite to true"):
        export_model(tiny_llama(seed=1), byte_tokenizer(), target)
    assert (target / "model.safetensors").read_bytes() == old
    (target / "leftover.txt").touch()
    export_model(tiny_llama(seed=1), byte_tokenizer(), target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() != old
    assert not (target / "leftover.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]

    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file"):
        check_export_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(FileExistsError, match="is no model folder, so it is not replaced"):
        export_model(tiny_llama(), byte_tokenizer(), tmp_path, overwrite=True)


def test_an_export_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = export_model(tiny_llama(seed=0), byte_tokenizer(), tmp_path / "export")
    old = (target / "model.safetensors").read_bytes()
    tokenizer = byte_tokenizer()

    def fail(_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        export_model(tiny_llama(seed=1), tokenizer, target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_temperature_without_sampling_does_not_stop_an_export(tmp_path: Path) -> None:
    """Checkpoints of LLaMA-2's time have it; transformers 5 loads them and refuses to save them."""
    model = tiny_llama()
    model.generation_config.temperature = 0.6
    stored = model.generation_config
    target = export_model(model, byte_tokenizer(), tmp_path / "export")
    written = json.loads((target / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert written["do_sample"] is True
    assert written["eos_token_id"] == 2
    assert model.generation_config is stored
    assert not stored.do_sample


# --- buffers ---------------------------------------------------------------------------------------------------------


def test_constant_buffers_keep_dtype_and_value() -> None:
    """Rotary frequencies rounded to bfloat16 give other logits than the exported folder, whose are float32."""
    cast, kept = tiny_llama(), tiny_llama()
    inv_freq = cast.model.rotary_emb.inv_freq.clone()
    cast.to(torch.bfloat16)
    assert cast.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    with keep_buffer_dtypes(kept):
        kept.to(torch.bfloat16)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept.model.rotary_emb.inv_freq, inv_freq)
    assert kept.model.rotary_emb.inv_freq.dtype == torch.float32
    assert "inv_freq" in kept.model.rotary_emb._non_persistent_buffers_set


def test_other_buffers_and_moves_go_through() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("constant", torch.tensor([1.001]), persistent=False)
    module.register_buffer("count", torch.tensor([3]), persistent=False)
    module.register_buffer("absent", None, persistent=False)
    with keep_buffer_dtypes(module):
        module.to(torch.bfloat16)
    assert module.running_mean.dtype == torch.bfloat16  # part of the checkpoint
    assert module.constant.item() == pytest.approx(1.001, abs=1e-6)
    assert module.count.dtype == torch.int64
    with keep_buffer_dtypes(module):
        module.to("meta", torch.float16)
    assert module.constant.is_meta
    assert module.constant.dtype == torch.float32
    with keep_buffer_dtypes(module):
        module.to_empty(device="cpu")
    assert module.constant.device.type == "cpu"


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_a_real_model_survives_the_round_trip(tmp_path: Path) -> None:
    source = os.environ.get("LIFT_SMOLLM2_DIR")
    if not source:
        pytest.skip("LIFT_SMOLLM2_DIR names no folder with SmolLM2")
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, new = load_model(source)
    finally:
        torch.set_default_dtype(torch.float32)
    assert new == []
    assert model.dtype == torch.bfloat16
    tokenizer = load_tokenizer(source)
    ids = tokenizer("Two and two make", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        target = export_model(model, tokenizer, tmp_path / "export")
        after = AutoModelForCausalLM.from_pretrained(target).eval()(input_ids=ids).logits
    assert torch.equal(before, after)
