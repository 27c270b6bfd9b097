"""`python -m lift_lightning.quickstart [OPTION VALUE ...]`: fine-tune the bundled model with LIFT and show what it did.

Options are those of `python main.py fit`, on top of `configs/quickstart.yaml`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from lift_lightning.cli import command
from lift_lightning.quickstart.run import Example, Result, fine_tune, refuse, result_table, save_results


def main(overrides: list[str] | None = None) -> None:
    """Run, print the table, write results and plot."""
    overrides = sys.argv[1:] if overrides is None else overrides
    sys.argv[1:] = []  # LightningCLI warns of arguments handed over while the process has some of its own
    with command():
        refuse(overrides, ("--model.method",), "this is LIFT; `python -m lift_lightning.quickstart.compare` has others")
        show(*fine_tune("lift", overrides))


def show(result: Result, example: Example) -> None:
    """Table and example into the terminal, files into the folder of the run."""
    console, folder = Console(), Path(result.log_dir)
    console.print(result_table([result], "LIFT on the bundled model"))
    for label, text in zip(("target question", "answer before", "answer after"), example, strict=True):
        console.print(f"[bold]{label:>16}[/bold]  {text}", highlight=False)
    save_results([result], folder / "results.json")
    written = "results.json"
    if not (folder / "metrics.csv").exists():
        console.print("no plot: it is drawn from the metrics.csv of Lightning's CSVLogger, and there is none")
    elif not find_spec("matplotlib"):
        console.print("no plot: matplotlib is missing, see the package's extra `analysis`")
    else:
        from lift_lightning.quickstart.plot import plot_run

        written += f" and {plot_run(folder, folder / 'run.png').name}"
    console.print(f"{written} are in {folder}" if " " in written else f"{written} is in {folder}", highlight=False)


if __name__ == "__main__":
    main()
