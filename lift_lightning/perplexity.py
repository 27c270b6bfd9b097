"""The `perplexity` command: how well a model expects a text."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lift_lightning import __version__
from lift_lightning.datamodules.rows import get_text
from lift_lightning.datamodules.sources import read_rows, read_text
from lift_lightning.evaluation.perplexity import perplexity as measure
from lift_lightning.evaluation.results import source_commit, write_json
from lift_lightning.inference import load_for_inference

VERSION = 1  # of reading and windows


def perplexity(
    model_name_or_path: str,
    output: str,
    path: str = "Salesforce/wikitext",
    subset: str | None = "wikitext-2-raw-v1",
    window: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> Path:
    """Measure the perplexity of a text per token and per word; only the one per word compares two tokenizers.

    Args:
        model_name_or_path: a folder, such as `export` writes, or a hub id.
        output: the JSON file to write.
        path: a .txt file, or rows with a column `text`, one after the other: a file or a hub id, whose split `test` is
            read.
        subset: configuration of a hub dataset that has several.
        window: tokens that the model sees at a time.
        stride: tokens that are new in each window; the others are what they are predicted from.
        max_tokens: of the text; the rest is left out.
        device: such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        dtype: of the weights, such as `bfloat16`; `auto` is bfloat16 on an accelerator and float32 on the CPU.

    Returns:
        The file, as an absolute path.

    Raises:
        DataError: if the text is not there.
        FileExistsError: if the output is there already.
        ModelUnavailableError: if the model or its tokenizer cannot be loaded.
    """
    target = Path(output).expanduser().resolve()
    if target.exists():
        raise FileExistsError(f"{target} is there already; choose another file, or remove it")
    text = _text(path, subset)
    model, tokenizer = load_for_inference(model_name_or_path, device, dtype)
    started = time.perf_counter()
    found = measure(
        model,
        tokenizer,
        text,
        window=window,
        stride=stride,
        max_tokens=max_tokens,
        progress=lambda windows: track(windows, "Reading"),
    )
    run: dict[str, Any] = {"model": model_name_or_path, "path": path, "window": window, "stride": stride}
    run |= {"max_tokens": max_tokens, "dtype": str(model.dtype), "seconds": round(time.perf_counter() - started, 1)}
    run |= {"lift_lightning": __version__, "commit": source_commit(), "command": shlex.join(sys.argv)}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {"task": "perplexity", "version": VERSION, **found._asdict(), "run": run})
    table = Table("perplexity", "per token", "per word", "tokens", "words")
    table.add_row(path, f"{found.token:.3f}", f"{found.word:.3f}", f"{found.tokens:,}", f"{found.words:,}")
    Console().print(table)
    return target


def _text(path: str, subset: str | None) -> str:
    file = Path(path).expanduser()
    if file.is_file() and file.suffix == ".txt":
        return read_text(file)
    rows = read_rows(path, "test", subset=subset, option="--path")
    return "".join(get_text(row, "text", rows.where(i)) for i, row in enumerate(rows.rows))
