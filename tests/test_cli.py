"""The command line as a user types it: dispatcher, configurations, overrides, messages."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import write_sums
from transformers import AutoModelForCausalLM

from lift_lightning import cli
from lift_lightning.callbacks import MaskRefreshCallback

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs/math10k.yaml"
MODELS = sorted((ROOT / "configs/models").glob("*.yaml"))


@pytest.fixture
def lift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command in an empty folder, as the console script does."""

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lift-lightning", *args])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        cli.main()

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def failing(lift, capsys):
    """Run a command that ends with one message and exit status 2; the message."""

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            lift(*args)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def tiny(tiny_model_dir: Path, sums_file: Path, tmp_path: Path) -> list[str]:
    """Overrides that make configs/math10k.yaml run on the tiny model in a second."""
    override = {
        "lift": {"rank": 4, "lra_rank": 6, "interval": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "run"),
            "logger": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(tmp_path / "run"), "filename": "{step}", "save_last": True},
                }
            ],
        },
        "data": {"init_args": {"val_size": 4, "max_length": 512, "cache_dir": str(tmp_path / "cache")}},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(override))
    model, rows = str(tiny_model_dir), str(sums_file)
    return ["--config", str(BASE), "--config", str(file), "--model.model_name_or_path", model, "--data.path", rows]


def parsed(*args: str) -> cli.LiftCLI:
    return cli.lightning_cli(list(args), run=False)


def selection(found: cli.LiftCLI) -> MaskRefreshCallback:
    (callback,) = (c for c in found.trainer.callbacks if isinstance(c, MaskRefreshCallback))
    return callback


@pytest.mark.parametrize("override", [None, *MODELS], ids=lambda p: p.stem if p else "math10k")
def test_every_config_instantiates_and_opens_with_its_command_and_an_override(override):
    files = [BASE] if override is None else [BASE, override]
    found = parsed(*(word for file in files for word in ("--config", str(file))), "--trainer.accelerator", "cpu")
    text = files[-1].read_text()
    settings = yaml.safe_load(text)
    assert found.model.hparams.lr == settings["model"]["lr"]
    assert found.model.model_name_or_path == settings["model"]["model_name_or_path"]
    assert found.datamodule.tokenizer == settings["model"]["model_name_or_path"]
    assert found.datamodule.seed == 43
    assert selection(found).config.rank == settings["lift"]["rank"]
    assert selection(found).config.lra_rank == settings["lift"]["lra_rank"]
    assert selection(found).interval == settings["lift"]["interval"] == 400
    # What the base sets and the override does not stays: batch of 16, released betas and eps.
    assert found.datamodule.batch_size * found.model.hparams.accumulate_grad_batches == 16
    assert tuple(found.model.hparams.betas) == (0.9, 0.95)
    assert found.model.hparams.eps == 1e-6
    opening = text.split("\n\n")[0]
    relative = files[-1].relative_to(ROOT)
    commands = re.findall(r"python main\.py fit --config configs/math10k\.yaml.*", opening)
    assert len(commands) == 2
    assert all(str(relative) in command for command in commands)
    assert re.search(r"--(lift|model)\.\w+ ", commands[1] + " ")


def test_a_later_file_that_sets_one_field_of_the_selection_leaves_the_others(tmp_path):
    file = tmp_path / "later.yaml"
    file.write_text("lift:\n  interval: 7\n")
    found = selection(parsed("--config", str(BASE), "--config", str(file), "--trainer.accelerator", "cpu"))
    assert (found.interval, found.config.rank, found.config.lra_rank) == (7, 128, 32)


def test_fit_run_test_and_export_through_the_command_line(lift, tiny, tmp_path, capsys):
    questions = str(write_sums(tmp_path / "AddSub.json", rows=3, seed=5))
    test = ["--data.test_path", questions, "--model.max_new_tokens", "3", "--model.num_beams", "1"]
    lift("run", *tiny, *test)
    assert "addsub" in capsys.readouterr().out
    lines = (tmp_path / "run/predictions/addsub.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    # Again in the same folder, where config.yaml lies already: overwritten, no crash.
    lift("fit", *tiny)
    lift("validate", *tiny, "--ckpt_path", "run/last.ckpt")
    assert "val_loss" in capsys.readouterr().out
    lift("test", *tiny, *test, "--ckpt_path", "run/last.ckpt")
    lift("export", "--ckpt_path", "run/last.ckpt", "--output", "exported")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    saved = torch.load("run/last.ckpt", weights_only=True)["state_dict"]
    assert all(
        torch.equal(saved[f"model.{name}"], value) for name, value in weights.items() if name != "lm_head.weight"
    )


def test_what_is_typed_wins_over_the_hyperparameters_of_a_checkpoint(lift, tiny, monkeypatch):
    lift("fit", *tiny)
    seen = []
    monkeypatch.setattr(cli.LiftCLI, "_run_subcommand", lambda self, command: seen.append(self.model.hparams.lr))
    lift("fit", *tiny, "--model.lr", "0.7", "--ckpt_path", "run/last.ckpt")
    assert seen == [0.7]


def test_data_follow_the_model_and_the_seed_unless_something_else_is_typed(tiny_model_dir):
    base = ["--config", str(BASE), "--trainer.accelerator", "cpu"]
    found = parsed(*base, "--seed_everything", "7", "--model.revision", "v2").datamodule
    assert (found.seed, found.tokenizer_revision) == (7, "v2")
    typed = ["--data.seed", "3", "--data.tokenizer", str(tiny_model_dir), "--model.revision", "v2"]
    found = parsed(*base, *typed).datamodule
    assert (found.seed, found.tokenizer, found.tokenizer_revision) == (3, str(tiny_model_dir), None)


def test_a_saved_config_follows_another_model_and_seed(lift, tiny, tmp_path, monkeypatch):
    """What follows from model and seed is not saved: it would win over those that are typed beside the saved file."""
    lift("fit", *tiny)
    seen = []
    monkeypatch.setattr(cli.LiftCLI, "_run_subcommand", lambda self, command: seen.append(self.datamodule))
    saved = ["--config", str(tmp_path / "run/config.yaml")]
    lift("fit", *saved, "--model.model_name_or_path", "other", "--seed_everything", "7")
    assert (seen[0].tokenizer, seen[0].seed) == ("other", 7)
    assert "math_10k.json" not in seen[0].path


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ([], "there is nothing to test on: set --data.test_suite"),
        (["--data.test_path", "mine.json"], "'mine' is none of the known tasks: say with --model.unknown_tasks"),
        (["--model.task", "sequence_classification"], "use validate"),
    ],
)
def test_run_finds_what_stops_its_test_before_the_training(lift, tiny, tmp_path, failing, mistake, message):
    write_sums(tmp_path / "mine.json", rows=2)
    assert message in failing("run", *tiny, *mistake)
    assert not (tmp_path / "run").exists()


def test_a_config_is_found_in_the_package_outside_a_clone(lift, capsys):
    with pytest.raises(SystemExit) as stop:
        lift("fit", "--config", "configs/math10k.yaml", "--config", "configs/models/llama-3-8b.yaml", "--print_config")
    assert stop.value.code == 0
    output, errors = capsys.readouterr()
    assert yaml.safe_load(output)["lift"]["lra_rank"] == 128
    assert errors.count("taking the one that comes with the package") == 2


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--model.model_name_or_path", "some/model"], ["'some/model'", "--model.model_name_or_path /path/to/folder"]),
        (["--data.path", "nowhere.json"], ["nowhere.json", "--data.path"]),
        (["--lift.rank", "4", "--lift.density", "0.05"], ["rank=4 and density=0.05 both set the budget"]),
        (["--model.lr", "-1"], ["lr must be at least 0, got -1.0"]),
        (["--model.target_modules", "nothing"], ["'nothing' matched none of the 14 names", "q_proj"]),
        (["--ckpt_path", "gone.ckpt"], ["gone.ckpt"]),
    ],
    ids=["model", "data", "budget", "rate", "target", "checkpoint"],
)
def test_a_users_mistake_ends_with_one_message(tiny, failing, arguments, messages):
    error = failing("fit", *tiny, *arguments)
    assert "Traceback" not in error
    for message in messages:
        assert message in error.split("error: ", 1)[1]


def test_export_says_what_it_was_asked(failing, lift, capsys):
    assert "there is no checkpoint file 'gone.ckpt'" in failing("export", "--ckpt_path", "gone.ckpt", "--output", "x")
    with pytest.raises(SystemExit):
        lift("export", "--help")
    assert "usage: lift-lightning export" in capsys.readouterr().out


@pytest.mark.parametrize(("args", "code"), [([], 2), (["--help"], 0)])
def test_usage_lists_the_commands(lift, capsys, args, code):
    with pytest.raises(SystemExit) as stop:
        lift(*args)
    assert stop.value.code == code
    assert {"fit", "validate", "test", "run", "export"} <= set(capsys.readouterr().out.split())


def test_an_unknown_command_is_named(failing):
    error = failing("train")
    assert "unknown command 'train'" in error
    assert "fine-tune a model" in error


def test_help_explains_the_selection(lift, capsys):
    with pytest.raises(SystemExit):
        lift("fit", "--help")
    output = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps between refreshes" in output
    assert "the budget of each matrix as a LoRA rank" in output
    assert "micro-batches to an optimizer step" in output


def test_main_py_says_how_to_install_when_only_half_of_the_package_is_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "lift_lightning.cli", None)
    with pytest.raises(SystemExit, match=r"pip install -e \."):
        exec(compile((ROOT / "main.py").read_text(), "main.py", "exec"), {"__name__": "__main__"})
