"""The `humaneval` command: functions that a model completes, run against their checks."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lift_lightning import __version__
from lift_lightning.datamodules.sources import read_rows
from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.humaneval import Problem, check_allowed, read_problems
from lift_lightning.evaluation.humaneval import humaneval as solve
from lift_lightning.evaluation.recorder import RESULTS_FILE
from lift_lightning.evaluation.results import source_commit
from lift_lightning.inference import load_for_inference


def humaneval(
    model_name_or_path: str,
    output: str,
    path: str = "openai/openai_humaneval",
    allow_code_execution: bool = False,
    samples: int = 1,
    temperature: float = 0.8,
    seed: int = 43,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    limit: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> Path:
    """Complete the functions of HumanEval and run their checks: pass@1, and pass@10 of ten samples or more.

    A run that breaks off goes on at the next problem when the same command is given again.

    Args:
        model_name_or_path: a folder, such as `export` writes, or a hub id.
        output: the folder for completions and results.
        path: `HumanEval.jsonl`, `HumanEval.jsonl.gz`, or a hub id.
        allow_code_execution: has to be said: programs that the model writes are run on this machine, each in a process
            with limits of time and memory and without a network.
        samples: of each problem; one is greedy, more are drawn.
        temperature: of drawing; has no effect on one sample.
        seed: of drawing.
        max_new_tokens: of a completion.
        batch_size: prompts that are completed together, halved when they do not fit into the memory.
        limit: of the problems, from the first.
        device: such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        dtype: of the weights, such as `bfloat16`; `auto` is bfloat16 on an accelerator and float32 on the CPU.

    Returns:
        The results, as an absolute path.

    Raises:
        ConfigError: if running code is not allowed, or the folder has an unfinished run of other settings.
        DataError: if the problems are not there.
        ModelUnavailableError: if the model or its tokenizer cannot be loaded.
        SandboxError: if this machine cannot run code safely.
    """
    check_allowed(allow_code_execution)
    problems = _problems(path)[:limit]
    model, tokenizer = load_for_inference(model_name_or_path, device, dtype)
    run: dict[str, Any] = {"model": model_name_or_path, "path": path, "limit": limit, "dtype": str(model.dtype)}
    run |= {"lift_lightning": __version__, "commit": source_commit(), "command": shlex.join(sys.argv)}
    folder = Path(output).expanduser().resolve()
    found = solve(
        model,
        tokenizer,
        problems,
        folder,
        allow_code_execution=allow_code_execution,
        samples=samples,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        run=run,
        progress=lambda items: track(items, "Solving"),
    )
    table = Table("humaneval", "problems", *found)
    table.add_row(f"{samples} sample(s)", str(len(problems)), *(f"{value:.1%}" for value in found.values()))
    Console().print(table)
    return folder / RESULTS_FILE


def _problems(path: str) -> list[Problem]:
    if Path(path).expanduser().is_file():
        return read_problems(path)
    rows = read_rows(path, "test", option="--path")
    try:
        return [Problem.from_row(row) for row in rows.rows]
    except KeyError as error:
        raise ConfigError(f"{path} has no problems of HumanEval: there is no column {error}") from None
