"""Pretrain the bundled model from nothing: `python -m lift_lightning.quickstart.pretrain --output FOLDER`.

What is read at a step depends on the seed and the step alone, so that a run that was cut off goes on where its last
checkpoint was, with the same batches. The shipped `model/` was made by this recipe in two sittings: the second mixture
was added to the script when the first had been read.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from lift_lightning.collate import pad_batch
from lift_lightning.models import check_export_folder, export_model, load_model
from lift_lightning.prompts import encode_prompt
from lift_lightning.quickstart.skills import SKILLS, accuracies
from lift_lightning.quickstart.text import Document, Stage, documents
from lift_lightning.quickstart.tokenizer import train_tokenizer

BATCHES_A_BLOCK = 16  # batches that are drawn together and cut by length
WATCHED = 100  # held-out questions of each skill, while training
TESTED = 300  # at the end


@dataclass(frozen=True)
class Recipe:
    """Settings of the pretraining. `first_stage` is the share of the steps that reads the first mixture."""

    steps: int = 6000
    first_stage: float = 0.375
    batch_size: int = 64
    lr: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float = 1.0
    seed: int = 1
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A LLaMA with random weights that depend on the recipe's seed alone."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def block_of_batches(block: int, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """Token ids of `BATCHES_A_BLOCK` batches, drawn together and cut by length, so that little is padding."""
    stage: Stage = 1 if block * BATCHES_A_BLOCK < recipe.first_stage * recipe.steps else 2
    count = recipe.batch_size * BATCHES_A_BLOCK
    drawn = documents(seed=recipe.seed * 1_000_000 + block, count=count, stage=stage)
    encoded = sorted((encode(document, tokenizer) for document in drawn), key=len)
    batches = [encoded[i : i + recipe.batch_size] for i in range(0, len(encoded), recipe.batch_size)]
    random.Random(block).shuffle(batches)
    return batches


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a document and its end, prompt and text apart as fine-tuning and generation have them."""
    head = encode_prompt(tokenizer, document.prompt) if document.prompt else []
    tail = tokenizer(document.text, add_special_tokens=False).input_ids
    return [*head, *tail, int(tokenizer.eos_token_id)]


class Pretraining:
    """A run that can be cut off and taken up again.

    Args:
        recipe: its settings.
        folder: for checkpoint and log; a checkpoint of the same recipe in it is taken up.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = train_tokenizer()
        self.model = new_model(recipe, self.tokenizer)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=recipe.lr,
            betas=recipe.betas,
            fused=True,
        )
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, recipe.warmup_steps, recipe.steps)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        self._block: tuple[int, list[list[list[int]]]] = (-1, [])
        if self._checkpoint.exists():
            self._load()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "pretraining.pt"

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"error: {self._checkpoint} is of another recipe: give another --folder, or remove it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def save(self) -> None:
        """Write the checkpoint; one that is there stays usable until the new one is complete."""
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        state |= {name: getattr(self, name) for name in ("step", "seconds", "log")}
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state | {"recipe": asdict(self.recipe)}, partial)
        os.replace(partial, self._checkpoint)

    def run(self, log_every: int = 50, save_every: int = 250, evaluate_every: int = 500) -> None:
        """Train to the end, with a bar and a log."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("pretraining", total=self.recipe.steps, completed=self.step)
            losses: list[Tensor] = []
            while self.step < self.recipe.steps:
                start = time.perf_counter()
                losses.append(self.train_step())
                self.step += 1
                self.seconds += time.perf_counter() - start
                progress.update(task, completed=self.step)
                last = self.step == self.recipe.steps
                evaluated = self.step % evaluate_every == 0 or last
                if self.step % log_every == 0 or evaluated:
                    self.log.append({"step": self.step, "loss": float(torch.stack(losses).mean())})
                    losses = []
                    progress.update(task, description=f"loss {self.log[-1]['loss']:.3f}")
                if evaluated:
                    found = accuracies(self.model, self.tokenizer, WATCHED)
                    self.log[-1].update({str(skill): share for skill, share in found.items()})
                    progress.console.print(self.log[-1])
                if self.step % save_every == 0 or last:
                    self.save()

    def train_step(self) -> Tensor:
        """One step of AdamW; returns the mean loss over the tokens of the batch."""
        self.model.train()
        batch = self.batch()
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def batch(self) -> dict[str, Tensor]:
        """The batch of this step, with the loss on every token but padding."""
        block, place = divmod(self.step, BATCHES_A_BLOCK)
        if self._block[0] != block:
            self._block = (block, block_of_batches(block, self.recipe, self.tokenizer))
        examples = [{"input_ids": ids, "labels": ids} for ids in self._block[1][place]]
        return pad_batch(examples, pad_token_id=int(self.tokenizer.pad_token_id))

    def finish(self, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Write the model in bfloat16, as it is shipped, with its log and what it can do. The run is over then."""
        export_model(self.model.bfloat16(), self.tokenizer, output, overwrite=overwrite)
        with (output / "pretraining.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["step", "loss", *SKILLS])
            writer.writeheader()
            writer.writerows(
                {name: round(value, 4) if name != "step" else value for name, value in row.items()} for row in self.log
            )
        shipped = load_model(output, dtype=torch.float32).model  # as fine-tuning loads it
        found = {
            "recipe": asdict(self.recipe),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "minutes_of_training": round(self.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            "held_out_questions": TESTED,
            "accuracy": accuracies(shipped, self.tokenizer, TESTED),
        }
        (output / "pretraining.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return found


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m lift_lightning.quickstart.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--folder", type=Path, default=Path("runs/pretrain"), help="of checkpoint and log")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    args = parser.parse_args(argv)
    try:
        check_export_folder(args.output, overwrite=args.overwrite)  # now, and not after an hour
    except FileExistsError as error:
        parser.error(str(error))
    run = Pretraining(Recipe(steps=args.steps, seed=args.seed), args.folder)
    if run.step:
        print(f"going on at step {run.step} of {run.recipe.steps}")
    run.run()
    print(json.dumps(run.finish(args.output, overwrite=args.overwrite), indent=2))


if __name__ == "__main__":
    main()
