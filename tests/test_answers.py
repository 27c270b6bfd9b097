"""A test through the Trainer: cut off and taken up again, and short of memory."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tiny import save_tiny_llama, write_sums

from lift_lightning import LiftLightningModule
from lift_lightning.datamodules import Math10KDataModule
from lift_lightning.evaluation import answering, generation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Asked:
    """Counts the prompts that are generated for, and dies before batch `fatal`."""

    def __init__(self, fatal: int | None = None) -> None:
        self.fatal = fatal
        self.batches: list[int] = []

    def __call__(self, model, tokenizer, input_ids, attention_mask, settings, *, in_step=False):
        if len(self.batches) == self.fatal:
            raise RuntimeError("the power is off")
        self.batches.append(len(input_ids))
        assert bool(attention_mask.any(dim=0).all())  # no column of padding alone
        return generation.generate(model, tokenizer, input_ids, attention_mask, settings)


@pytest.fixture
def test_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, rows = save_tiny_llama(tmp_path / "model"), write_sums(tmp_path / "sums.json", rows=11)

    def run(folder: str, fatal: int | None = None) -> Asked:
        asked = Asked(fatal)
        monkeypatch.setattr(answering, "generate_within_memory", asked)
        settings = {"num_beams": 1, "max_new_tokens": 4, "unknown_tasks": "number"}
        module = LiftLightningModule(str(model), predictions_dir=str(tmp_path / folder), **settings)
        data = Math10KDataModule(str(rows), str(model), test_path=str(rows), eval_batch_size=4)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        pl.Trainer(accelerator="cpu", **quiet).test(module, datamodule=data, verbose=False)
        return asked

    return run


def test_a_test_that_dies_goes_on_with_the_next_sample(test_with, tmp_path: Path):
    assert test_with("whole").batches == [4, 4, 3]
    with pytest.raises(RuntimeError, match="the power is off"):
        test_with("broken", fatal=2)
    # Half of what the last batch had: the two written last are gone.
    partial = tmp_path / "broken/sums.jsonl.partial"
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    partial.write_text("".join(lines[:6]))
    assert test_with("broken").batches == [2, 3]
    whole, again = ((tmp_path / name / "sums.jsonl").read_text() for name in ("whole", "broken"))
    assert again == whole
    assert [json.loads(line)["index"] for line in whole.splitlines()] == list(range(11))
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "broken")]
    assert results[0]["tasks"] == results[1]["tasks"]
    assert results[0]["run"]["num_beams"] == 1
    assert results[0]["run"]["model"].endswith("model")


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    sizes = []

    def small(model, tokenizer, input_ids, attention_mask, settings=None, *, in_step=False):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no more")
        return [str(row) for row in input_ids[:, 0].tolist()]

    monkeypatch.setattr(generation, "generate", small)
    ids = torch.arange(7).unsqueeze(1)
    texts = generation.generate_within_memory(None, None, ids, torch.ones_like(ids))
    assert texts == [str(i) for i in range(7)]
    assert sizes == [7, 4, 2, 2, 3, 2, 1]
    assert "out of memory with 7 prompts of 1 tokens: going on with 4" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        generation.generate_within_memory(None, None, ids, torch.ones_like(ids), in_step=True)
    monkeypatch.setattr(generation, "generate", lambda *args, **kwargs: [][1])
    with pytest.raises(IndexError):  # any other exception is an error
        generation.generate_within_memory(None, None, ids, torch.ones_like(ids))
