"""Noise on the selected entries of a model, and what it does to what the model knows (paper, Sec. 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.analysis.plots import LEGEND, canvas, lines
from lift_lightning.analysis.probes import Choice, choice_accuracy, probability
from lift_lightning.analysis.report import Findings
from lift_lightning.evaluation.perplexity import perplexity
from lift_lightning.param_groups import Target, match_targets, matrix_views
from lift_lightning.selection import select_matrices
from lift_lightning.selection_config import SelectionConfig

Masks = dict[str, Tensor]
LABELS = {"perplexity": "perplexity", "probability": "P(answer | prompt)", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Probes:
    """What the model is asked; what is empty is not.

    Attributes:
        text: whose perplexity is measured.
        max_tokens: of the text.
        window: tokens that the model sees at a time.
        prompt: for the probability of `answer`; the paper's are "Madrid is located in the country of" and " Spain".
        answer: with its leading space.
        choices: questions for the accuracy.
    """

    text: str = ""
    max_tokens: int = 4096
    window: int = 1024
    prompt: str = ""
    answer: str = ""
    choices: Sequence[Choice] = ()


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Probes) -> dict[str, float]:
    """Perplexity, probability and accuracy, as far as they are asked for."""
    found = {}
    if probes.text:
        measured = perplexity(
            model, tokenizer, probes.text, window=probes.window, stride=probes.window // 2, max_tokens=probes.max_tokens
        )
        found["perplexity"] = measured.token
    if probes.prompt:
        found["probability"] = probability(model, tokenizer, probes.prompt, probes.answer)
    if probes.choices:
        found["accuracy"] = choice_accuracy(model, tokenizer, probes.choices)
    return found


def masks_of(targets: Sequence[Target], config: SelectionConfig) -> Masks:
    """(K,) flat indices into each parameter, as training selects them; a random choice is another one in each."""
    found = {}
    for i, target in enumerate(targets):
        seeded = config if config.criterion != "random" else replace(config, seed=10_000 * config.seed + i)
        parameter = target.parameter.detach()
        found[target.name] = select_matrices(parameter, matrix_views(parameter, target.halves), seeded).indices
    return found


@contextmanager
def noisy(weights: Mapping[str, Tensor], masks: Masks, scale: float, seed: int, *, relative: bool) -> Iterator[None]:
    """Normal noise on the entries of the masks while the context lasts; then every bit is as it was.

    The noise of a seed is the same numbers for every choice of entries, in order.

    Args:
        weights: by name, changed in place.
        masks: flat indices into each.
        scale: standard deviation of the noise.
        seed: of the noise, drawn on the CPU.
        relative: whether the scale is in units of each parameter's own standard deviation, or absolute as in the paper.
    """
    generator = torch.Generator().manual_seed(seed)
    before: dict[str, Tensor] = {}
    try:
        for name, weight in weights.items():
            flat, chosen = weight.view(-1), masks[name]
            before[name] = flat[chosen]
            noise = torch.randn(chosen.numel(), generator=generator).to(weight.device)
            size = scale * float(weight.float().std()) if relative else scale
            flat[chosen] = (before[name].float() + size * noise).to(weight.dtype)
        yield
    finally:
        for name, values in before.items():
            weights[name].view(-1)[masks[name]] = values


def perturbation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Probes,
    configs: Mapping[str, SelectionConfig],
    scales: Sequence[float],
    seeds: Sequence[int],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    relative: bool = False,
    before: bool = True,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """The probes without noise, then for each selection, scale and seed.

    Args:
        model: as `load_for_inference` gives it; as it was at the end.
        tokenizer: its own.
        probes: what it is asked.
        configs: selections by label. A random one is drawn anew for each seed.
        scales: of the noise.
        seeds: of the noise.
        target_modules: of the selections.
        relative: as for `noisy`.
        before: whether to ask without noise, too.
        progress: wraps the measurements.

    Returns:
        Rows of selection, scale, seed and what the probes found.
    """
    model.eval()
    targets = match_targets(model, target_modules)
    weights = {target.name: target.parameter.detach() for target in targets}
    rows: list[dict[str, Any]] = []
    if before:
        rows.append({"selection": "none", "scale": 0.0, "seed": 0, "entries": 0, **ask(model, tokenizer, probes)})
    cases = [(label, seed) for label in configs for seed in seeds]
    masks: Masks = {}
    previous: tuple[str, int] | None = None
    for label, seed in progress(cases):
        config = configs[label]
        of = (label, seed if config.criterion == "random" else 0)
        if of != previous:
            masks, previous = masks_of(targets, replace(config, seed=of[1])), of
        entries = sum(chosen.numel() for chosen in masks.values())
        for scale in scales:
            with noisy(weights, masks, scale, seed, relative=relative):
                found = ask(model, tokenizer, probes)
            rows.append({"selection": label, "scale": scale, "seed": seed, "entries": entries, **found})
    return rows


def findings(rows: Sequence[Mapping[str, Any]], relative: bool) -> Findings:
    """Table and figure: what the probes found against the scale of the noise, for each selection."""
    asked = [name for name in LABELS if name in rows[0]]
    base, noisy_rows = rows[0], rows[1:]
    selections = list(dict.fromkeys(str(row["selection"]) for row in noisy_rows))
    scales = list(dict.fromkeys(float(row["scale"]) for row in noisy_rows))
    unit = "noise / std of the matrix" if relative else "standard deviation of the noise"
    table = Table(title="Noise on the selected entries", caption="mean (lowest to highest) over seeds")
    table.add_column("selection")
    table.add_column("scale", justify="right")
    for name in asked:
        table.add_column(LABELS[name], justify="right")
    table.add_row("none", "0", *(f"{base[name]:.4g}" for name in asked), end_section=True)
    figure, every = canvas(len(asked))
    for axes, name in zip(every, asked, strict=True):
        series = {
            label: {0.0: [float(base[name])], **{scale: _values(noisy_rows, label, scale, name) for scale in scales}}
            for label in selections
        }
        lines(axes, series)
        axes.set(xlabel=unit, ylabel=LABELS[name], xlim=(0, None))
        if max(scales) > 10 * min(scales):
            axes.set_xscale("symlog", linthresh=min(scales))
        if name == "perplexity":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    every[0].legend(**LEGEND, fontsize=8)
    for label in selections:
        for scale in scales:
            cells = [_cell(_values(noisy_rows, label, scale, name)) for name in asked]
            table.add_row(label, f"{scale:g}", *cells, end_section=scale == scales[-1])
    return Findings("perturb", rows, table, figure)


def _values(rows: Sequence[Mapping[str, Any]], label: str, scale: float, name: str) -> list[float]:
    return [float(row[name]) for row in rows if row["selection"] == label and row["scale"] == scale]


def _cell(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.4g}"
    return f"{mean} ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else mean
