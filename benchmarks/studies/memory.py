"""Memory of a training step (Fig. 6). `LIFT_SMOLLM2_DIR=... python -m benchmarks.studies.memory`, five minutes.

What `python main.py analyze memory` finds for LLaMA-2-7B and LLaMA-3-8B from their configurations, whose numbers are
below; and for SmolLM2-135M, where it is checked: the same step with real values, in a fresh process, whose resident
memory above the loaded model is measured at its peak. Linux only.

The allocator of glibc keeps freed blocks below 32 MiB for itself, and then what is resident says more about it than
about the method. The processes run with MALLOC_MMAP_THRESHOLD_=65536, which gives them back.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import asdict

import torch
from rich.progress import track
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from benchmarks.resident_memory import peak_above
from benchmarks.studies.records import Store
from lift_lightning.adapters import adapter_targets, put_on
from lift_lightning.analysis.memory import STEPS, Method, Setting, footprint, set_up, training_step
from lift_lightning.models import load_model

STUDY = "memory"
COMMAND = "python -m benchmarks.studies.memory"
METHODS: tuple[Method, ...] = ("lift", "lift-mlp", "lora", "full")
LARGE = {
    # As the two models were published; 6.74 and 8.03 billion parameters.
    "LLaMA-2-7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    ),
    "LLaMA-3-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
LARGE_SETTING = {"rank": 128, "batch": 1, "length": 2048, "dtype": torch.bfloat16, "checkpointing": True}
SMALL_SETTINGS = {
    "plain": {"rank": 32, "batch": 4, "length": 128, "dtype": torch.float32, "checkpointing": False},
    "checkpointing": {"rank": 32, "batch": 4, "length": 128, "dtype": torch.float32, "checkpointing": True},
}


def predict(store: Store, model: str, config: PretrainedConfig, method: Method, settings: dict, note: str = "") -> None:
    """One footprint, unless it is there."""
    name = "-".join(part for part in (model, note, method) if part)
    if store.has(name):
        return
    found = asdict(footprint(config, Setting(method, **settings)))
    content = {"model": model, "method": method, "setting": _plain(settings), "predicted": found}
    if note:
        content |= {"note": note, "measured": measured_in_fresh_process(method, note)}
    store.save(name, COMMAND, None, content)


def measured_in_fresh_process(method: str, note: str) -> int:
    """Bytes above the loaded model at the peak of two steps."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.studies.memory", "--measure", method, note]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(method: Method, note: str) -> int:
    """The same in this process."""
    settings = SMALL_SETTINGS[note]
    model = load_model(os.environ["LIFT_SMOLLM2_DIR"], dtype=settings["dtype"]).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0)  # into memory of its own, from the mapped file
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # the libraries' threads and buffers
    if method == "lora":
        import peft.tuners.lora  # noqa: F401  # not a part of the step

    def run() -> None:
        targets = adapter_targets(model, "lora", "all-linear", ()) if method == "lora" else None
        adapter = None if targets is None else put_on(model, "lora", settings["rank"], targets=targets)
        optimizer = set_up(model, Setting(method, **settings), adapter, lambda _, count: torch.arange(count))
        token_ids = torch.randint(0, 40_000, (settings["batch"], settings["length"]))
        for _ in range(STEPS):
            training_step(model, optimizer, token_ids)

    return peak_above(run)


def _plain(settings: dict) -> dict:
    return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in settings.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "SETTING"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = os.environ.get("LIFT_SMOLLM2_DIR")
    if not folder:
        sys.exit("this study needs SmolLM2: set LIFT_SMOLLM2_DIR")
    if given.measure:
        print(measure(*given.measure))
        return
    store = Store(STUDY)
    for method in track(METHODS, "Taking steps"):
        for note, settings in SMALL_SETTINGS.items():
            predict(store, "SmolLM2-135M", AutoConfig.from_pretrained(folder), method, settings, note)
        for model, config in LARGE.items():
            predict(store, model, config, method, LARGE_SETTING)


if __name__ == "__main__":
    main()
