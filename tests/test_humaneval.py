"""HumanEval: programs of a model run with limits, and the share of problems that they solve."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, save_tiny_llama, tiny_llama

from lift_lightning import cli
from lift_lightning.errors import ConfigError
from lift_lightning.evaluation import humaneval as module
from lift_lightning.evaluation.humaneval import Problem, cut, humaneval, pass_at_k, read_problems
from lift_lightning.evaluation.sandbox import SandboxError, run_program

DATA = os.environ.get("LIFT_DATA_DIR")
DOUBLE = Problem(
    "Own/0", 'def double(x):\n    """Twice x."""\n', "def check(candidate):\n    assert candidate(4) == 8", "double"
)


def can_run() -> bool:
    try:
        return run_program("") == "passed"
    except SandboxError:
        return False


runs = pytest.mark.skipif(not can_run(), reason="this machine cannot cut a process off from the network")


@runs
@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("print('a' * 10**6)", "passed"),
        ("assert False", "failed"),
        ("import sys; sys.exit(0)", "failed"),  # left before the end of its checks
        ("import os; os._exit(0)", "failed"),
        ("x = bytearray(2 * 2**30)", "failed"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("open('big', 'wb').write(b'x' * 2**22)", "failed"),
        ("import socket; socket.create_connection(('127.0.0.1', {port}), 1)", "failed"),
        ("import subprocess; subprocess.Popen(['sleep', '600'])", "passed"),
    ],
)
def test_a_program_has_limits(source: str, outcome: str):
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        source = source.replace("{port}", str(listener.getsockname()[1]))
        started = time.monotonic()
        assert run_program(source, seconds=2) == outcome
        assert time.monotonic() - started < 20


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="on Linux only, this is darwin"):
        run_program("")


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 4, 2), (5, 5, 5), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, correct: int, k: int):
    draws = list(itertools.combinations([i < correct for i in range(n)], k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@10 needs at least 10 samples of each problem, there are 5"):
        pass_at_k(5, 1, 10)


@pytest.mark.parametrize("after", ["\ndef other():\n    pass", "\n# Test", "\nprint(double(2))", "\n```\nprose", ""])
def test_what_follows_the_function_is_cut(after: str):
    body = "    # doubled\n    if x:\n        return 2 * x\n    return 0"
    assert cut(body + after) == body


@runs
def test_problems_are_solved_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = iter(["    return 2 * x\n\nprint(1)", "    return x\n", "    return x + x\n"] + ["    return 8\n"] * 9)
    asked = []

    def complete(model, tokenizer, ids, mask, settings):
        asked.append((tokenizer.decode(ids[0]), len(ids), settings.do_sample, settings.temperature))
        return [next(said) for _ in ids]

    monkeypatch.setattr(module, "generate_within_memory", complete)
    folder = tmp_path / "out"
    settings = {"allow_code_execution": True, "samples": 12, "batch_size": 8, "temperature": 0.5}
    found = humaneval(tiny_llama(), byte_tokenizer(), [DOUBLE], folder, **settings)
    assert found == {"pass@1": pytest.approx(11 / 12), "pass@10": 1.0}
    assert asked == [("<s>" + DOUBLE.prompt, 8, True, 0.5), ("<s>" + DOUBLE.prompt, 4, True, 0.5)]
    lines = [json.loads(line) for line in (folder / "humaneval.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["passed", "failed"] + ["passed"] * 10
    results = json.loads((folder / "results.json").read_text())
    assert results["run"] == {"samples": 12, "seed": 43, "max_new_tokens": 512, "temperature": 0.5}
    assert results["pass@10"] == 1.0


@runs
def test_a_run_that_broke_off_goes_on_at_the_next_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    problems = [replace(DOUBLE, name=f"HumanEval/{i}") for i in range(3)]
    asked: list[float] = []

    def complete(model, tokenizer, ids, mask, settings):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(float(torch.rand(())))  # what would be drawn
        return ["    return 2 * x\n"] * len(ids)

    monkeypatch.setattr(module, "generate_within_memory", complete)

    def solve(folder: Path, **settings):
        arguments = {"allow_code_execution": True, "samples": 2, **settings}
        return humaneval(tiny_llama(), byte_tokenizer(), problems, folder, **arguments)

    stop = -1
    solve(tmp_path / "whole")
    whole = list(asked)
    asked.clear()
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path / "out")
    assert not (tmp_path / "out/results.json").exists()
    with (tmp_path / "out/humaneval.jsonl.partial").open("a") as file:
        file.write('{"task": "HumanEval/2", "completion": "x", "outcome": "failed"}\n{"task')
    with pytest.raises(ConfigError, match=r"another run \(seed: 43 or 1\)"):
        solve(tmp_path / "out", seed=1)
    stop = -1
    assert solve(tmp_path / "out", run={"command": "again"}) == {"pass@1": 1.0}
    assert asked == whole
    assert (tmp_path / "out/humaneval.jsonl").read_text() == (tmp_path / "whole/humaneval.jsonl").read_text()
    assert not (tmp_path / "out/humaneval.jsonl.partial").exists()


@runs
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model, file = save_tiny_llama(tmp_path / "model"), tmp_path / "HumanEval.jsonl"
    row = {"task_id": DOUBLE.name, "prompt": DOUBLE.prompt, "test": DOUBLE.test, "entry_point": DOUBLE.entry_point}
    file.write_text(f"{json.dumps(row)}\n" * 2)
    monkeypatch.setattr("sys.argv", ["lift-lightning"])
    arguments = [
        "humaneval",
        "--model_name_or_path",
        str(model),
        "--path",
        str(file),
        "--output",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "runs programs that the model writes" in capsys.readouterr().err
    cli.main([*arguments, "--allow_code_execution", "true", "--limit", "1", "--max_new_tokens", "2", "--device", "cpu"])
    assert "0.0%" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["pass@1"], results["n"], results["run"]["model"]) == (0.0, 1, str(model))


def test_it_is_off_unless_asked_for(tmp_path: Path):
    with pytest.raises(ConfigError, match="runs programs that the model writes"):
        humaneval(tiny_llama(), byte_tokenizer(), [DOUBLE], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_something_else_is_named(tmp_path: Path):
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "def f():"}\n'))
    with pytest.raises(ConfigError, match="line 1 is no problem of HumanEval: KeyError"):
        read_problems(file)


@runs
@pytest.mark.realdata
@pytest.mark.skipif(not DATA, reason="LIFT_DATA_DIR is not set")
def test_the_solutions_of_the_set_pass():
    path = f"{DATA}/humaneval/HumanEval.jsonl.gz"
    problems = read_problems(path)
    assert len(problems) == 164
    rows = [json.loads(line) for line in gzip.decompress(Path(path).read_bytes()).decode().splitlines()]
    for problem, row in list(zip(problems, rows, strict=True))[::16]:
        assert run_program(problem.program(cut(row["canonical_solution"]))) == "passed", problem.name
        assert run_program(problem.program("    return None\n")) == "failed", problem.name
