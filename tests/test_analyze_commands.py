"""The analyze commands as a user types them."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_llama, tiny_llama

from lift_lightning import analyze_commands, cli
from lift_lightning.analyze_commands import COMMANDS, perturbed_selections

MATRICES, ENTRIES = 14, 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
PLACE = ["matrix", "layer", "depth"]
SMALL = ("--lra_rank", "4")
CHURN = ["to 1: trained", "to 2: base", "0 to 2: base"]
FIRST, SECOND, SMALLEST = "LIFT R=4", "LIFT R=8", "LIFT smallest R=4"
OVERLAPS = [
    f"{FIRST} / {SECOND}",
    *(f"{label} / magnitude" for label in (FIRST, SECOND)),
    *(f"{label} / {SMALLEST}" for label in (FIRST, SECOND, "magnitude")),
    *(f"{label} / random" for label in (FIRST, SECOND, "magnitude", SMALLEST)),
]
PAIR = ("--base", "base", "--trained", "trained")


@pytest.fixture
def lift(monkeypatch: pytest.MonkeyPatch, models: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command beside the models, as the console script does; what it printed."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lift-lightning", "analyze", *args])
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def failing(lift, capsys: pytest.CaptureFixture[str]):
    """Run a command that ends with one message and exit status 2; the message."""

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            lift(*args)
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert "wrote" not in printed.out
        assert "Traceback" not in printed.err
        return printed.err

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `trained`, which differs from it in one matrix by rank 2, and `other`, with another block."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "base")
    save_tiny_llama(folder / "other", num_hidden_layers=3)
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        change = torch.randn(32, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
        model.model.layers[1].mlp.down_proj.weight.add_(0.1 * change)
    model.save_pretrained(folder / "trained")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    question = "Please choose the correct answer to the question: Q{}?\n\nAnswer1: yes Answer2: no\n\nAnswer format: x"
    rows = [{"instruction": question.format(i), "answer": f"answer{1 + i % 2}"} for i in range(4)]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def models(saved: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with links to them."""
    for one in saved.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return tmp_path


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def column(file: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows_of(file)]


# ------------------------------------------------------------------ what they write


@pytest.mark.parametrize(
    ("command", "arguments", "header", "rows", "title"),
    [
        ("alignment", PAIR, [*PLACE, "directions", "score"], MATRICES, "Alignment of the top eigenspace"),
        (
            "rank",
            PAIR,
            [*PLACE, "full_rank", "rank", "effective_rank", "stable_rank"],
            MATRICES,
            "Rank of the update",
        ),
        ("histogram", PAIR, ["layer", "from", "to", "entries"], None, "Updates of single entries"),
        ("norms", PAIR, [*PLACE, "before", "after", "change", "update"], MATRICES, "Spectral norm"),
        (
            "overlap",
            ("--model", "base", "--lra_ranks", "[4, 8]"),
            [*PLACE, *OVERLAPS],
            MATRICES,
            "Overlap of selections",
        ),
        (
            "churn",
            ("--checkpoints", '["base", "trained", "base"]', *SMALL),
            [*PLACE, *CHURN],
            MATRICES,
            "Selection replaced, LIFT R=4",
        ),
        (
            "spectra",
            ("--model", "base", *SMALL),
            [
                *PLACE,
                *("largest", "effective_rank", "stable_rank", "energy_in_R", "held_by_mask", "held_by_magnitude"),
            ],
            MATRICES,
            "Spectra, LIFT R=4",
        ),
        (
            "positions",
            ("--model", "base", *SMALL, "--keep", "smallest"),
            [
                *(*PLACE, "selected", "entries", "in_busiest_rows", "in_busiest_columns"),
                *("random_in_busiest_rows", "random_in_busiest_columns", "global_share"),
            ],
            MATRICES,
            "Where the entries lie, LIFT smallest R=4",
        ),
        (
            "perturb",
            (
                *("--model", "base", "--text", "text.txt", "--choices", "test.json", "--lra_ranks", "[4, 8]"),
                *("--scales", "[0.01, 0.1]", "--seeds", "2", "--max_tokens", "64"),
            ),
            ["selection", "scale", "seed", "entries", "perplexity", "probability", "accuracy"],
            1 + 5 * 2 * 2,
            "Noise on the selected entries",
        ),
        (
            "memory",
            ("--model", "base", "--rank", "2", "--length", "16"),
            [
                *("method", "weights", "moments", "indices", "masters", "gradients"),
                *("activations", "temporary", "peak", "trained"),
            ],
            4,
            "base: 1 x 16 tokens, rank 2, bfloat16",
        ),
    ],
)
def test_each_command_writes_a_figure_and_a_csv_and_shows_a_table(
    lift, models: Path, command: str, arguments: tuple[str, ...], header: list[str], rows: int | None, title: str
):
    told = lift(command, *arguments, "--output", "made/out")
    out = models / "made/out"
    assert sorted(file.name for file in out.iterdir()) == [f"{command}.csv", f"{command}.png"]
    content = (out / f"{command}.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert len(content) > 5000
    found = rows_of(out / f"{command}.csv")
    assert list(found[0]) == header
    assert rows is None or len(found) == rows
    if "matrix" in header:
        names = [row["matrix"] for row in found]
        assert names[0] == "model.layers.0.self_attn.q_proj.weight"
        assert names[-1] == "model.layers.1.mlp.down_proj.weight"
        assert "down_proj" in told
    assert title in told
    assert told.endswith(f"wrote {out}\n")


def test_every_command_is_tested_here():
    (mark,) = (m for m in test_each_command_writes_a_figure_and_a_csv_and_shows_a_table.pytestmark)
    assert [values[0] for values in mark.args[1]] == list(COMMANDS)


def test_what_training_did_is_seen_in_the_one_matrix_that_it_changed(lift, models: Path):
    for command in ("alignment", "rank", "histogram", "norms"):
        lift(command, *PAIR, "--output", command)
    changed = [row["matrix"] == "model.layers.1.mlp.down_proj.weight" for row in rows_of(models / "rank/rank.csv")]
    assert changed.count(True) == 1
    assert column(models / "rank/rank.csv", "rank") == [2.0 if one else 0.0 for one in changed]
    scores = column(models / "alignment/alignment.csv", "score")
    assert [score < 0.999 for score in scores] == changed
    assert set(column(models / "alignment/alignment.csv", "directions")) == {4, 2}  # an eighth of 32, and of 16
    norms = rows_of(models / "norms/norms.csv")
    assert [float(row["update"]) > 0 for row in norms] == changed
    assert [float(row["change"]) != 0 for row in norms] == changed
    for row in norms:
        assert float(row["change"]) == pytest.approx(float(row["after"]) / float(row["before"]) - 1)
    counts = rows_of(models / "histogram/histogram.csv")
    assert sum(int(row["entries"]) for row in counts) == ENTRIES
    zero = {row["layer"]: int(row["entries"]) for row in counts if float(row["to"]) == 0}
    assert len(zero) == 7
    assert zero["up_proj"] == 2 * 48 * 32
    assert zero["down_proj"] < 48 * 32 + 10
    for row in counts:
        if float(row["to"]) > 0:
            assert row["layer"] == "down_proj"
            assert float(row["to"]) == pytest.approx(10**0.1 * float(row["from"]), rel=1e-4)


def test_the_histogram_counts_entries_by_their_size(lift, models: Path):
    """Twelve entries of one size and three of another, in a matrix of zeros."""
    for name, entries in (("empty", {}), ("filled", {0.05: 12, 2e-4: 3})):
        model = tiny_llama()
        with torch.no_grad():
            weight = model.model.layers[0].self_attn.k_proj.weight.zero_().view(-1)
            start = 0
            for size, count in entries.items():
                weight[start : start + count] = size if start else -size
                start += count
        model.save_pretrained(models / name)
    lift("histogram", "--base", "empty", "--trained", "filled", "--output", "out", "--target_modules", "k_proj")
    (zeros, *bins) = rows_of(models / "out/histogram.csv")
    assert int(zeros["entries"]) == 2 * 16 * 32 - 15
    assert [int(row["entries"]) for row in bins] == [3, 12]
    for row, size in zip(bins, (2e-4, 0.05), strict=True):
        assert float(row["from"]) <= size < float(row["to"])


def test_churn_between_checkpoints(lift, models: Path):
    lift("churn", "--checkpoints", '["base", "trained", "base"]', "--output", "out", *SMALL)
    for row in rows_of(models / "out/churn.csv"):
        there, back, since = (float(row[key]) for key in CHURN)
        assert since == 0
        assert there == back
        assert (there > 0.1) == (row["matrix"] == "model.layers.1.mlp.down_proj.weight")


def test_matrices_and_directions_can_be_named_and_results_replaced(lift, models: Path):
    arguments = ("alignment", *PAIR, "--output", "out", "--target_modules", '["q_proj", "down_proj"]')
    lift(*arguments)
    lift(*arguments, "--directions", "3", "--overwrite", "true", "--device", "cpu")
    found = rows_of(models / "out/alignment.csv")
    assert [row["layer"] for row in found] == ["q_proj", "down_proj"] * 2
    assert {row["directions"] for row in found} == {"3"}


def test_perturb_asks_what_it_is_told_to(lift, models: Path):
    few = ("--model", "base", "--scales", "[0.5]", "--seeds", "1", "--lra_ranks", "[4]", "--relative", "true")
    told = lift("perturb", *few, "--output", "one", "--directions", '["largest", "smallest", "hybrid"]')
    found = rows_of(models / "one/perturb.csv")
    assert list(found[0]) == ["selection", "scale", "seed", "entries", "probability"]
    lift_labels = ["LIFT R=4", "LIFT R=4, smallest directions", "LIFT R=4, hybrid directions", "LIFT smallest R=4"]
    assert [row["selection"] for row in found] == ["none", *lift_labels, "magnitude", "random"]
    assert len({row["probability"] for row in found}) == 7
    assert "P(answer | prompt)" in told
    assert "perplexity" not in told
    lift("perturb", *few, "--output", "two", "--prompt", "", "--choices", "test.json", "--questions", "1")
    found = rows_of(models / "two/perturb.csv")
    assert list(found[0]) == ["selection", "scale", "seed", "entries", "accuracy"]
    assert {float(row["accuracy"]) for row in found} <= {0.0, 1.0}  # of one question


def test_the_selections_that_perturb_compares():
    configs = perturbed_selections(0.1, [4, 8], ["largest", "random"])
    described = {label: (c.criterion, c.lra_rank, c.directions, c.keep) for label, c in configs.items()}
    assert described == {
        "LIFT R=4": ("lift", 4, "largest", "largest"),
        "LIFT R=8": ("lift", 8, "largest", "largest"),
        "LIFT R=4, random directions": ("lift", 4, "random", "largest"),
        "LIFT smallest R=4": ("lift", 4, "largest", "smallest"),
        "magnitude": ("magnitude", None, "largest", "largest"),
        "random": ("random", None, "largest", "largest"),
    }
    assert {config.density for config in configs.values()} == {0.1}


def test_memory_needs_a_configuration_and_no_weights(lift, models: Path):
    (models / "bare").mkdir()
    (models / "bare/config.json").write_text((models / "base/config.json").read_text())
    short = ("memory", "--model", "bare", "--rank", "2", "--length", "16", "--dtype", "float32")
    told = lift(
        *(*short, "--methods", '["full", "lift"]', "--gradient_checkpointing", "false", "--output", "out"),
    )
    full, sparse = rows_of(models / "out/memory.csv")
    assert (full["method"], sparse["method"]) == ("full fine-tuning", "LIFT")
    assert int(full["moments"]) == 8 * int(full["trained"])
    assert int(sparse["masters"]) == 0
    assert "bare: 1 x 16 tokens, rank 2, float32" in told
    lift(*short, "--methods", '["full"]', "--output", "less")
    assert int(rows_of(models / "less/memory.csv")[0]["activations"]) < int(full["activations"])


def test_models_of_the_package_are_known_by_their_names(lift, models: Path):
    model = ("--model", "lift-lightning/quickstart")
    lift("memory", *model, "--methods", '["lift"]', "--length", "8", "--output", "memory")
    lift("positions", *model, "--target_modules", "q_proj", "--output", "positions")
    assert len(rows_of(models / "memory/memory.csv")) == 1
    assert rows_of(models / "positions/positions.csv")[0]["layer"] == "q_proj"


def test_relative_noise_is_in_units_of_the_matrix(lift, models: Path):
    """The tiny model's weights have a standard deviation of 0.02 about, so that 0.5 of it is 0.01."""
    found = {}
    for name, options in (("half", ("0.5", "true")), ("as much", ("0.01", "false")), ("more", ("0.5", "false"))):
        scale, relative = options
        lift(
            *("perturb", "--model", "base", "--text", "text.txt", "--prompt", "", "--seeds", "1", "--output", name),
            *("--lra_ranks", "[4]", "--density", "1.0", "--scales", f"[{scale}]", "--relative", relative),
        )
        found[name] = column(models / name / "perturb.csv", "perplexity")
    assert found["half"][0] == found["more"][0]
    assert found["half"][1] == pytest.approx(found["as much"][1], abs=0.5)
    assert abs(found["more"][1] - found["half"][1]) > 2


@pytest.mark.parametrize("command", ["rank", "histogram"])
def test_rounding_of_narrow_files_is_told_where_it_is_part_of_the_update(lift, models: Path, command: str):
    tiny_llama().bfloat16().save_pretrained(models / "narrow")
    told = " ".join(lift(command, "--base", "base", "--trained", "narrow", "--output", "out").split())
    assert "stored in float32 and bfloat16: the rounding of the files is part of the update" in told
    assert "stored in" not in lift(command, *PAIR, "--output", "wide")


def test_two_checkpoints_that_are_the_same_have_no_update(lift, models: Path):
    for command in ("alignment", "rank", "histogram", "norms"):
        lift(command, "--base", "base", "--trained", "base", "--output", command)
    assert column(models / "alignment/alignment.csv", "score") == pytest.approx([1] * MATRICES)
    assert column(models / "rank/rank.csv", "rank") == [0] * MATRICES
    assert column(models / "norms/norms.csv", "update") == [0] * MATRICES
    assert sum(column(models / "histogram/histogram.csv", "entries")) == ENTRIES


def test_matrices_of_zeros_are_left_out_of_means_that_they_have_no_part_in(lift, models: Path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.zero_()
    model.save_pretrained(models / "zeros")
    told = lift("alignment", "--base", "zeros", "--trained", "zeros", "--output", "alignment")
    scores = {row["matrix"]: float(row["score"]) for row in rows_of(models / "alignment/alignment.csv")}
    assert [name for name, score in scores.items() if math.isnan(score)] == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    lines = {line.split("│")[1].strip(): line for line in told.splitlines() if line.startswith("│")}
    assert "1.0000" in lines["o_proj"]
    assert "-" in lines["up_proj"]
    assert "1.0000 (1.0000 to 1.0000)" in lines["all"]
    for command in ("spectra", "positions"):
        lift(command, "--model", "zeros", "--output", command, *SMALL)
    assert min(column(models / "spectra/spectra.csv", "held_by_mask")) == 0


# ------------------------------------------------------------------ mistakes

ARGUMENTS = {
    **dict.fromkeys(("alignment", "rank", "histogram", "norms"), PAIR),
    **dict.fromkeys(("overlap", "spectra", "positions", "perturb", "memory"), ("--model", "base")),
    "churn": ("--checkpoints", '["base", "trained"]'),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_not_empty_is_left_alone(failing, models: Path, command: str):
    (models / "full").mkdir()
    (models / "full/notes.txt").write_text("mine")
    message = failing(command, *ARGUMENTS[command], "--output", "full")
    assert message == (f"error: {models / 'full'} is not empty; choose another folder, or set overwrite to true\n")
    assert [file.name for file in (models / "full").iterdir()] == ["notes.txt"]
    assert "notes.txt is a file; name a folder" in failing(command, *ARGUMENTS[command], "--output", "full/notes.txt")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_not_there_is_named(failing, models: Path, command: str):
    arguments = [one.replace("base", "./nowhere") for one in ARGUMENTS[command]]
    arguments = [one.replace("--./nowhere", "--base") for one in arguments]
    message = failing(command, *arguments, "--output", "out")
    assert message.count("error: ") == 1
    assert "nowhere" in message
    assert not (models / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_without_matplotlib_the_extra_is_named(failing, models: Path, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(analyze_commands, "find_spec", lambda name: None if name == "matplotlib" else object())
    message = failing(command, *ARGUMENTS[command], "--output", "out")
    assert message == "error: figures need matplotlib: pip install 'lift-lightning[analysis]'\n"
    assert not (models / "out").exists()


@pytest.mark.parametrize("command", ["alignment", "rank", "histogram", "norms", "churn"])
def test_models_that_are_unlike_are_refused(failing, models: Path, command: str):
    arguments = [one.replace("trained", "other") if one != "--trained" else one for one in ARGUMENTS[command]]
    message = failing(command, *arguments, "--output", "out")
    assert "'other' and 'base' are not checkpoints of one model: model.layers.2.mlp.down_proj.weight" in message
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alignment", *PAIR, "--directions", "0"), "error: directions must be at least 1, got 0\n"),
        (("churn", "--checkpoints", '["base"]'), "error: churn is between checkpoints: name at least two, got 1\n"),
        (("churn", "--checkpoints", "[]"), "name at least two, got 0\n"),
        (
            ("churn", "--checkpoints", '["base", "trained"]', "--density", "1.5"),
            "density must be above 0 and at most 1",
        ),
        (
            ("overlap", "--model", "base", "--lra_ranks", "[]"),
            "error: lra_ranks must be one rank or more, each once, got []\n",
        ),
        (("overlap", "--model", "base", "--lra_ranks", "[4, 8, 4]"), "lra_ranks must be one rank or more, each once"),
        (("overlap", "--model", "base", "--lra_ranks", "[0]"), "lra_rank must be at least 1, got 0"),
        (("spectra", "--model", "base", "--density", "0"), "density must be above 0 and at most 1, got 0"),
        (
            ("positions", "--model", "base", "--target_modules", "qproj"),
            "target_modules: 'qproj' matched none of the 14",
        ),
        (
            ("perturb", "--model", "base", "--prompt", ""),
            "error: there is nothing to measure: set text, prompt or choices\n",
        ),
        (("perturb", "--model", "base", "--answer", ""), "error: answer is empty: say what should follow the prompt"),
        (("rank", *PAIR, "--device", "gpu0"), "error: device must be one of this machine, such as cpu or cuda:0, got"),
        (("overlap", "--model", "base", "--device", "cuda:99"), "such as cpu or cuda:0, got 'cuda:99': "),
        (("perturb", "--model", "base", "--device", "gpu0"), "such as cpu or cuda:0, got 'gpu0': "),
        (("perturb", "--model", "base", "--scales", "[0.1, 0]"), "error: scales above 0, seeds of at least 1"),
        (("perturb", "--model", "base", "--scales", "[]"), "error: scales above 0, seeds of at least 1"),
        (("perturb", "--model", "base", "--seeds", "0"), "error: scales above 0, seeds of at least 1"),
        (("perturb", "--model", "base", "--lra_ranks", "[]"), "at least one of lra_ranks and directions are needed"),
        (("perturb", "--model", "base", "--directions", "[]"), "at least one of lra_ranks and directions are needed"),
        (("perturb", "--model", "base", "--density", "2"), "density must be above 0 and at most 1, got 2"),
        (("perturb", "--model", "base", "--dtype", "float33"), "dtype must be auto, float32, bfloat16 or float16, got"),
        (
            ("perturb", "--model", "base", "--dtype", "int8"),
            "dtype must be auto, float32, bfloat16 or float16, got 'int8'",
        ),
        (("perturb", "--model", "base", "--text", "nowhere.txt"), "nowhere.txt"),
        (("perturb", "--model", "base", "--choices", "nowhere.json"), "nowhere.json"),
        (("perturb", "--model", "base", "--choices", "sums.json"), "sums.json, row 1 is no question with options"),
        (("memory", "--model", "base", "--dtype", "float33"), "error: dtype must be float32, bfloat16 or float16, got"),
        (("memory", "--model", "base", "--dtype", "nn"), "error: dtype must be float32, bfloat16 or float16, got 'nn'"),
        (
            ("memory", "--model", "base", "--methods", '["lift", "galore"]'),
            "error: methods must be some of lift, lift-mlp, lora, full, got ['lift', 'galore']\n",
        ),
        (("memory", "--model", "base", "--methods", "[]"), "error: methods must be some of lift, lift-mlp, lora, full"),
        (("memory", "--model", "base", "--rank", "0"), "rank, batch and length must be at least 1, got 0, 1 and 2048"),
        (("memory", "--model", "base", "--batch", "0"), "rank, batch and length must be at least 1, got 128, 0 and"),
        (
            ("memory", "--model", "base", "--length", "-1"),
            "rank, batch and length must be at least 1, got 128, 1 and -1",
        ),
        (("memory", "--model", "./made"), "error: Cannot load the model './made': the folder has no config.json"),
    ],
)
def test_a_mistake_ends_with_one_message(
    failing, models: Path, sums_file: Path, arguments: tuple[str, ...], message: str
):
    (models / "sums.json").symlink_to(sums_file)
    (models / "made").mkdir()
    told = failing(*arguments, "--output", "out")
    assert message in told
    assert told.count("error: ") == 1
    assert not (models / "out").exists()


@pytest.mark.parametrize("arguments", [(), ("sharpen",), ("rank", "--base", "base", "--output", "out")])
def test_an_unknown_command_or_a_missing_option_is_told(failing, arguments: tuple[str, ...]):
    assert "usage" in failing(*arguments).lower()
