"""The command line: LightningCLI's subcommands, and the tools beside it, behind one dispatcher."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lift_lightning.analyze_commands import COMMANDS as ANALYZE_COMMANDS
from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.consolidate import consolidate
from lift_lightning.datamodules import FineTuningDataModule, SFTDataModule
from lift_lightning.datamodules.finetuning import DEFAULT_SEED
from lift_lightning.datamodules.rows import DataError
from lift_lightning.delta_commands import COMMANDS as DELTA_COMMANDS
from lift_lightning.errors import CheckpointError, ConfigError, DeltaError
from lift_lightning.evaluation.tasks import is_known
from lift_lightning.export import export
from lift_lightning.humaneval import humaneval
from lift_lightning.models import ModelUnavailableError
from lift_lightning.module import LiftLightningModule
from lift_lightning.perplexity import perplexity
from lift_lightning.predict import predict
from lift_lightning.show_data import show_data
from lift_lightning.strategies import ReadsAllCheckpoints
from lift_lightning.sweep import SweepError, sweep

# What a user can mend, said in one line; everything else keeps its traceback.
USER_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    DeltaError,
    FileExistsError,
    FileNotFoundError,
    MisconfigurationException,
    ModelUnavailableError,
    SweepError,
)

# Functions; or several of them, by the name of a command of their own.
TOOLS: dict[str, Any] = {
    "export": export,
    "consolidate": consolidate,
    "predict": predict,
    "humaneval": humaneval,
    "perplexity": perplexity,
    "sweep": sweep,
    "delta": DELTA_COMMANDS,
    "analyze": ANALYZE_COMMANDS,
}

USAGE = """\
usage: {prog} COMMAND [--config FILE ...] [--section.option VALUE ...]

commands:
  fit        fine-tune a model
  validate   loss and metrics of a model or checkpoint on held-out rows
  test       generate answers to test sets and score them
  run        fit, then test the trained weights
  sweep      run once for each value of an option, and compare the tests
  data       what a model would see: sizes, lengths, an example with its loss mask; options as for fit
  predict    write what a model answers to a file of instructions
  humaneval  let a model complete functions, and run their checks
  perplexity  how well a model expects a text
  export     write a checkpoint as a Hugging Face folder
  consolidate  make one file of a checkpoint folder that several devices wrote
  delta      what differs from the base as a small adapter: delta {{extract,apply,merge,inspect,diff,push}}
  analyze    figure, CSV and table of what a model knows and what training did: analyze {{alignment,rank,histogram,
             norms,overlap,churn,spectra,positions,perturb,memory}}

sections of a configuration: model (what is trained, and how), data, lift (the selection), trainer (Lightning's).

  {prog} fit --config configs/math10k.yaml --lift.rank 64      one value changed
  {prog} fit --config configs/math10k.yaml --print_config      the whole configuration, with defaults
  {prog} COMMAND --help                                        every option with its explanation
"""


class LiftCLI(LightningCLI):
    """LightningCLI with a `lift` section for the selection, whose overrides merge, and data that follow the model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback has a section of its own: in a list, a later file would reset its other arguments.

        Data of no class are rows of instructions.
        """
        parser.add_lightning_class_args(MaskRefreshCallback, "lift")
        parser.set_defaults({"data": {"class_path": f"{SFTDataModule.__module__}.{SFTDataModule.__name__}"}})

    def after_instantiate_classes(self) -> None:
        """Let the data take tokenizer and seed from the rest, where they are left open.

        A link of jsonargparse would overwrite what the user typed, without a word; and what is written into the
        configuration would be saved with it, and win over another model or seed when that file is used again.
        """
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        given, model, seed, data = config.data.init_args, config.model, config.seed_everything, self.datamodule
        if given.get("tokenizer") is None:
            data.tokenizer = model.model_name_or_path
            if given.get("tokenizer_revision") is None:
                data.tokenizer_revision = model.revision
        if given.get("seed") is None and not isinstance(seed, bool):
            data.seed = seed
        path = config.get("ckpt_path")
        if path and Path(path).is_dir() and not isinstance(self.trainer.strategy, ReadsAllCheckpoints):
            raise CheckpointError(
                f"{path!r} is a folder that several devices wrote in parts, which only the strategies fsdp1 and fsdp2 "
                f"read: make one file of it first, {_prog()} consolidate --ckpt_path {path} --output {path}.whole"
            )

    def before_test(self) -> None:
        """Find out before the work whether it can be done; under `run`, before the training."""
        model, data = self.model, self.datamodule
        if model.hparams.task != "causal_lm":
            raise ConfigError(
                f"test generates answers, which model.task={model.hparams.task} does not do: use validate"
            )
        if not data.test_tasks:
            raise ConfigError(
                "there is nothing to test on: set --data.test_suite, or --data.test_path to a file with questions and "
                "answers"
            )
        for task in data.test_tasks:
            if model.hparams.unknown_tasks is None and not is_known(task):
                raise ConfigError(
                    f"{task!r} is none of the known tasks: say with --model.unknown_tasks number (or exact) how it is "
                    "scored, or name the known task that it is: --data.test_path '{addsub: FILE}'"
                )

    def test(self, **arguments: Any) -> None:
        """Without Lightning's table, which has a column for each test set and every metric in all of them."""
        self.trainer.test(**{**arguments, "verbose": False})

    def _parse_ckpt_path(self) -> None:
        # Lightning lets the hyperparameters of the checkpoint win over the command line and the config. Here what is
        # typed is what runs.
        return


class RunCLI(LiftCLI):
    """`fit` that goes on to test the weights that it trained."""

    def before_fit(self) -> None:
        """What would stop the test stops the run before the training."""
        self.before_test()

    def after_fit(self) -> None:
        """Test with the same Trainer."""
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def lightning_cli(args: ArgsType = None, run: bool = True, cli: type[LiftCLI] = LiftCLI) -> LiftCLI:
    """The configured LightningCLI, without the dispatcher.

    Args:
        args: what follows the program's name, `sys.argv` if not given; or a dict of a configuration.
        run: False only instantiates, and there is no subcommand.
        cli: whose hooks around the subcommand are wanted.
    """
    return cli(
        LiftLightningModule,
        FineTuningDataModule,
        subclass_mode_data=True,
        seed_everything_default=DEFAULT_SEED,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        args=args,
        run=run,
    )


@contextmanager
def command() -> Iterator[None]:
    """Around what a user starts: a mistake of the user's ends with one message and exit status 2.

    It also keeps out of the terminal what concerns neither the user nor this package.
    """
    # bitsandbytes, when anything imports it: that a kernel for 4-bit inference on CPUs is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Lightning 2.6 and peft 0.21 use names that torch and transformers have deprecated since.
    for message in (".isinstance.treespec, LeafSpec", ".is_gradient_checkpointing. is deprecated"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    try:
        yield
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    """Dispatch to a command; a user's mistake ends with one message and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(prog=_prog()), end="")
        sys.exit(0 if argv else 2)
    with command():
        _dispatch(argv[0], with_packaged_configs(argv[1:]))


def _dispatch(command: str, rest: list[str]) -> None:
    if command in TOOLS:
        if command == "sweep" and "--" in rest:
            place = rest.index("--")
            rest = [*rest[:place], f"--run={json.dumps(rest[place + 1 :])}"]
        written = jsonargparse.auto_cli(TOOLS[command], args=rest, as_positional=False, prog=f"{_prog()} {command}")
        if written is not None:
            print(f"wrote {written}")
    elif command == "data":
        sys.argv[1:] = rest
        show_data(lightning_cli(run=False).datamodule)
    elif command in ("fit", "validate", "test", "run"):
        # LightningCLI warns of arguments that are handed over while the process has some of its own.
        sys.argv[1:] = ["fit" if command == "run" else command, *rest]
        lightning_cli(cli=RunCLI if command == "run" else LiftCLI)
    else:
        print(f"error: unknown command {command!r}\n\n{USAGE.format(prog=_prog())}", file=sys.stderr, end="")
        sys.exit(2)


def with_packaged_configs(args: list[str]) -> list[str]:
    """Look a config file that is not there up in the package, so that `configs/math10k.yaml` works outside a clone."""
    found = list(args)
    for i, argument in enumerate(args):
        if argument == "--config" and i + 1 < len(args):
            found[i + 1] = _packaged(args[i + 1])
        elif argument.startswith("--config="):
            found[i] = "--config=" + _packaged(argument.removeprefix("--config="))
    return found


def _packaged(path: str) -> str:
    if Path(path).exists() or not path.endswith((".yaml", ".yml")):
        return path
    shipped = files("lift_lightning.configs").joinpath(*Path(path).parts[Path(path).parts[0] == "configs" :])
    if not shipped.is_file():
        return path  # jsonargparse says that it does not exist
    print(f"{path} is not here; taking the one that comes with the package: {shipped}", file=sys.stderr)
    return str(shipped)


def _prog() -> str:
    return "python main.py" if Path(sys.argv[0]).name == "main.py" else "lift-lightning"
