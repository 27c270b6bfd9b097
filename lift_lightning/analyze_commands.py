"""The `analyze` commands: what a model knows and what training did to it, as figure, CSV and table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track

from lift_lightning.analysis.matrices import open_checkpoint, open_together
from lift_lightning.analysis.report import check_output, write
from lift_lightning.datamodules.sources import read_rows, read_text
from lift_lightning.errors import ConfigError
from lift_lightning.inference import load_for_inference, pick_device
from lift_lightning.models import load_config
from lift_lightning.selection_config import DEFAULT_RANK, Directions, Keep, SelectionConfig

if TYPE_CHECKING:
    from lift_lightning.analysis.report import Findings

DENSITY = 0.05
TABLE_WIDTH = 110  # columns
Targets = str | list[str]


def alignment(
    base: str,
    trained: str,
    output: str,
    directions: int | None = None,
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """How far training turned the top eigenspace of each matrix (paper, App. H.1 and Fig. 12).

    Args:
        base: folder or hub id of the model that training began from.
        trained: folder or hub id of what came of it, such as `export` writes.
        output: the folder to write alignment.csv and alignment.png to.
        directions: right singular vectors that make the top eigenspace; 128, and at most an eighth of the shorter side,
            if null.
        target_modules: which matrices, as in training.
        device: where the decompositions run, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if the two are not checkpoints of one model.
        ModelUnavailableError: if a model cannot be reached.
    """
    if directions is not None and directions < 1:
        raise ConfigError(f"directions must be at least 1, got {directions}")
    return _of_pair(
        lambda pairs: pairs.alignment, base, trained, output, target_modules, device, overwrite, directions=directions
    )


def rank(
    base: str,
    trained: str,
    output: str,
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Rank of the update of each matrix with the paper's tolerance (App. G.3 and Fig. 13), effective and stable rank.

    Args:
        base: folder or hub id of the model that training began from.
        trained: folder or hub id of what came of it, such as `export` writes.
        output: the folder to write rank.csv and rank.png to.
        target_modules: which matrices, as in training.
        device: where the decompositions run, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if the two are not checkpoints of one model.
        ModelUnavailableError: if a model cannot be reached.
    """
    return _of_pair(lambda pairs: pairs.update_rank, base, trained, output, target_modules, device, overwrite)


def histogram(
    base: str,
    trained: str,
    output: str,
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """How large the updates of single entries are (paper, Fig. 5).

    Args:
        base: folder or hub id of the model that training began from.
        trained: folder or hub id of what came of it, such as `export` writes.
        output: the folder to write histogram.csv and histogram.png to.
        target_modules: which matrices, as in training.
        device: where it is computed, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if the two are not checkpoints of one model.
        ModelUnavailableError: if a model cannot be reached.
    """
    return _of_pair(lambda pairs: pairs.histogram, base, trained, output, target_modules, device, overwrite)


def norms(
    base: str,
    trained: str,
    output: str,
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Spectral norm of each matrix before and after training (paper, App. C).

    Args:
        base: folder or hub id of the model that training began from.
        trained: folder or hub id of what came of it, such as `export` writes.
        output: the folder to write norms.csv and norms.png to.
        target_modules: which matrices, as in training.
        device: where the decompositions run, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if the two are not checkpoints of one model.
        ModelUnavailableError: if a model cannot be reached.
    """
    return _of_pair(lambda pairs: pairs.norms, base, trained, output, target_modules, device, overwrite)


def overlap(
    model: str,
    output: str,
    lra_ranks: list[int] = [32, DEFAULT_RANK],  # noqa: B006  # jsonargparse shows it; it is not changed
    density: float = DENSITY,
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """What selections have in common: LIFT at some ranks, its smallest entries, largest magnitude, random (Fig. 17).

    Args:
        model: folder or hub id.
        output: the folder to write overlap.csv and overlap.png to.
        lra_ranks: ranks of LIFT's approximation.
        density: share of each matrix's entries that is selected.
        target_modules: which matrices, as in training.
        device: where the decompositions run, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if a value is out of its range.
        ModelUnavailableError: if the model cannot be reached.
    """
    if not lra_ranks or len(set(lra_ranks)) < len(lra_ranks):
        raise ConfigError(f"lra_ranks must be one rank or more, each once, got {lra_ranks}")
    configs = [SelectionConfig(density=density, lra_rank=r) for r in lra_ranks]
    configs.append(SelectionConfig(density=density, criterion="magnitude"))
    configs.append(SelectionConfig(density=density, lra_rank=lra_ranks[0], keep="smallest"))
    configs.append(SelectionConfig(density=density, criterion="random"))

    def look(selections: Any, place: torch.device) -> Findings:
        with open_checkpoint(model, target_modules=target_modules) as found:
            return selections.overlaps(found, configs, _matrices, place)

    return _of_selections(look, output, device, overwrite)


def churn(
    checkpoints: list[str],
    output: str,
    lra_rank: int = DEFAULT_RANK,
    density: float = DENSITY,
    keep: Keep = "largest",
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """What of LIFT's selection is replaced from each checkpoint to the next.

    Args:
        checkpoints: folders or hub ids in order, two at least.
        output: the folder to write churn.csv and churn.png to.
        lra_rank: of LIFT's approximation.
        density: share of each matrix's entries that is selected.
        keep: `largest`, or `smallest` for the released code's entries.
        target_modules: which matrices, as in training.
        device: where the decompositions run, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if they are not checkpoints of one model.
        ModelUnavailableError: if a model cannot be reached.
    """
    if len(checkpoints) < 2:
        raise ConfigError(f"churn is between checkpoints: name at least two, got {len(checkpoints)}")
    config = SelectionConfig(density=density, lra_rank=lra_rank, keep=keep)

    def look(selections: Any, place: torch.device) -> Findings:
        with open_together(checkpoints, target_modules) as found:
            return selections.churn(found, config, _matrices, place)

    return _of_selections(look, output, device, overwrite)


def spectra(
    model: str,
    output: str,
    lra_rank: int = DEFAULT_RANK,
    density: float = DENSITY,
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Singular values of each matrix, and the share of its energy that R directions and LIFT's entries hold.

    Args:
        model: folder or hub id.
        output: the folder to write spectra.csv and spectra.png to.
        lra_rank: R.
        density: share of each matrix's entries that is selected.
        target_modules: which matrices, as in training.
        device: where the decompositions run, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if a value is out of its range.
        ModelUnavailableError: if the model cannot be reached.
    """
    config = SelectionConfig(density=density, lra_rank=lra_rank)

    def look(selections: Any, place: torch.device) -> Findings:
        with open_checkpoint(model, target_modules=target_modules) as found:
            return selections.spectra(found, config, _matrices, place)

    return _of_selections(look, output, device, overwrite)


def positions(
    model: str,
    output: str,
    lra_rank: int = DEFAULT_RANK,
    density: float = DENSITY,
    keep: Keep = "largest",
    target_modules: Targets = "all-linear",
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Where LIFT's entries lie: in how few rows and columns, and at which depth if all matrices compete.

    Args:
        model: folder or hub id.
        output: the folder to write positions.csv and positions.png to.
        lra_rank: of LIFT's approximation.
        density: share of each matrix's entries that is selected.
        keep: `largest`, or `smallest` for the released code's entries; depths are always those of the largest.
        target_modules: which matrices, as in training.
        device: where the decompositions run, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if a value is out of its range.
        ModelUnavailableError: if the model cannot be reached.
    """
    config = SelectionConfig(density=density, lra_rank=lra_rank, keep=keep)

    def look(selections: Any, place: torch.device) -> Findings:
        with open_checkpoint(model, target_modules=target_modules) as found:
            return selections.positions(found, config, _matrices, place)

    return _of_selections(look, output, device, overwrite)


def perturb(
    model: str,
    output: str,
    text: str | None = None,
    prompt: str = "Madrid is located in the country of",
    answer: str = " Spain",
    choices: str | None = None,
    questions: int = 100,
    max_tokens: int = 4096,
    scales: list[float] = [0.01, 0.03, 0.1],  # noqa: B006
    relative: bool = False,
    seeds: int = 3,
    lra_ranks: list[int] = [DEFAULT_RANK],  # noqa: B006
    directions: list[Directions] = ["largest"],  # noqa: B006
    density: float = DENSITY,
    target_modules: Targets = "all-linear",
    device: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Noise on selected entries, and what it does to perplexity, to an answer's probability, to accuracy (Sec. 4).

    Selections: LIFT at each rank, its smallest entries at the first, the largest magnitude, random ones.

    Args:
        model: folder or hub id.
        output: the folder to write perturb.csv and perturb.png to.
        text: a .txt file whose perplexity is measured; not measured if null.
        prompt: for the probability of `answer`; not measured if empty.
        answer: that should follow, with its leading space.
        choices: a file of LLM-Adapters' commonsense sets, such as ARC-Easy/test.json, whose questions are answered by
            the likeliest option; not measured if null.
        questions: of that file, from its beginning.
        max_tokens: of the text.
        scales: standard deviations of the noise.
        relative: scales in units of each parameter's own standard deviation; absolute, as in the paper, if off.
        seeds: how many draws of the noise.
        lra_ranks: ranks of LIFT's approximation.
        directions: singular directions that the approximation at the first rank keeps (App. B.2).
        density: share of each matrix's entries that is selected.
        target_modules: which matrices, as in training.
        device: where it runs, such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        dtype: of the weights; in bfloat16 small noise is rounded away.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if nothing is to be measured, a value is out of its range, or the file has no such questions.
        DataError: if a file is not there.
        ModelUnavailableError: if the model cannot be reached.
    """
    folder = check_output(output, overwrite=overwrite)
    _require_matplotlib()
    from lift_lightning.analysis.noise import Probes, findings, perturbation
    from lift_lightning.analysis.probes import read_choice

    if prompt and not answer:
        raise ConfigError("answer is empty: say what should follow the prompt, or leave the prompt empty too")
    if text is None and choices is None and not prompt:
        raise ConfigError("there is nothing to measure: set text, prompt or choices")
    if questions < 1:
        raise ConfigError(f"questions must be at least 1, got {questions}")
    if not scales or min(scales) <= 0 or seeds < 1 or not lra_ranks or not directions:
        raise ConfigError(
            "scales above 0, seeds of at least 1, and at least one of lra_ranks and directions are needed"
        )
    asked = []
    if choices is not None:
        rows = read_rows(choices, "test", option="--choices")
        asked = [read_choice(row, rows.where(i)) for i, row in enumerate(rows.rows[:questions])]
    probes = Probes(
        text="" if text is None else read_text(Path(text).expanduser()),
        max_tokens=max_tokens,
        prompt=prompt,
        answer=answer,
        choices=asked,
    )
    if text is not None and len(probes.text.split()) < 2:
        raise ConfigError(f"{text!r} has hardly a word: there is no perplexity to measure")
    loaded, tokenizer = load_for_inference(model, device, dtype)
    found = perturbation(
        loaded,
        tokenizer,
        probes,
        perturbed_selections(density, lra_ranks, directions),
        scales,
        range(seeds),
        target_modules=target_modules,
        relative=relative,
        progress=lambda items: track(items, "Perturbing", console=Console(stderr=True)),
    )
    return _show(findings(found, relative), folder)


def perturbed_selections(
    density: float, lra_ranks: Iterable[int], directions: Iterable[Directions] = ("largest",)
) -> dict[str, SelectionConfig]:
    """The selections that `perturb` compares, by label."""
    from lift_lightning.analysis.selections import label_of

    ranks = list(lra_ranks)
    configs = [SelectionConfig(density=density, lra_rank=r) for r in ranks]
    others = [one for one in directions if one != "largest"]
    configs += [SelectionConfig(density=density, lra_rank=ranks[0], directions=one) for one in others]
    configs.append(SelectionConfig(density=density, lra_rank=ranks[0], keep="smallest"))
    configs.append(SelectionConfig(density=density, criterion="magnitude"))
    configs.append(SelectionConfig(density=density, criterion="random"))
    return {label_of(config): config for config in configs}


def memory(
    model: str,
    output: str,
    methods: list[str] = ["lift", "lift-mlp", "lora", "full"],  # noqa: B006
    rank: int = DEFAULT_RANK,
    batch: int = 1,
    length: int = 2048,
    dtype: str = "bfloat16",
    gradient_checkpointing: bool = True,
    overwrite: bool = False,
) -> Path:
    """Memory of a training step, part by part (paper, Fig. 6), from a model's configuration alone.

    A step is taken on tensors without values, and what is alive is counted; no weights are read.

    Args:
        model: folder or hub id with a config.json.
        output: the folder to write memory.csv and memory.png to.
        methods: any of `lift`, `lift-mlp`, `lora`, `full`.
        rank: budget rank of LIFT, rank of LoRA.
        batch: sequences of a micro-batch.
        length: tokens of each.
        dtype: of the weights; LIFT keeps float32 copies of the selected entries of narrower ones.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        overwrite: write into a folder that is not empty.

    Returns:
        The folder, as an absolute path.

    Raises:
        FileExistsError: if the folder may not be written.
        ConfigError: if a value is out of its range, or a method does not serve the model.
        ModelUnavailableError: if there is no such configuration.
    """
    folder = check_output(output, overwrite=overwrite)
    _require_matplotlib()
    from lift_lightning.analysis.memory import LABELS, Setting, findings, footprint

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    unknown = [name for name in methods if name not in LABELS]
    if unknown or not methods:
        raise ConfigError(f"methods must be some of {', '.join(LABELS)}, got {methods}")
    if min(rank, batch, length) < 1:
        raise ConfigError(f"rank, batch and length must be at least 1, got {rank}, {batch} and {length}")
    config, found = load_config(model), {}
    for name in track(methods, "Taking a step without values", console=Console(stderr=True)):
        setting = Setting(name, rank, batch, length, kind, gradient_checkpointing)  # type: ignore[arg-type]
        try:
            found[LABELS[name]] = footprint(config, setting)
        except ConfigError as error:
            raise ConfigError(f"{name} does not serve this model, leave it out of methods: {error}") from error
    title = f"{model}: {batch} x {length} tokens, rank {rank}, {dtype}"
    return _show(findings(found, title), folder)


COMMANDS: dict[str, Callable[..., Path]] = {
    "alignment": alignment,
    "rank": rank,
    "histogram": histogram,
    "norms": norms,
    "overlap": overlap,
    "churn": churn,
    "spectra": spectra,
    "positions": positions,
    "perturb": perturb,
    "memory": memory,
}


def _of_pair(
    analysis: Callable[[Any], Callable[..., Findings]],
    base: str,
    trained: str,
    output: str,
    target_modules: Targets,
    device: str | None,
    overwrite: bool,
    **options: Any,
) -> Path:
    folder = check_output(output, overwrite=overwrite)
    _require_matplotlib()
    from lift_lightning.analysis import pairs

    with open_together([base, trained], target_modules) as (before, after):
        return _show(analysis(pairs)(before, after, _matrices, pick_device(device, float64=True), **options), folder)


def _of_selections(
    look: Callable[[Any, torch.device], Findings], output: str, device: str | None, overwrite: bool
) -> Path:
    folder = check_output(output, overwrite=overwrite)
    _require_matplotlib()
    from lift_lightning.analysis import selections

    return _show(look(selections, pick_device(device, float64=True)), folder)


def _show(found: Findings, folder: Path) -> Path:
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)  # a row that goes over the edge can be read, a cut one cannot
    console.print(found.table)
    write(found, folder)
    return folder


def _matrices(places: Iterable[Any]) -> Iterable[Any]:
    return track(places, "Reading matrices", console=Console(stderr=True))


def _require_matplotlib() -> None:
    if not find_spec("matplotlib"):
        raise ConfigError("figures need matplotlib: pip install 'lift-lightning[analysis]'")
