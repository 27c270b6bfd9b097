"""Has the bundled model learned structure? Two figures, in two to three minutes on two cores.

    python benchmarks/quickstart_structure.py

1. Energy (squared Frobenius norm) that the best rank-R approximation keeps, of each trained matrix and of the same
   matrix with its entries shuffled.
2. Loss on held-out questions after Gaussian noise on 5% of the entries of every matrix: those that LIFT picks, those of
   largest magnitude, random ones. The noise has the same size everywhere, in units of each matrix's standard deviation.
   This is the experiment of the paper's Sec. 4 and Fig. 2.

Writes docs/results/quickstart_structure.json and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning import SelectionConfig, build_param_groups, select_indices
from lift_lightning.collate import pad_batch
from lift_lightning.losses import causal_lm_loss
from lift_lightning.models import load_model, load_tokenizer
from lift_lightning.prompts import encode_example, render_prompt
from lift_lightning.quickstart.text import Skill, questions

DENSITY, LRA_RANK = 0.05, 16
SCALES = (0.25, 0.5, 1.0, 2.0)
SEEDS = (0, 1, 2)
SKILLS: tuple[Skill, ...] = ("source", "bridge")
CRITERIA = {"lift": "LIFT's entries", "magnitude": "largest magnitude", "random": "random entries"}


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """What LIFT trains by default."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p for group in build_param_groups(model) for _, p in group["params"]}


def energy_shares(weight: Tensor) -> Tensor:
    """Share of the squared norm in the first R directions, for R from 1 to the shorter side."""
    energy = torch.linalg.svdvals(weight.double()).square()
    return energy.cumsum(0) / energy.sum()


def spectra(model: PreTrainedModel) -> dict[str, dict[str, list[float]]]:
    """Energy shares of every matrix, as it is and shuffled."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, list[float]]] = {}
    for name, weight in track(matrices(model).items(), "Spectra"):
        order = torch.randperm(weight.numel(), generator=generator)
        shuffled = weight.detach().flatten()[order].view_as(weight)
        pairs = {"trained": weight.detach(), "shuffled": shuffled}
        found[name] = {label: energy_shares(matrix).tolist() for label, matrix in pairs.items()}
    return found


@torch.no_grad()
def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: Skill) -> float:
    """Mean loss over the tokens of the right answers to 300 held-out questions."""
    asked = questions(skill, 300, split="heldout")
    encoded = [encode_example(tokenizer, render_prompt(q.instruction, q.input), q.output, 128) for q in asked]
    rows = [{"input_ids": example.input_ids, "labels": example.labels} for example in encoded]
    batch = pad_batch(rows, pad_token_id=int(tokenizer.pad_token_id))
    labels = batch.pop("labels")
    total, weight = causal_lm_loss(model(**batch, use_cache=False).logits, labels)
    return float(total / weight)


@torch.no_grad()
def perturb(model: PreTrainedModel, criterion: str, scale: float, seed: int) -> dict[str, Tensor]:
    """Add the noise in place; returns the weights as they were."""
    generator = torch.Generator().manual_seed(seed)
    before = {}
    for i, (name, weight) in enumerate(matrices(model).items()):
        before[name] = weight.detach().clone()
        config = SelectionConfig(criterion=criterion, density=DENSITY, lra_rank=LRA_RANK, seed=1000 * seed + i)
        chosen = select_indices(weight, config)
        noise = torch.randn(chosen.numel(), generator=generator) * scale * weight.std()
        weight.view(-1)[chosen] += noise
    return before


def noise_study(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, object]]:
    """Loss of each skill for every criterion, scale and seed; the unperturbed loss has scale 0."""
    model.eval()
    runs: list[dict[str, object]] = []
    cases = [(criterion, scale, seed) for criterion in CRITERIA for scale in (0.0, *SCALES) for seed in SEEDS]
    for criterion, scale, seed in track(cases, "Noise"):
        before = perturb(model, criterion, scale, seed)
        losses = {skill: answer_loss(model, tokenizer, skill) for skill in SKILLS}
        runs.append({"criterion": criterion, "scale": scale, "seed": seed, "loss": losses})
        with torch.no_grad():
            for name, weight in matrices(model).items():
                weight.copy_(before[name])
    return runs


def draw(spectra: dict[str, dict[str, list[float]]], runs: list[dict], output: Path) -> None:
    """Both figures side by side."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    energy, *losses = figure.subplots(1, 1 + len(SKILLS))
    for label, style in (("trained", {"color": "C0"}), ("shuffled", {"color": "C7"})):
        for i, shares in enumerate(entry[label] for entry in spectra.values()):
            energy.plot(range(1, len(shares) + 1), shares, alpha=0.35, label=label if i == 0 else None, **style)
    energy.axvline(LRA_RANK, color="black", linestyle=":", linewidth=1)
    energy.set(title="Energy in the first R directions", xlabel="R", ylabel="share of the squared norm", ylim=(0, 1.02))
    energy.set_xscale("log")
    energy.legend(frameon=False)
    for axes, skill in zip(losses, SKILLS, strict=True):
        for criterion, label in CRITERIA.items():
            points = {
                scale: [run["loss"][skill] for run in runs if (run["criterion"], run["scale"]) == (criterion, scale)]
                for scale in (0.0, *SCALES)
            }
            middle = [sum(values) / len(values) for values in points.values()]
            axes.plot(list(points), middle, marker="o", markersize=4, label=label)
            axes.fill_between(
                list(points), [min(v) for v in points.values()], [max(v) for v in points.values()], alpha=0.2
            )
        axes.set(title=f"Noise on 5% of the entries: {skill}", xlabel="noise / std of the matrix", ylabel="loss")
        axes.legend(frameon=False)
    for axes in (energy, *losses):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=120)


def summary(spectra: dict[str, dict[str, list[float]]], runs: list[dict]) -> dict[str, object]:
    """The figures in numbers."""
    at_rank = {
        label: sum(entry[label][LRA_RANK - 1] for entry in spectra.values()) / len(spectra)
        for label in ("trained", "shuffled")
    }
    means: dict[str, dict[str, dict[str, float]]] = {}
    for skill in SKILLS:
        for criterion in CRITERIA:
            for scale in (0.0, *SCALES):
                values = [r["loss"][skill] for r in runs if (r["criterion"], r["scale"]) == (criterion, scale)]
                means.setdefault(skill, {}).setdefault(criterion, {})[str(scale)] = round(sum(values) / len(values), 4)
    return {"lra_rank": LRA_RANK, "density": DENSITY, "mean_energy_share": at_rank, "mean_loss": means}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lift-lightning/quickstart")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/results")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=torch.float32).model, load_tokenizer(args.model)
    spectra_found, runs = spectra(model), noise_study(model, tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(spectra_found, runs, args.output / "quickstart_structure.png")
    content = {"summary": summary(spectra_found, runs), "noise": runs}
    (args.output / "quickstart_structure.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content["summary"], indent=2))


if __name__ == "__main__":
    main()
