"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions to be completed, and checks that they have to pass."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.collate import pad_prompts
from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.generation import GenerationSettings, generate_within_memory
from lift_lightning.evaluation.recorder import RESULTS_FILE, RUN_FILE
from lift_lightning.evaluation.results import begin_run, write_json
from lift_lightning.evaluation.sandbox import run_program
from lift_lightning.prompts import choose_pad_id, encode_prompt
from lift_lightning.rng import seed_of

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

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Problem:
        """Of a row with the columns of the published set.

        Raises:
            KeyError: if one is missing.
        """
        return cls(row["task_id"], row["prompt"], row["test"], row["entry_point"])

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
            problems.append(Problem.from_row(row))
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


def check_allowed(allow_code_execution: bool) -> None:
    """Whether programs that a model wrote may be run, and can be.

    Raises:
        ConfigError: if running code is not allowed.
        SandboxError: if this machine cannot run it safely.
    """
    if not allow_code_execution:
        raise ConfigError(
            "HumanEval runs programs that the model writes, in processes with limits of time and memory and without a "
            "network: say that this is wanted with allow_code_execution=True"
        )
    run_program("")


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
    run: Mapping[str, Any] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> dict[str, float]:
    """Complete each function and run its checks, each in a process of its own (see `sandbox`).

    Args:
        model: a causal language model.
        tokenizer: its own.
        problems: of `read_problems`.
        folder: where `humaneval.jsonl`, every completion with its outcome, and `results.json` go. An earlier call that
            broke off there, with the same settings, is taken up at its next problem.
        allow_code_execution: has to be said: programs that the model writes are run on this machine.
        samples: of each problem; one is greedy, more are drawn.
        temperature: of drawing; has no effect on one sample.
        seed: of drawing; each problem has its own that follows from it.
        max_new_tokens: of a completion.
        batch_size: prompts that are completed together.
        run: what else is written to the results, such as the name of the model.
        progress: wraps the problems, such as `rich.progress.track`.

    Returns:
        `pass@1`, and `pass@10` where there are samples for it.

    Raises:
        ConfigError: if running code is not allowed, or the folder has an unfinished run of other settings.
        SandboxError: if this machine cannot run it safely.
    """
    check_allowed(allow_code_execution)
    target, drawn = Path(folder), samples > 1
    partial = target / "humaneval.jsonl.partial"
    about: dict[str, Any] = {"samples": samples, "seed": seed, "max_new_tokens": max_new_tokens}
    about |= {"temperature": temperature if drawn else None, **(run or {})}
    resumes = begin_run(target / RUN_FILE, about, partial.exists())
    solved = _solved(partial, samples) if resumes else {}
    settings = GenerationSettings(1, max_new_tokens, do_sample=drawn, temperature=temperature if drawn else 1.0)
    with partial.open("a" if resumes else "w", encoding="utf-8") as file:
        for problem in progress([one for one in problems if one.name not in solved]):
            torch.manual_seed(seed_of(seed, problem.name))
            completions = _complete(model, tokenizer, problem, samples, batch_size, settings)
            outcomes = [run_program(problem.program(completion)) for completion in completions]
            solved[problem.name] = [
                {"task": problem.name, "completion": completion, "outcome": outcome}
                for completion, outcome in zip(completions, outcomes, strict=True)
            ]
            file.write(_lines(solved[problem.name]))
            file.flush()
    right = [sum(line["outcome"] == "passed" for line in solved[problem.name]) for problem in problems]
    found = {
        f"pass@{k}": sum(pass_at_k(samples, count, k) for count in right) / len(right) for k in (1, 10) if k <= samples
    }
    write_json(target / RESULTS_FILE, {"task": "humaneval", "version": VERSION, "n": len(right), **found, "run": about})
    partial.replace(target / "humaneval.jsonl")
    return found


def _solved(partial: Path, samples: int) -> dict[str, list[dict[str, Any]]]:
    """By problem the completions of those that an earlier run came to the end of; what it left of another is cut."""
    found: dict[str, list[dict[str, Any]]] = {}
    content = partial.read_text(encoding="utf-8")
    for text in content[: content.rfind("\n") + 1].split("\n"):
        if text:
            line = json.loads(text)
            found.setdefault(line["task"], []).append(line)
    solved = {name: lines for name, lines in found.items() if len(lines) == samples}
    whole = partial.with_name(partial.name + ".whole")
    whole.write_text("".join(map(_lines, solved.values())), encoding="utf-8")
    whole.replace(partial)
    return solved


def _lines(completions: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(completion, ensure_ascii=False) + "\n" for completion in completions)


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
