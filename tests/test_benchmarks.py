"""Every benchmark runs in small and reports what it should. How long anything takes is not tested."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
KEYS = {"name", "machine", "versions", "commit", "date", "settings", "rows"}
ROW_KEYS = {"what", "ours", "rival", "unit", "ratio", "better", "goal", "reached", "samples", "extra"}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "LIFT_SMOLLM2_DIR"}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--threads", "1", *arguments]
    return subprocess.run(
        command,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """Of the scripts that this session asks for, two at a time: most of their time goes into imports."""
    folder = tmp_path_factory.mktemp("benchmarks")
    asked = [name for name in SCRIPTS if any(f"[{name}]" in item.nodeid for item in request.session.items)]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name, "--quick", "--out", str(folder / name)) for name in asked}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_and_reports(name: str, runs: dict[str, Future]):
    done = runs[name].result()
    assert done.returncode == 0, done.stderr
    assert "reached" in done.stdout
    written = Path(done.args[-1])
    content = json.loads(written.read_text(encoding="utf-8"))
    assert content.keys() == KEYS
    assert f"bench_{content['name']}" == name
    assert content["machine"].keys() == {"cpu", "cores", "threads", "memory_gib", "gpu"}
    assert content["machine"]["threads"] == 1
    assert content["versions"].keys() == {"python", "torch", "transformers", "peft", "lift_lightning"}
    assert content["settings"]["quick"] is True
    assert content["rows"]
    for row in content["rows"]:
        check_row(row)


def check_row(row: dict[str, Any]) -> None:
    assert row.keys() == ROW_KEYS
    assert row["better"] in ("lower", "higher")
    value = row["ours"]
    if row["rival"] is None:
        assert row["ratio"] is None
    else:
        ours, rival = (statistics.median(row["samples"][side]) for side in ("ours", "rival"))
        value = rival / ours if row["better"] == "higher" else ours / rival
        assert (row["ours"], row["rival"]) == (ours, rival)
        assert row["ratio"] == pytest.approx(value)
    if row["goal"] is None:
        assert row["reached"] is None
    else:
        assert row["reached"] is (value >= row["goal"] if row["better"] == "higher" else value <= row["goal"])


def test_make_bench_finds_them():
    names = ("masks", "memory", "monitors", "refresh", "step", "topk", "training")
    assert [f"bench_{name}" for name in names] == SCRIPTS
    assert "$(wildcard benchmarks/bench_*.py)" in (BENCHMARKS.parent / "Makefile").read_text(encoding="utf-8")


def test_without_the_model_it_says_which_variable_to_set(harness, monkeypatch):
    import smollm2

    monkeypatch.delenv("LIFT_SMOLLM2_DIR", raising=False)
    for load in (smollm2.load_model, smollm2.load_tokens):
        with pytest.raises(SystemExit, match="set LIFT_SMOLLM2_DIR to a folder"):
            load(quick=False)


def test_quick_runs_do_not_write_over_results(harness, capsys):
    with pytest.raises(SystemExit):
        harness.options("topk", "", ["--quick", "--out", str(BENCHMARKS / "results/topk.json")])
    assert "does not write to benchmarks/results" in capsys.readouterr().err


def test_sides_take_turns_after_a_warm_up(harness):
    order: list[str] = []
    runs = {"ours": lambda: order.append("a"), "rival": lambda: order.append("b")}
    samples = harness.alternate(runs, 2, "", before={"rival": lambda: order.append("-")})
    assert "".join(order) == "a-ba-ba-b"
    assert [len(found) for found in samples.values()] == [2, 2]


def test_a_slow_rival_is_measured_once_and_ours_never(harness):
    runs = {"ours": lambda: None, "rival": lambda: None}
    samples = harness.alternate(runs, 3, "", once_above=-1.0)
    assert [len(found) for found in samples.values()] == [3, 1]


@pytest.mark.parametrize(
    ("better", "goal", "ratio", "reached"),
    [
        ("higher", 2.0, 3.0, True),
        ("higher", 4.0, 3.0, False),
        ("lower", 0.5, 1 / 3, True),
        ("lower", None, 1 / 3, None),
    ],
)
def test_a_ratio_is_that_of_the_medians(harness, better, goal, ratio, reached):
    row = harness.compare("", [1.0, 2.0, 90.0], [6.0], better=better, goal=goal)
    assert row.ratio == pytest.approx(ratio)
    assert row.reached is reached


def test_what_could_not_be_measured_reaches_no_goal(harness):
    assert harness.single("", None, {"ours": []}, better="higher", goal=1.0).reached is False


def test_peak_memory_counts_what_was_there_at_once(harness):
    from resident_memory import peak_above

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")

    def twice() -> None:
        for _ in range(2):
            bytearray(b"x") * 2**26

    assert 2**26 * 0.9 < peak_above(twice) < 2**26 * 1.5
