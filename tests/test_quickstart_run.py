"""The two commands on the bundled model, cut short: what they train, measure, print and write."""

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lift_lightning.cli import lightning_cli
from lift_lightning.datamodules.rows import DataError
from lift_lightning.quickstart import __main__ as quickstart
from lift_lightning.quickstart import compare, run
from lift_lightning.quickstart.data import QuickstartDataModule
from lift_lightning.quickstart.plot import plot_run, read_metrics
from lift_lightning.quickstart.probe import SkillProbe
from lift_lightning.quickstart.run import Result, fine_tune, result_table
from lift_lightning.quickstart.text import questions

NAME = "lift-lightning/quickstart"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def short(tmp_path, monkeypatch) -> list[str]:
    """Options of a run of two steps in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart"])
    options = {"trainer.max_steps": 2, "data.train_size": 40, "data.val_size": 8, "data.batch_size": 8}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


# ---------------------------------------------------------------- data


def test_rows_are_drawn_by_the_seed_and_tests_are_not():
    def rows(seed: int) -> tuple[list, list]:
        data = QuickstartDataModule(tokenizer=NAME, train_size=40, test_size=5, val_size=8, seed=seed, batch_size=8)
        data.setup()
        assert (data.report.train, data.report.val) == (32, 8)
        prompts = [row["instruction"] for loader in data.test_dataloader() for batch in loader for row in batch["rows"]]
        return [batch["input_ids"].tolist() for batch in data.train_dataloader()], prompts

    (first, tests), (again, _), (other, same_tests) = rows(1), rows(1), rows(2)
    assert first == again
    assert first != other
    assert tests == same_tests
    expected = [q.instruction for skill in ("source", "bridge", "target") for q in questions(skill, 5, split="heldout")]
    assert sorted(tests) == sorted(expected)  # the loaders have the longest first


def test_what_cannot_be_drawn_is_an_error():
    data = QuickstartDataModule("facts", tokenizer=NAME)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"skill must be one of .*got 'facts'.*set --data\.path"):
        data.setup()
    with pytest.raises(DataError, match=r"313 heldout questions, 500 were asked for: set .*--data\.test_size"):
        QuickstartDataModule(tokenizer=NAME, test_size=500).setup("test")


# ---------------------------------------------------------------- one run


def test_lift_on_the_bundled_model(short):
    result, example = fine_tune("lift", short, tested=10)
    assert result.steps == 2
    assert result.parameters == 3_148_032
    assert result.trained == 143_360  # rank 8 in every projection
    assert result.optimizer_bytes < 0.12 * result.full_adamw_bytes == 0.12 * 8 * result.parameters
    assert set(result.before) == set(result.after) == {"source", "bridge", "target"}
    assert result.before["source"] >= 0.7
    assert example.question == questions("target", 1, split="heldout")[0].instruction
    assert "The answer is" in example.before


def test_the_budgets_of_lift_random_and_lora_are_one(short):
    trained = {method: fine_tune(method, short, tested=2, quiet=True)[0].trained for method in run.LABELS}
    assert trained["lift"] == trained["random"] == trained["lora"] == 143_360
    assert trained["full"] == 3_148_032


def mask_and_adapters(monkeypatch, method: str, options: list[str]) -> list[float]:
    """Sums that tell one mask, or one start of the adapters, from another."""
    seen = []

    def spy(optimizer):
        sparse = [float(optimizer.indices(p).double().sum()) for _, p, _ in optimizer.sparse_parameters()]
        dense = [
            float(p.detach().double().abs().sum())
            for g in optimizer.param_groups
            if not g["sparse"]
            for p in g["params"]
        ]
        seen.extend(sparse + dense)
        return len(seen)

    monkeypatch.setattr(run, "_trained", spy)
    compare._run(method, 0.0, int(options[-1]), options[:-1], tested=1)  # a rate of 0 leaves the start as it is
    return seen


@pytest.mark.parametrize("method", ["random", "lora"])
def test_what_a_method_draws_follows_the_seed(short, monkeypatch, method):
    """The random mask was the same for all of them."""
    first, again, other = (mask_and_adapters(monkeypatch, method, [*short, seed]) for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_validation_questions_are_others(short, monkeypatch):
    seen = []
    real = run.accuracies

    def spy(model, tokenizer, count, skills, split):
        seen.append((tuple(skills), split))
        return real(model, tokenizer, count, skills, split)

    monkeypatch.setattr(run, "accuracies", spy)
    result, _ = fine_tune("full", short, tested=2, split="validation", quiet=True)
    assert seen == [(("bridge", "target"), "validation")] * 2
    assert set(result.after) == {"bridge", "target"}


def test_quickstart_prints_and_writes(short, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "fine_tune", lambda method, options: fine_tune(method, options, tested=4))
    quickstart.main(short)
    out = capsys.readouterr().out
    assert "LIFT on the bundled model" in out
    for word in ("before", "143,360", "optimizer", "answer after"):
        assert word in out
    (folder,) = Path("runs/quickstart/logs").iterdir()
    saved = json.loads((folder / "results.json").read_text())
    assert saved["runs"][0]["trained"] == 143_360
    assert saved["torch"]
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    metrics = read_metrics(folder)
    assert [step for step, _ in metrics["target_accuracy"]] == [0]
    assert [step for step, _ in metrics["source_accuracy"]] == [0]
    assert (folder / "checkpoints/last.ckpt").is_file()


def test_quickstart_says_what_it_cannot_do(short, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "fine_tune", lambda method, options: fine_tune(method, options, tested=1))
    for options, message in (
        (["--model.method", "full"], "--model.method cannot be set here: this is LIFT"),
        (["--data.test_size", "500"], "313 heldout questions, 500 were asked for"),
    ):
        with pytest.raises(SystemExit) as stopped:
            quickstart.main([*short, *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    quickstart.main([*short, "--trainer.logger", "false"])
    out = capsys.readouterr().out
    assert "no plot: it is drawn from the metrics.csv" in out
    assert Path("runs/quickstart/results.json").is_file()


def test_run_tests_every_skill_by_the_command_line(short, capsys):
    from lift_lightning.cli import main

    main(["run", "--config", "configs/quickstart.yaml", *short, "--data.test_size", "6"])
    out = capsys.readouterr().out
    for skill in ("source", "bridge", "target"):
        assert f"quickstart-{skill}" in out


# ---------------------------------------------------------------- probe


@pytest.mark.parametrize(("interval", "steps"), [(1, [0, 1, 2]), (2, [0, 2]), (None, [])])
def test_the_probe_measures_at_its_interval(short, interval, steps):
    cli = lightning_cli(["--config", run.CONFIG, *short, "--model.accumulate_grad_batches", "2"], run=False)
    (probe,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SkillProbe)]
    probe.interval, probe.questions = interval, 2
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    metrics = read_metrics(Path(cli.trainer.log_dir))
    assert [step for step, _ in metrics.get("target_accuracy", [])] == steps
    assert (probe.seconds > 0) == bool(steps)


# ---------------------------------------------------------------- plot and tables


def test_metrics_are_read_by_name_and_step(tmp_path):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "train_loss", "lift_overlap"], [0, 2.5, ""], [1, "", 0.5], [2, 1.5, ""]])
    assert read_metrics(tmp_path) == {"train_loss": [(0, 2.5), (2, 1.5)], "lift_overlap": [(1, 0.5)]}
    assert plot_run(tmp_path, tmp_path / "deep/run.png").stat().st_size > 5000


def result(method="lift", lr=1e-3, seed=1, target=0.5, source=0.9) -> Result:
    before = {"source": 1.0, "bridge": 1.0, "target": 0.0}
    after = {"source": source, "bridge": 1.0, "target": target}
    return Result(method, lr, seed, 10, before, after, 300, 1000, 50, 2**20, 10 * 2**20, 61.0, "runs")


def test_the_table_is_of_means_and_ranges(capsys):
    runs = [result(target=0.4), result(target=0.6, seed=2), result("full", target=0.75, source=0.2)]
    Console(width=160).print(result_table(runs, "Title"))
    lines = capsys.readouterr().out.splitlines()
    (lift,) = [line for line in lines if "LIFT" in line]
    for text in ("50.0% (40% to 60%)", "50 (5.0%)", "1.00 MiB", "10.0%", "61 s"):
        assert text in lift
    (full,) = [line for line in lines if "full fine-tuning" in line]
    assert "75.0%" in full
    assert "to" not in full.replace("fine-tuning", "")
    (before,) = [line for line in lines if "before" in line]
    assert before.count("100.0%") == 2


def test_tuning_takes_the_smallest_rate_within_the_tolerance(tmp_path, monkeypatch):
    reached = {5e-4: 0.84, 1e-3: 0.86, 2e-3: 0.9, 4e-3: 0.7}
    asked = []

    def fake(method, rate, seed, overrides, tested, validation):
        asked.append((method, seed, validation))
        return result(method, rate, seed, target=reached[rate])

    monkeypatch.setattr(compare, "_run", fake)
    monkeypatch.setitem(compare.GRIDS, "lift", tuple(reached))
    chosen = compare.tune(("lift",), [], tmp_path / "tuning.json")
    assert chosen == {"lift": 1e-3}
    assert asked == [("lift", 0, True)] * 4
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["chosen"] == {"lift": 1e-3}
    assert [trial["validation"] for trial in record["trials"]] == list(reached.values())


def test_the_rates_are_those_of_the_record_and_of_the_config():
    record = json.loads((ROOT / "docs/results/quickstart_tuning.json").read_text())
    assert record["chosen"] == compare.RATES
    for method, grid in compare.GRIDS.items():
        found = {trial["lr"]: trial["validation"] for trial in record["trials"] if trial["method"] == method}
        assert tuple(found) == grid
        assert compare.choose(found) == compare.RATES[method]
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    assert config["model"]["lr"] == compare.RATES["lift"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lr", "1e-2"], "--model.lr cannot be set here"),
        (["--seed_everything=7"], "--seed_everything cannot be set here"),
        (["--tested", "500"], "source has 313 heldout questions, 500 were asked for"),
    ],
)
def test_what_would_make_the_comparison_false_is_refused(short, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        compare.main([*short, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_said_before_the_first_run(monkeypatch, capsys):
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == "peft" else object())
    monkeypatch.setattr(compare, "fine_tune", None)
    with pytest.raises(SystemExit):
        compare.main([])
    assert "peft is missing: install the package's extra, lift-lightning[baselines]" in capsys.readouterr().err


def test_comparing_prints_and_writes(short, capsys, tmp_path):
    compare.main(["--methods", "lift", "lora", "--seeds", "1", "2", "--tested", "4", "--output", "out", *short])
    out = capsys.readouterr().out
    assert "mean of 2 seeds" in out
    assert out.count("lr 0.") == 4
    saved = json.loads((tmp_path / "out/quickstart_comparison.json").read_text())["runs"]
    assert [(r["method"], r["seed"]) for r in saved] == [("lift", 1), ("lift", 2), ("lora", 1), ("lora", 2)]
    assert {r["trained"] for r in saved} == {143_360}
    assert (tmp_path / "out/quickstart_comparison.png").read_bytes().startswith(b"\x89PNG")
