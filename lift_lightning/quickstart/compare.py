"""`python -m lift_lightning.quickstart.compare`: LIFT, LoRA, a random mask and full fine-tuning on the same data.

All train for as many steps on the same rows. LIFT, the random mask and LoRA have the same number of trained entries.
The learning rates are those that `--tune` chose, once for each method, on validation questions and a seed of its own:
of the rates that come within five points of the best target accuracy, the smallest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from lift_lightning.cli import command
from lift_lightning.errors import ConfigError
from lift_lightning.quickstart.problems import Split
from lift_lightning.quickstart.run import LABELS, Method, Result, fine_tune, refuse, result_table, save_results

METHODS: tuple[Method, ...] = tuple(LABELS)
# Options that would make the methods unequal or their labels wrong.
FIXED = (
    "--config",
    "--seed_everything",
    "--model.lr",
    "--model.method",
    "--model.target_modules",
    "--lift.criterion",
    "--lift.density",
    "--lift.seed",
)
TUNING_SEED = 0
TOLERANCE = 0.05  # of accuracy: the smallest rate that learns the task forgets least
GRIDS: dict[Method, tuple[float, ...]] = {
    "lift": (5e-4, 1e-3, 2e-3, 4e-3),
    "random": (1e-3, 2e-3, 4e-3, 8e-3),
    "lora": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "full": (1e-4, 2e-4, 5e-4, 1e-3),
}
# Chosen by --tune; its record is docs/results/quickstart_tuning.json.
RATES: dict[Method, float] = {"lift": 2e-3, "random": 4e-3, "lora": 1e-3, "full": 2e-4}


def choose(reached: Mapping[float, float]) -> float:
    """The smallest rate whose accuracy is within `TOLERANCE` of the best."""
    best = max(reached.values())
    return min(rate for rate, accuracy in reached.items() if accuracy >= best - TOLERANCE)


def tune(methods: tuple[Method, ...], overrides: list[str], output: Path, tested: int = 300) -> dict[Method, float]:
    """Try every rate of each method's grid and write what came out."""
    chosen: dict[Method, float] = {}
    trials: list[dict[str, object]] = []
    for method in methods:
        found = {rate: _run(method, rate, TUNING_SEED, overrides, tested, validation=True) for rate in GRIDS[method]}
        chosen[method] = choose({rate: result.after["target"] for rate, result in found.items()})
        trials += [{"method": method, "lr": rate, "validation": run.after["target"]} for rate, run in found.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"seed": TUNING_SEED, "tolerance": TOLERANCE, "chosen": chosen, "trials": trials}
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return chosen


def compare(
    methods: tuple[Method, ...], seeds: list[int], overrides: list[str], output: Path, tested: int = 300
) -> list[Result]:
    """Every method with every seed, each at its own rate. What is done is on disk after each run."""
    results: list[Result] = []
    for method in methods:
        for seed in seeds:
            results.append(_run(method, RATES[method], seed, overrides, tested))
            save_results(results, output)
    return results


def _run(method: Method, rate: float, seed: int, overrides: list[str], tested: int, validation: bool = False) -> Result:
    settings = [*overrides, "--model.lr", str(rate), "--seed_everything", str(seed), "--lift.seed", str(seed)]
    split: Split = "validation" if validation else "heldout"
    result, _ = fine_tune(method, settings, tested=tested, split=split, quiet=True)
    shares = ", ".join(f"{skill} {share:.1%}" for skill, share in result.after.items())
    print(f"{LABELS[method]:>16}  lr {result.lr:g}  seed {result.seed}: {shares}, {result.seconds:.0f} s", flush=True)
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line; options that it does not know go to the runs, as to `python main.py fit`."""
    parser = argparse.ArgumentParser(prog="python -m lift_lightning.quickstart.compare", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder of results, table and plot")
    parser.add_argument("--tested", type=int, default=300, help="questions of each skill")
    parser.add_argument("--tune", action="store_true", help="choose the rates instead; writes quickstart_tuning.json")
    args, overrides = parser.parse_known_args(argv)
    sys.argv[1:] = []  # LightningCLI warns of arguments handed over while the process has some of its own
    with command():
        refuse(overrides, FIXED, "the comparison sets it for each method and seed")
        _require({"matplotlib": "analysis", **({"peft": "baselines"} if "lora" in args.methods else {})})
        if args.tune:
            print("chosen:", tune(tuple(args.methods), overrides, args.output / "quickstart_tuning.json", args.tested))
        else:
            _compare_and_show(tuple(args.methods), args.seeds, overrides, args.output, args.tested)


def _require(packages: Mapping[str, str]) -> None:
    """Find out before the first run what the last one would lack."""
    for package, extra in packages.items():
        if not find_spec(package):
            raise ConfigError(f"{package} is missing: install the package's extra, lift-lightning[{extra}]")


def _compare_and_show(
    methods: tuple[Method, ...], seeds: list[int], overrides: list[str], output: Path, tested: int
) -> None:
    from lift_lightning.quickstart.plot import plot_comparison

    results = compare(methods, seeds, overrides, output / "quickstart_comparison.json", tested)
    points = [(LABELS[run.method], run.after["source"], run.after["target"]) for run in results]
    before = results[0].before["source"], results[0].before["target"]
    plot_comparison(points, before, output / "quickstart_comparison.png")
    Console(width=140).print(result_table(results, f"mean of {len(seeds)} seeds (lowest to highest)"))
    print(f"results and plot are in {output}")


if __name__ == "__main__":
    main()
