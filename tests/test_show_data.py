"""The data command shows what a model would see."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import byte_tokenizer, save_tiny_llama, write_sums

from lift_lightning import cli
from lift_lightning.datamodules import FineTuningDataModule, GLUEDataModule, Math10KDataModule
from lift_lightning.show_data import show_data


def shown(data: FineTuningDataModule, styles: bool = False) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    show_data(data, console)
    return console.export_text(styles=styles)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lengths = [10, 20, 30, 400]
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "x" * n, "answer": n} for n in lengths]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_the_table_tells_sizes_lengths_and_padding(rows: Path, tmp_path: Path):
    tests = write_sums(tmp_path / "sums.json", rows=3)
    settings = {"cache_dir": str(tmp_path / "cache"), "test_path": str(tests), "max_length": 300, "val_size": 1}
    data = Math10KDataModule(str(rows), byte_tokenizer(), batch_size=2, seed=1, **settings)
    text = shown(data)
    table = {
        name.strip(): value.strip()
        for name, value in (line[1:-1].split("│") for line in text.splitlines() if line.count("│") == 3)
    }
    lengths = sorted(min(n, 300) for n in data.train_dataset["full_length"])
    assert table["rows for training"] == "3 of 4"
    assert table["rows for validation"] == "1"
    assert table["50% of the rows are up to"] == f"{lengths[1]} tokens"
    assert table["targets cut at max_length"] == "1 (max_length 300)"
    assert table["test: sums"] == "3 rows"
    batches = [batch["attention_mask"] for batch in data.train_dataloader()]
    padding = 1 - sum(int(b.sum()) for b in batches) / sum(b.numel() for b in batches)
    assert table["padding of the first epoch's batches"] == f"{padding:.1%} (batch_size 2)"
    assert "AddSub, MultiArith and SingleEq overlap" in " ".join(text.replace("│", " ").split())


def test_what_is_learned_has_another_colour(rows: Path, tmp_path: Path):
    data = Math10KDataModule(str(rows), byte_tokenizer(), val_size=0, cache_dir=str(tmp_path / "cache"))
    text = shown(data, styles=True)
    assert "\x1b[1;32mxxxxxxxxxx</s>\x1b[0m" in text
    assert "\x1b[2mSay 10." in text


def test_the_command_takes_the_options_of_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model, sums = save_tiny_llama(tmp_path / "model"), write_sums(tmp_path / "sums.json")
    options = ["--config", "configs/math10k.yaml", "--model.model_name_or_path", str(model), "--data.path", str(sums)]
    options += ["--data.val_size", "4", "--data.cache_dir", str(tmp_path / "cache"), "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lift-lightning", "data", *options])
    cli.main()
    output = capsys.readouterr().out
    assert "20 of 24" in output
    assert "The answer is" in output


def test_rows_with_labels(tmp_path: Path):
    for split, count in (("train", 12), ("dev", 4)):
        lines = "".join(f"gj04\t{int(i % 4 > 0)}\t*\tSentence {'x' * i}.\n" for i in range(count))
        (tmp_path / f"{split}.tsv").write_text(lines)
    text = shown(GLUEDataModule("cola", str(tmp_path), byte_tokenizer(), max_length=20, cache_dir=str(tmp_path / "c")))
    table = {
        name.strip(): value.strip()
        for name, value in (line[1:-1].split("│") for line in text.splitlines() if line.count("│") == 3)
    }
    assert (table["rows for training"], table["rows for validation"]) == ("12", "4")
    assert table["labels"] == "0: 25.0%, 1: 75.0%"
    assert table["rows cut at max_length"] == "2 (max_length 20)"
    assert "label: 0" in text
    assert "Sentence" in text
