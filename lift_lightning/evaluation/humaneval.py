"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions to be completed, and checks that they have to pass."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.collate import pad_prompts
from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.generation import GenerationSettings, generate_within_memory
from lift_lightning.evaluation.results import write_json
from lift_lightning.evaluation.sandbox import run_program
from lift_lightning.prompts import choose_pad_id, encode_prompt

VERSION = 1  # of prompt, cut and scoring
_END = re.compile(r"\n(?=class |def |#|if |print\(|@|```)")  # what follows the function at the margin


@dataclass(frozen=True)
class Problem:
    """One function to complete.

    Attributes:
        name: such as `HumanEval/0`.
        prompt: imports, head and docstring.
        test: defines `check(candidate)`.
        entry_point: name of the function.
    """

    name: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """What has to come to its end."""
        return f"{self.prompt}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of `HumanEval.jsonl` or `HumanEval.jsonl.gz`.

    Raises:
        ConfigError: if a line is none.
    """
    file = Path(path)
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text(encoding="utf-8")
    problems = []
    for number, line in enumerate(filter(None, text.split("\n")), start=1):
        try:
            row = json.loads(line)
            problems.append(Problem(row["task_id"], row["prompt"], row["test"], row["entry_point"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is no problem of HumanEval: {error!r}") from error
    return problems


def cut(completion: str) -> str:
    """The function's body: a model goes on with other functions, tests or prose behind it."""
    return _END.split(completion, maxsplit=1)[0]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of which some are (eq. 1 of the paper).

    Raises:
        ValueError: if k is above n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def humaneval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    folder: str | Path,
    *,
    allow_code_execution: bool = False,
    samples: int = 1,
    temperature: float = 0.8,
    seed: int = 43,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> dict[str, float]:
    """Complete each function and run its checks, each in a process of its own (see `sandbox`).

    Args:
        model: a causal language model.
        tokenizer: its own.
        problems: of `read_problems`.
        folder: where `humaneval.jsonl`, every completion with its outcome, and `results.json` go.
        allow_code_execution: has to be said: programs that the model writes are run on this machine.
        samples: of each problem; one is greedy, more are drawn.
        temperature: of drawing; has no effect on one sample.
        seed: of drawing.
        max_new_tokens: of a completion.
        batch_size: prompts that are completed together.
        progress: wraps the problems, such as `rich.progress.track`.

    Returns:
        `pass@1`, and `pass@10` where there are samples for it.

    Raises:
        ConfigError: if running code is not allowed.
        SandboxError: if this machine cannot run it safely.
    """
    if not allow_code_execution:
        raise ConfigError(
            "HumanEval runs programs that the model writes, in processes with limits of time and memory and without a "
            "network: say that this is wanted with allow_code_execution=True"
        )
    run_program("")  # whether it can be done, before anything is generated
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    drawn = samples > 1
    settings = GenerationSettings(1, max_new_tokens, do_sample=drawn, temperature=temperature if drawn else 1.0)
    torch.manual_seed(seed)
    right: list[int] = []
    with (target / "humaneval.jsonl").open("w", encoding="utf-8") as file:
        for problem in progress(problems):
            outcomes = []
            for completion in _complete(model, tokenizer, problem, samples, batch_size, settings):
                outcome = run_program(problem.program(completion))
                outcomes.append(outcome)
                line = {"task": problem.name, "completion": completion, "outcome": outcome}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
            right.append(outcomes.count("passed"))
    found = {
        f"pass@{k}": sum(pass_at_k(samples, count, k) for count in right) / len(right) for k in (1, 10) if k <= samples
    }
    run: dict[str, float | None] = {"samples": samples, "seed": seed, "max_new_tokens": max_new_tokens}
    run |= {"temperature": temperature if drawn else None}
    write_json(target / "results.json", {"task": "humaneval", "version": VERSION, "n": len(right), **found, "run": run})
    return found


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    samples: int,
    batch_size: int,
    settings: GenerationSettings,
) -> list[str]:
    prompts = [encode_prompt(tokenizer, problem.prompt.rstrip("\n") + "\n")] * samples
    found: list[str] = []
    for first in range(0, samples, batch_size):
        padded = pad_prompts(prompts[first : first + batch_size], choose_pad_id(tokenizer))
        ids, mask = (padded[key].to(model.device) for key in ("input_ids", "attention_mask"))
        found += map(cut, generate_within_memory(model, tokenizer, ids, mask, settings))
    return found
