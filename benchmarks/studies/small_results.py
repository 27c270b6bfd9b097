"""Tables and figures of studies 1 to 3."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.studies import perturbation, random_matrices, toy
from benchmarks.studies.records import RUNS, Run, Store
from benchmarks.studies.summary import geometric, interval, markdown, written
from lift_lightning.analysis.plots import COLOURS, LEGEND, canvas, lines, style

# ---------------------------------------------------------------- study 1


def toy_runs(folder: Path = RUNS) -> dict[str, list[Run]]:
    """The ten seeds of each method at its own rate."""
    store = Store(toy.STUDY, folder)
    return {
        method: [store.load(toy.name_of(method, lr, seed)) for seed in toy.SEEDS]
        for method, lr in toy.chosen_rates(store).items()
    }


def toy_table(folder: Path = RUNS) -> str:
    """Test loss at the best step, when that was, what is left of the pretrained function, the spectral norm there."""
    rows = []
    for method, runs in toy_runs(folder).items():
        norms = [_at_best(run, "spectral_norm") / run["curves"]["spectral_norm"][0] for run in runs]
        rows.append(
            [
                toy.METHODS[method][0],
                f"{runs[0]['lr']:g}",
                written(interval([run["test"] for run in runs]), ".2f"),
                written(interval([run["best_step"] for run in runs]), ".0f"),
                written(interval([run["pretraining_after"] for run in runs]), ".1f"),
                written(interval(norms), ".3f"),
            ]
        )
    runs = next(iter(toy_runs(folder).values()))
    before = [written(interval([run["before"][key] for run in runs]), form) for key, form in (("test", ".2f"),)]
    known = written(interval([run["before"]["pretraining"] for run in runs]), ".1f")
    rows.insert(0, ["before fine-tuning", "", before[0], "", known, "1"])
    heads = ["", "rate", "test loss, Y_ft", "best step", "test loss, Y_pre", "spectral norm, of the first"]
    return markdown(heads, rows)


def _at_best(run: Run, curve: str) -> float:
    """Of the best step, in a straight line between the two looks around it."""
    values = run["curves"][curve]
    look, after = divmod(run["best_step"], run["every"])
    if look >= len(values) - 1:
        return values[-1]
    part = after / run["every"]
    return (1 - part) * values[look] + part * values[look + 1]


def draw_toy(folder: Path = RUNS) -> Figure:
    """Fig. 14's four panels: geometric means of ten seeds with 95% intervals, as far as all of them go."""
    figure, every = canvas(2, 2)
    panels = {
        "training": "training loss",
        "validation": "validation loss",
        "gradient_norm": "norm of the trained entries' gradient",
        "spectral_norm": "spectral norm of W",
    }
    for i, (method, runs) in enumerate(toy_runs(folder).items()):
        for axes, (name, label) in zip(every, panels.items(), strict=True):
            step = runs[0]["every"]
            curves = [run["losses"][::step] if name == "training" else run["curves"][name] for run in runs]
            found = [geometric(values) for values in zip(*curves, strict=False)]  # the shortest ends it
            steps = [step * j for j in range(len(found))]
            low, middle, high = zip(*found, strict=True)
            axes.plot(steps, middle, label=toy.METHODS[method][0], color=_colour(i), linewidth=1.3)
            axes.fill_between(steps, low, high, color=_colour(i), alpha=0.2, linewidth=0)
            axes.set(xlabel="step", ylabel=label)
    for axes in every[:3]:
        axes.set_yscale("log")
    every[0].legend(fontsize=7, **LEGEND)
    return figure


def _colour(i: int) -> str:
    return (*COLOURS, "#999999")[i]


# ---------------------------------------------------------------- study 2


def random_table(folder: Path = RUNS) -> str:
    """Spectral norm after the noise of four standard deviations, of the norm before, for each size."""
    runs = list(Store(random_matrices.STUDY, folder))
    heads = ["", *(f"N = {size}" for size in random_matrices.SIZES)]
    rows = []
    for choice, (label, _, _) in random_matrices.CHOICES.items():
        cells = [interval(_ratios(runs, size, choice, "4")) for size in random_matrices.SIZES]
        rows.append([label, *(written(cell) for cell in cells)])
    return markdown(heads, rows)


def _ratios(runs: list[Run], size: int, choice: str, scale: str, key: str = "spectral_norm_ratio") -> list[float]:
    return [run["choices"][choice][scale][key] for run in runs if run["size"] == size]


def draw_random(folder: Path = RUNS) -> Figure:
    """Spectral norm against size for both scales, and what is left of the top eigenspace at the larger."""
    runs = list(Store(random_matrices.STUDY, folder))
    figure, every = canvas(3)
    panels = [("1", "spectral_norm_ratio"), ("4", "spectral_norm_ratio"), ("4", "alignment")]
    for axes, (scale, key) in zip(every, panels, strict=True):
        for i, (choice, (label, _, _)) in enumerate(random_matrices.CHOICES.items()):
            found = [interval(_ratios(runs, size, choice, scale, key)) for size in random_matrices.SIZES]
            axes.errorbar(
                random_matrices.SIZES,
                [one.mean for one in found],
                [one.half for one in found],
                label=label,
                capsize=2,
                markersize=4,
                linewidth=1.2,
                **style(i),
            )
        axes.set_xscale("log", base=2)
        name = "spectral norm, of that before" if key == "spectral_norm_ratio" else "alignment, top N/16 directions"
        axes.set(
            xlabel="size N of the matrix",
            ylabel=name,
            title=f"noise of {scale} standard deviation{'s'[: scale != '1']}",
        )
    every[2].legend(fontsize=7, **LEGEND)
    return figure


# ---------------------------------------------------------------- study 3


def noise_rows(folder: Path = RUNS) -> list[Run]:
    """All measurements, the one without noise first."""
    store = Store(perturbation.STUDY, folder)
    rows = [row for run in store for row in run["rows"]]
    return sorted(rows, key=lambda row: row["selection"] != "none")


def noise_table(folder: Path = RUNS) -> str:
    """Perplexity, probability and accuracy for each selection and scale."""
    rows, found = noise_rows(folder), []
    base = rows[0]
    found.append(
        ["no noise", "", f"{base['perplexity']:.1f}", f"{base['probability']:.3f}", f"{100 * base['accuracy']:.0f}%"]
    )
    for label in dict.fromkeys(row["selection"] for row in rows[1:]):
        for scale in perturbation.SCALES:
            these = [row for row in rows if (row["selection"], row["scale"]) == (label, scale)]
            found.append(
                [
                    label,
                    f"{scale:g}",
                    written(interval([row["perplexity"] for row in these]), ".1f"),
                    written(interval([row["probability"] for row in these])),
                    written(interval([row["accuracy"] for row in these]), ".0f", percent=True),
                ]
            )
    return markdown(["noise on", "size", "perplexity", 'P(" Spain")', "ARC-Easy"], found)


def draw_noise(folder: Path = RUNS) -> Figure:
    """The same, means with the range of the seeds."""
    rows = noise_rows(folder)
    base = rows[0]
    figure, every = canvas(3)
    labels = {"perplexity": "perplexity", "probability": 'P(" Spain" | prompt)', "accuracy": "accuracy on 50 questions"}
    selections = list(dict.fromkeys(row["selection"] for row in rows[1:]))
    for axes, (name, text) in zip(every, labels.items(), strict=True):
        series = {
            label: {
                0.0: [base[name]],
                **{
                    scale: [row[name] for row in rows if (row["selection"], row["scale"]) == (label, scale)]
                    for scale in perturbation.SCALES
                },
            }
            for label in selections
        }
        lines(axes, series)
        axes.set(xlabel="standard deviation of the noise", ylabel=text)
    every[0].set_yscale("log")
    every[2].axhline(0.25, color="black", linestyle=":", linewidth=1)
    every[0].legend(fontsize=7, **LEGEND)
    return figure
