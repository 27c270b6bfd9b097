"""One fine-tuning run on the bundled model, measured before and after.

Level 4, as the command line is: it takes its settings from `configs/quickstart.yaml` through the same parser as
`python main.py fit`, so whatever can be overridden there can be here.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.table import Table

from lift_lightning.cli import lightning_cli, with_packaged_configs
from lift_lightning.errors import ConfigError
from lift_lightning.models import load_tokenizer
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.quickstart.probe import SkillProbe
from lift_lightning.quickstart.problems import Split
from lift_lightning.quickstart.skills import SKILLS, accuracies, answers
from lift_lightning.quickstart.text import Skill, questions

CONFIG = str(files("lift_lightning.configs") / "quickstart.yaml")

Method = Literal["lift", "random", "lora", "full"]
LABELS: dict[Method, str] = {"lift": "LIFT", "random": "random mask", "lora": "LoRA", "full": "full fine-tuning"}
# What each method changes in the configuration.
OVERRIDES: dict[Method, tuple[str, ...]] = {
    "lift": ("--model.method", "lift"),
    "random": ("--model.method", "lift", "--lift.criterion", "random", "--lift.interval", "null"),
    "lora": ("--model.method", "lora"),
    "full": ("--model.method", "full"),
}
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")


@dataclass(frozen=True)
class Result:
    """What one run did.

    Attributes:
        method: of fine-tuning.
        lr: peak learning rate.
        seed: of the order of the rows, of LoRA's initial values and of the random mask.
        steps: optimizer steps taken.
        before: accuracy of each skill before training.
        after: and after it.
        tested: held-out questions of each skill.
        parameters: of the model, an adapter's not counted.
        trained: entries that are trained at a time; LIFT trades some for others at each refresh.
        optimizer_bytes: of its state, indices included.
        full_adamw_bytes: what float32 AdamW on all parameters holds.
        seconds: of the fit, without the measurements on the way.
        log_dir: folder of its metrics and checkpoints.
    """

    method: Method
    lr: float
    seed: int
    steps: int
    before: dict[Skill, float]
    after: dict[Skill, float]
    tested: int
    parameters: int
    trained: int
    optimizer_bytes: int
    full_adamw_bytes: int
    seconds: float
    log_dir: str


class Example(NamedTuple):
    """A target question and what the model answered before and after."""

    question: str
    before: str
    after: str


def fine_tune(
    method: Method = "lift",
    overrides: Sequence[str] = (),
    *,
    tested: int = 300,
    split: Split = "heldout",
    quiet: bool = False,
) -> tuple[Result, Example]:
    """Train and measure.

    Args:
        method: what is trained.
        overrides: options as on the command line, such as `["--model.lr", "1e-3"]`.
        tested: questions of each skill.
        split: of these questions; there are none of `source` for validation.
        quiet: no bars and tables, and no measurements on the way.

    Raises:
        ConfigError: if there are fewer questions.
    """
    skills = SKILLS if split == "heldout" else ("bridge", "target")
    try:
        asked = [questions(skill, tested, split=split) for skill in skills][-1]
    except ValueError as error:
        raise ConfigError(f"{error}: ask fewer questions") from error
    settings = ["--config", CONFIG, *(QUIET if quiet else ()), *overrides, *OVERRIDES[method]]
    cli = lightning_cli(with_packaged_configs(settings), run=False)
    module, trainer, data = cli.model, cli.trainer, cli.datamodule
    if method == "lora":
        # LIFT's: both train r * (M + N) numbers of a matrix. match_budget would need the Trainer, which comes later.
        module.hparams.adapter_rank = cli.config.lift.rank
    probes = [callback for callback in trainer.callbacks if isinstance(callback, SkillProbe)]
    if quiet:
        for probe in probes:
            probe.interval = None
    data.setup("fit")  # here, so that tokenising is no part of the time
    tokenizer = load_tokenizer(module.model_name_or_path, module.hparams.revision)
    module.configure_model()
    model = module.hf_model
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    before, said = accuracies(model, tokenizer, tested, skills, split), answers(model, tokenizer, asked[:1])[0]
    started = time.perf_counter()
    with redirect_stdout(StringIO()) if quiet else nullcontext():
        trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - started - sum(probe.seconds for probe in probes)
    optimizer = trainer.optimizers[0]
    result = Result(
        method=method,
        lr=module.hparams.lr,
        seed=data.seed,
        steps=trainer.global_step,
        before=before,
        after=accuracies(model, tokenizer, tested, skills, split),
        tested=tested,
        parameters=parameters,
        trained=_trained(optimizer),
        optimizer_bytes=optimizer.state_bytes(),
        full_adamw_bytes=8 * parameters,
        seconds=seconds,
        log_dir=str(trainer.log_dir or trainer.default_root_dir),
    )
    return result, Example(asked[0].instruction, said, answers(model, tokenizer, asked[:1])[0])


def refuse(overrides: Sequence[str], fixed: Sequence[str], why: str) -> None:
    """Refuse options that a command sets itself, which would have no effect or make its labels wrong.

    Raises:
        ConfigError: naming the option.
    """
    for option in overrides:
        if option.split("=")[0] in fixed:
            raise ConfigError(f"{option.split('=')[0]} cannot be set here: {why}")


def _trained(optimizer: SparseAdamW) -> int:
    sparse = sum(optimizer.indices(p).numel() for _, p, _ in optimizer.sparse_parameters())
    return sparse + sum(p.numel() for g in optimizer.param_groups if not g["sparse"] for p in g["params"])


def result_table(results: Sequence[Result], title: str) -> Table:
    """One row for each run, or for the mean of the runs of a method with several seeds."""
    table = Table(title=title, caption=f"accuracy on {results[0].tested} held-out questions of each skill")
    table.add_column("")
    for heading in (*SKILLS, "entries trained", "optimizer state", "of full AdamW's", "time"):
        table.add_column(heading, justify="right")
    before = {skill: _mean([run.before[skill] for run in results]) for skill in SKILLS}
    table.add_row("before", *(f"{before[skill]:.1%}" for skill in SKILLS), "", "", "", "", end_section=True)
    for method in dict.fromkeys(run.method for run in results):
        runs = [run for run in results if run.method == method]
        state, full = runs[0].optimizer_bytes, runs[0].full_adamw_bytes
        table.add_row(
            LABELS[method],
            *(_share([run.after[skill] for run in runs]) for skill in SKILLS),
            f"{runs[0].trained:,} ({runs[0].trained / runs[0].parameters:.1%})",
            f"{state / 2**20:.2f} MiB",
            f"{state / full:.1%}",
            f"{_mean([run.seconds for run in runs]):.0f} s",
        )
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(values: Sequence[float]) -> str:
    """The mean, and with several values the range."""
    spread = f" ({min(values):.0%} to {max(values):.0%})" if len(values) > 1 else ""
    return f"{_mean(values):.1%}{spread}"


def save_results(results: Sequence[Result], path: Path) -> None:
    """Write them as JSON, with the machine and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    content = {**machine, "python": platform.python_version(), "runs": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
