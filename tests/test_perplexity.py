"""Perplexity per token and per word, against the model's own loss."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, save_tiny_llama, tiny_llama

from lift_lightning import cli
from lift_lightning.evaluation.perplexity import perplexity
from lift_lightning.models import load_model, load_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. It barks."
DATA, MODEL = os.environ.get("LIFT_DATA_DIR"), os.environ.get("LIFT_SMOLLM2_DIR")


def losses(ids: list[int]) -> torch.Tensor:
    """Of each token but the first, given all before it."""
    with torch.no_grad():
        logits = tiny_llama().eval()(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").double()


@pytest.mark.parametrize("bos", [True, False])
def test_one_window_is_the_loss_of_the_model(bos: bool):
    tokenizer, model = byte_tokenizer(bos=bos), tiny_llama().train()
    found = perplexity(model, tokenizer, TEXT)
    loss = losses(tokenizer(TEXT).input_ids)
    assert found.tokens == len(TEXT) - (0 if bos else 1)
    assert found.words == 11
    assert found.token == pytest.approx(math.exp(loss.mean()), rel=1e-6)
    assert found.word == pytest.approx(math.exp(loss.sum() / 11), rel=1e-6)
    assert model.training


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (16, 5), (20, 7), (54, 10), (55, 9)])
def test_each_token_counts_once_with_what_the_window_shows(window: int, stride: int):
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT).input_ids
    total, done = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        total += float(losses(ids[begin:end])[done - begin - 1 :].sum())
        done = end
        if end == len(ids):
            break
    found = perplexity(tiny_llama(), tokenizer, TEXT, window=window, stride=stride)
    assert found.tokens == len(ids) - 1
    assert found.token == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-6)


def test_the_rest_of_a_long_text_is_left_out_of_tokens_and_words():
    found = perplexity(tiny_llama(), byte_tokenizer(), TEXT, max_tokens=20)  # <s>The quick brown fox
    assert (found.tokens, found.words) == (19, 4)


@pytest.mark.parametrize("settings", [{"stride": 0}, {"window": 512}])
def test_windows_that_do_not_fit_are_refused(settings: dict[str, int]):
    with pytest.raises(ValueError, match="stride must be at least 1 and below the window"):
        perplexity(tiny_llama(), byte_tokenizer(), TEXT, **settings)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        perplexity(tiny_llama(), byte_tokenizer(bos=False), "a")


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA and MODEL), reason="LIFT_DATA_DIR and LIFT_SMOLLM2_DIR are not both set")
def test_a_real_model_expects_real_text():
    text = Path(f"{DATA}/wikitext2/test.txt").read_text(encoding="utf-8")[:10_000]
    model, _ = load_model(MODEL)
    found = perplexity(model, load_tokenizer(MODEL), text, max_tokens=600)
    assert 5 < found.token < 40
    assert found.word > found.token


@pytest.mark.parametrize("name", ["text.txt", "rows.json"])
def test_the_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model, path, out = save_tiny_llama(tmp_path / "model"), tmp_path / name, tmp_path / "out/found.json"
    path.write_text(TEXT if name == "text.txt" else json.dumps([{"text": TEXT[:20]}, {"text": TEXT[20:]}]))
    monkeypatch.setattr("sys.argv", ["lift-lightning"])
    arguments = ["perplexity", "--model_name_or_path", str(model), "--path", str(path), "--output", str(out)]
    cli.main([*arguments, "--window", "16", "--stride", "8", "--device", "cpu"])
    found = json.loads(out.read_text())
    expected = perplexity(*(load_model(model)[0], load_tokenizer(model)), TEXT, window=16, stride=8)
    assert [found[key] for key in expected._fields] == [pytest.approx(value) for value in expected]
    assert f"{expected.token:.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "is there already" in capsys.readouterr().err
