"""The command line: LightningCLI's subcommands, and the tools beside it, behind one dispatcher."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import jsonargparse
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.datamodules import SFTDataModule
from lift_lightning.datamodules.rows import DataError
from lift_lightning.export import CheckpointError, export
from lift_lightning.models import ModelUnavailableError
from lift_lightning.module import LiftLightningModule

SEED = 43  # of the released code

# What a user can mend, said in one line; everything else keeps its traceback.
USER_ERRORS = (
    CheckpointError,
    DataError,
    FileExistsError,
    FileNotFoundError,
    MisconfigurationException,
    ModelUnavailableError,
)

USAGE = """\
usage: {prog} COMMAND [--config FILE ...] [--section.option VALUE ...]

commands:
  fit        fine-tune a model
  validate   loss of a model or checkpoint on held-out rows
  test       generate answers to test sets and score them
  run        fit, then test the trained weights
  export     write a checkpoint as a Hugging Face folder

sections of a configuration: model (what is trained, and how), data, lift (the selection), trainer (Lightning's).

  {prog} fit --config configs/math10k.yaml --lift.rank 64      one value changed
  {prog} fit --config configs/math10k.yaml --print_config      the whole configuration, with defaults
  {prog} COMMAND --help                                        every option with its explanation
"""


class LiftCLI(LightningCLI):
    """LightningCLI with a `lift` section for the selection, whose overrides merge, and the tokenizer linked to data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callback has a section of its own: in a list, a later file would reset its other arguments."""
        parser.add_lightning_class_args(MaskRefreshCallback, "lift")
        parser.link_arguments("model.model_name_or_path", "data.init_args.tokenizer")

    def _parse_ckpt_path(self) -> None:
        # Lightning lets the hyperparameters of the checkpoint win over the command line and the config. Here what is
        # typed is what runs; what the checkpoint restores (weights, optimizer, schedule, progress) it restores anyway.
        return


def lightning_cli(args: ArgsType = None, run: bool = True) -> LiftCLI:
    """The configured LightningCLI, without the dispatcher.

    Args:
        args: what follows the program's name, `sys.argv` if not given; or a dict of a configuration.
        run: False only instantiates, and there is no subcommand.
    """
    return LiftCLI(
        LiftLightningModule,
        SFTDataModule,
        subclass_mode_data=True,
        seed_everything_default=SEED,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        args=args,
        run=run,
    )


def main(argv: list[str] | None = None) -> None:
    """Dispatch to a command; a user's mistake ends with one message and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(prog=_prog()), end="")
        sys.exit(0 if argv else 2)
    try:
        _dispatch(argv[0], _with_packaged_configs(argv[1:]))
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


def _dispatch(command: str, rest: list[str]) -> None:
    if command == "export":
        print(f"wrote {jsonargparse.auto_cli(export, args=rest, as_positional=False)}")
    elif command == "run":
        cli = _subcommand("fit", rest)
        cli.trainer.test(cli.model, datamodule=cli.datamodule)
    elif command in ("fit", "validate", "test"):
        _subcommand(command, rest)
    else:
        sys.exit(f"unknown command {command!r}\n\n{USAGE.format(prog=_prog())}")


def _subcommand(command: str, rest: list[str]) -> LiftCLI:
    # LightningCLI warns of arguments that are handed over while the process has some of its own.
    sys.argv[1:] = [command, *rest]
    return lightning_cli()


def _with_packaged_configs(args: list[str]) -> list[str]:
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
