"""`python -m lift_lightning.quickstart.methods`: every method of `configs/methods/` on the bundled model, checked.

Each trains for a few steps and is looked at: does the loss fall, what may change and what did, how large are state and
result, and does the result, loaded onto a fresh base, give the same logits? The learning rates are not tuned: this
shows that methods work, `lift_lightning.quickstart.compare` what they are worth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lift_lightning.adapters import load_adapter
from lift_lightning.cli import command, lightning_cli
from lift_lightning.delta import Delta, ModelSource, apply, extract, open_folder
from lift_lightning.errors import ConfigError
from lift_lightning.models import load_model
from lift_lightning.module import LiftLightningModule
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.quickstart.run import CONFIG

FOLDER = files("lift_lightning.configs.methods")
METHODS = sorted(Path(str(file)).stem for file in FOLDER.iterdir() if str(file).endswith(".yaml"))
RATES = {"full": 2e-4, "full-8bit": 2e-4, "spectral": 5e-3}
OTHER_RATE = 1e-3
TABLE_WIDTH = 112  # columns


@dataclass(frozen=True)
class Checked:
    """What one method did.

    Attributes:
        method: name of its file in `configs/methods/`.
        before: validation loss before training.
        after: and after it.
        parameters: of the model, an adapter's not counted.
        trained: entries that are trained at a time.
        changed: entries of the model that differ at the end.
        forbidden: those of them that the method must not change; 0, or it is broken.
        state_bytes: of the optimizer.
        result_bytes: of the delta, or the adapters, as files of safetensors.
        difference: of the logits of the result on a fresh base, the largest; 0.0 where they are the same bits.
    """

    method: str
    before: float
    after: float
    parameters: int
    trained: int
    changed: int
    forbidden: int
    state_bytes: int
    result_bytes: int
    difference: float

    @property
    def falls(self) -> bool:
        """Whether the loss does."""
        return self.after < self.before


class Selected(pl.Callback):
    """Marks every entry that was selected at any step."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *others: Any) -> None:
        """After the step, with the selection that it used."""
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, SparseAdamW)
        for name, parameter, _ in optimizer.sparse_parameters():
            mark = self.marks.setdefault(name, torch.zeros(parameter.numel(), dtype=torch.bool))
            mark[optimizer.indices(parameter).long()] = True


def check_method(method: str, steps: int, folder: Path, *, batch_size: int = 16) -> Checked:
    """Train the bundled model with one method and look at what came out."""
    selected = Selected()
    cli = lightning_cli(_options(method, steps, folder, batch_size), run=False)
    module, trainer = cli.model, cli.trainer
    trainer.callbacks.append(selected)
    before = trainer.validate(module, datamodule=cli.datamodule, verbose=False)[0]["val_loss"]
    # As the method found it: PiSSA has taken its part out of the weights by now.
    weights = {name: p.detach().clone() for name, p in module.hf_model.named_parameters()}
    trainer.fit(module, datamodule=cli.datamodule)
    after = trainer.validate(module, datamodule=cli.datamodule, verbose=False)[0]["val_loss"]
    optimizer = trainer.optimizers[0]
    dense = {id(p) for p in optimizer.dense_parameters()}
    changed = forbidden = 0
    for name, parameter in module.hf_model.named_parameters():
        moved = (parameter.detach() != weights[name]).flatten()
        if id(parameter) in dense:  # an adapter's are not the model's
            changed += int(moved.sum()) if module.adapter is None else 0
        else:
            changed += int(moved.sum())
            forbidden += int((moved & ~selected.marks.get(name, torch.zeros_like(moved))).sum())
    result = folder / "result"
    difference = _reloaded(module, result)
    sparse = sum(optimizer.indices(p).numel() for _, p, _ in optimizer.sparse_parameters())
    return Checked(
        method=method,
        before=before,
        after=after,
        parameters=sum(p.numel() for p in load_model(module.model_name_or_path).model.parameters()),
        trained=sparse + sum(p.numel() for p in optimizer.dense_parameters()),
        changed=changed,
        forbidden=forbidden,
        state_bytes=optimizer.state_bytes(),
        result_bytes=sum(file.stat().st_size for file in result.glob("*.safetensors")),
        difference=difference,
    )


def _options(method: str, steps: int, folder: Path, batch_size: int) -> list[str]:
    rate = RATES.get(method, OTHER_RATE)
    options: dict[str, Any] = {
        "model.lr": rate,
        "trainer.max_steps": steps,
        "trainer.callbacks": "[]",
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": folder,
        "data.batch_size": batch_size,
    }
    file = FOLDER / f"{method}.yaml"
    if "interval" not in (yaml.safe_load(file.read_text(encoding="utf-8")).get("lift") or {}):
        options["lift.interval"] = max(2, steps // 4)
    found = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["--config", CONFIG, "--config", str(file), *found]


def _reloaded(module: LiftLightningModule, result: Path) -> float:
    """Write what was trained, load it onto a fresh base, and compare the logits."""
    model = module.hf_model.eval()
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    fresh = load_model(module.model_name_or_path).model.eval()
    if module.adapter is None:
        with open_folder(module.model_name_or_path) as source:
            extract(source, ModelSource(model, source.names())).save_pretrained(result)
        apply(fresh, Delta.from_pretrained(result))
    else:
        module.adapter.save_pretrained(result)
        load_adapter(fresh, result)
    with torch.no_grad():
        return float((fresh.eval()(input_ids=ids).logits - expected).abs().max())


def methods_table(checked: Sequence[Checked], steps: int) -> Table:
    """One row for each method."""
    table = Table(
        title=f"Every method on the bundled model, {steps} steps",
        caption="validation loss before and after; entries trained at a time; entries of the model that changed, and "
        "those that the method must not change; MiB of the optimizer's state and of the result; largest difference of "
        "the logits after the result was loaded onto a fresh base",
    )
    table.add_column("method", no_wrap=True)
    for heading in (
        "before",
        "after",
        "trained",
        "changed",
        "forbidden",
        "state",
        "result",
        "reload",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in checked:
        table.add_row(
            one.method,
            f"{one.before:.4f}",
            f"{one.after:.4f}{'' if one.falls else ' (!)'}",
            f"{one.trained / one.parameters:.2%}",
            f"{one.changed:,}",
            f"{one.forbidden:,}{' (!)' if one.forbidden else ''}",
            f"{one.state_bytes / 2**20:.2f}",
            f"{one.result_bytes / 2**20:.2f}",
            "nothing" if one.difference == 0 else f"{one.difference:.1e}",
        )
    return table


def main(args: Sequence[str] | None = None) -> int:
    """Run the methods; the status is 1 if one of them is broken."""
    parser = argparse.ArgumentParser(prog="python -m lift_lightning.quickstart.methods", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME", help="default: all of them")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each, default 40")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of a step, default 16")
    parser.add_argument("--output", type=Path, help="JSON to write")
    given = parser.parse_args(args)
    for name in given.methods:
        if name not in METHODS:
            raise ConfigError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    checked: list[Checked] = []
    for name in track(given.methods, "Training with every method"):
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            checked.append(check_method(name, given.steps, Path(folder), batch_size=given.batch_size))
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)  # a row that goes over the edge can be read, a cut one cannot
    console.print(methods_table(checked, given.steps))
    if given.output is not None:
        given.output.write_text(json.dumps([asdict(one) for one in checked], indent=2) + "\n", encoding="utf-8")
    return int(any(not one.falls or one.forbidden or one.difference > 1e-3 for one in checked))


if __name__ == "__main__":
    with command():
        sys.exit(main())
