"""What selections have in common and where they lie, against sets and loops over entries, and on a tiny LLaMA."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import random_indices, random_matrix
from oracles import low_rank, stable_top_k
from tiny import save_tiny_llama, tiny_llama

from lift_lightning import SelectionConfig, select_indices
from lift_lightning.analysis.masks import GlobalRanking, overlap, replaced, share_in_busiest
from lift_lightning.analysis.matrices import open_checkpoint, open_together
from lift_lightning.analysis.selections import churn, label_of, overlaps, positions, spectra

CPU = torch.device("cpu")
BIN = 2**0.0101  # a bin of the ranking, and a little for rounding
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def tensor(indices) -> torch.Tensor:
    return torch.tensor(sorted(indices), dtype=torch.int64)


def matrices_of(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(str(folder)) as model:
        return {place.name: model.read(place) for place in model.places}


def common(one: torch.Tensor, other: torch.Tensor) -> float:
    return len(set(one.tolist()) & set(other.tolist())) / len(one)


# ------------------------------------------------------------------ overlap and churn


@given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30), min_size=1))
def test_overlap_is_the_share_of_the_first_set_that_is_in_the_second(one, other):
    assert overlap(tensor(one), tensor(other)) == pytest.approx(len(one & other) / len(one), rel=1e-12)


def test_overlap_of_narrow_indices():
    assert overlap(tensor([1, 2, 3, 4]).int(), tensor([4, 5])) == 0.25


@given(st.lists(st.sets(st.integers(0, 15), min_size=1), max_size=6))
def test_what_is_replaced_is_counted_from_one_selection_to_the_next(selections):
    expected = [len(b - a) / len(b) for a, b in zip(selections[:-1], selections[1:], strict=True)]
    assert replaced(tensor(one) for one in selections) == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------ rows and columns


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_share_in_the_busiest_rows_or_columns_is_counted_entry_by_entry(axis: int, share: float):
    shape, indices = (20, 33), random_indices(660, 150, seed=4)
    counts = [0] * shape[axis]
    for index in indices.tolist():
        counts[divmod(index, shape[1])[axis]] += 1
    lines = max(1, round(share * shape[axis]))
    expected = sum(sorted(counts, reverse=True)[:lines]) / 150
    assert share_in_busiest(indices, shape, axis, share) == pytest.approx(expected, rel=1e-6)


def test_a_tenth_of_the_lines_is_counted_and_holds_a_tenth_of_what_is_spread_evenly():
    everything = torch.arange(40 * 20)
    assert share_in_busiest(everything, (40, 20), 0) == pytest.approx(0.1)
    assert share_in_busiest(everything, (40, 20), 1) == pytest.approx(0.1)
    one_row = torch.arange(20, 40)
    assert share_in_busiest(one_row, (40, 20), 0) == 1
    assert share_in_busiest(one_row, (40, 20), 1) == pytest.approx(0.1)
    assert share_in_busiest(torch.arange(15), (3, 5), 0) == pytest.approx(1 / 3)  # one line at least


# ------------------------------------------------------------------ all matrices together


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize(
    "config",
    [
        SelectionConfig(density=0.1, lra_rank=3),
        SelectionConfig(density=0.1, criterion="magnitude"),
        SelectionConfig(density=0.1, lra_rank=16),  # the whole matrix, of the second one
    ],
    ids=["lift", "magnitude", "whole"],
)
def test_the_global_ranking_is_a_sort_of_all_scores_to_within_a_bin(config: SelectionConfig, density: float):
    weights = [random_matrix(20, 30), 3 * random_matrix(33, 16, seed=1), 0.01 * random_matrix(25, 25, seed=2)]
    ranking = GlobalRanking(config)
    for weight in weights:
        ranking.add(weight)
    rank = min(config.approximation_rank, 25)
    scores = [(low_rank(w, rank) if config.criterion == "lift" else w.double()).abs().flatten() for w in weights]
    ranked = torch.cat(scores).sort(descending=True).values
    threshold = float(ranked[math.ceil(density * len(ranked)) - 1])
    found = ranking.shares(density)
    for share, one in zip(found, scores, strict=True):
        # What lies in the threshold's bin is taken in part.
        assert int((one > threshold * BIN).sum()) <= share * len(one) <= int((one >= threshold / BIN).sum())
    assert found[1] > found[0] >= found[2]
    taken = sum(share * len(one) for share, one in zip(found, scores, strict=True))
    assert taken / len(ranked) == pytest.approx(density, rel=1e-9)


def test_equal_scores_on_the_threshold_are_taken_in_part_in_every_matrix():
    ranking = GlobalRanking(SelectionConfig(density=0.5, criterion="magnitude"))
    ranking.add(torch.tensor([[8.0, 1.0], [1.0, 1.0]]))
    ranking.add(torch.ones(2, 5))
    # 7 of 14 entries: the large one, and 6 of 13 equal ones.
    assert ranking.shares(0.5) == pytest.approx([(1 + 3 * 6 / 13) / 4, 6 / 13])


def test_all_of_the_entries_are_all_of_every_matrix_zeros_too():
    ranking = GlobalRanking(SelectionConfig(density=0.5, criterion="magnitude"))
    ranking.add(random_matrix(4, 5))
    ranking.add(torch.zeros(3, 3))
    ranking.add(torch.full((2, 2), 1e30))  # beyond the last bin
    assert ranking.shares(1.0) == [1.0, 1.0, 1.0]
    assert ranking.shares(4 / 33) == [0.0, 0.0, 1.0]


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"lra_rank": 8, "density": 0.1}, "LIFT R=8"),
        ({}, "LIFT R=128"),
        ({"lra_rank": 8, "keep": "smallest"}, "LIFT smallest R=8"),
        ({"lra_rank": 8, "directions": "hybrid"}, "LIFT R=8, hybrid directions"),
        ({"criterion": "magnitude"}, "magnitude"),
        ({"criterion": "random", "density": 0.1}, "random"),
    ],
)
def test_selections_have_labels(settings: dict, label: str):
    assert label_of(SelectionConfig(**settings)) == label


# ------------------------------------------------------------------ of a model


def test_overlaps_of_every_two_selections_in_every_matrix(tiny_model_dir: Path):
    """LIFT at two ranks, its smallest entries and magnitude, each found again from the full SVD and a stable sort."""
    chosen_by = {
        "LIFT R=4": lambda w, k: stable_top_k(low_rank(w, 4).abs(), k),
        "LIFT R=8": lambda w, k: stable_top_k(low_rank(w, 8).abs(), k),
        "LIFT smallest R=4": lambda w, k: stable_top_k(low_rank(w, 4).abs(), k, largest=False),
        "magnitude": lambda w, k: stable_top_k(w.abs(), k),
    }
    configs = [SelectionConfig(density=0.1, lra_rank=r, keep="largest") for r in (4, 8)]
    configs += [SelectionConfig(density=0.1, lra_rank=4, keep="smallest")]
    configs += [SelectionConfig(density=0.1, criterion="magnitude")]
    with open_checkpoint(str(tiny_model_dir)) as model:
        found = overlaps(model, configs, iter, CPU)
    labels, weights = list(chosen_by), matrices_of(tiny_model_dir)
    pairs = [(labels[j], labels[i]) for i in range(4) for j in range(i)]
    assert found.name == "overlap"
    assert [row["matrix"] for row in found.rows] == list(weights)
    for row in found.rows:
        weight = weights[row["matrix"]]
        assert (row["layer"], row["depth"]) == (row["matrix"].split(".")[-2], int(row["matrix"].split(".")[2]))
        chosen = {label: choose(weight, round(0.1 * weight.numel())) for label, choose in chosen_by.items()}
        expected = {f"{a} / {b}": common(chosen[a], chosen[b]) for a, b in pairs}
        assert {key: row[key] for key in row if " / " in key} == pytest.approx(expected, abs=2 / weight.numel())
    means = [sum(row["LIFT R=4 / LIFT R=8"] for row in found.rows) / 14]
    assert 0.3 < means[0] < 1
    assert all(row["LIFT R=4 / LIFT smallest R=4"] == 0 for row in found.rows)


def test_the_heat_map_and_the_table_of_overlaps_have_the_means(tiny_model_dir: Path):
    configs = [SelectionConfig(density=0.1, lra_rank=4), SelectionConfig(density=0.1, criterion="magnitude")]
    with open_checkpoint(str(tiny_model_dir)) as model:
        found = overlaps(model, configs, iter, CPU)
    mean = sum(row["LIFT R=4 / magnitude"] for row in found.rows) / 14
    heat, depth = found.figure.axes
    assert [text.get_text() for text in heat.texts] == ["1.00", f"{mean:.2f}", f"{mean:.2f}", "1.00"]
    assert len(depth.lines) == len(LAYERS)
    assert [column.header for column in found.table.columns] == ["layer", "matrices", "LIFT R=4 / magnitude"]
    assert list(found.table.columns[0].cells) == [*dict.fromkeys(row["layer"] for row in found.rows), "all"]
    assert list(found.table.columns[1].cells)[-1] == "14"
    assert list(found.table.columns[2].cells)[-1].startswith(f"{mean:.3f} (")


def test_churn_is_counted_from_checkpoint_to_checkpoint_and_since_the_first(tmp_path: Path):
    """Magnitude, whose selections are known by hand: three checkpoints that differ in one matrix."""
    model, name = tiny_llama(), "model.layers.1.mlp.up_proj.weight"
    folders = []
    for i in range(3):
        model.save_pretrained(tmp_path / f"step{i}")
        folders.append(str(tmp_path / f"step{i}"))
        with torch.no_grad():
            weight = model.get_parameter(name)
            smallest = weight.abs().flatten().argsort()[: 30 * (i + 1)]
            weight.view(-1)[smallest] = 10.0 + i
    config = SelectionConfig(density=0.1, criterion="magnitude")
    with open_together(folders) as found:
        result = churn(found, config, iter, CPU)
    keys = ["to 1: step1", "to 2: step2", "0 to 2: step2"]
    assert list(result.rows[0]) == ["matrix", "layer", "depth", *keys]
    weights = [matrices_of(Path(folder)) for folder in folders]
    assert [row["matrix"] for row in result.rows] == list(weights[0])
    for row in result.rows:
        if row["matrix"] != name:
            assert [row[key] for key in keys] == [0, 0, 0]
    (row,) = (row for row in result.rows if row["matrix"] == name)
    k = round(0.1 * 48 * 32)
    first, second, third = (stable_top_k(w[name].abs(), k) for w in weights)
    expected = [1 - common(second, first), 1 - common(third, second), 1 - common(third, first)]
    assert [row[key] for key in keys] == pytest.approx(expected, abs=1e-12)
    assert row["to 1: step1"] == pytest.approx(30 / k)
    assert row["0 to 2: step2"] == pytest.approx(90 / k)
    assert len(result.figure.axes) == 3


def test_spectra_of_every_matrix(tiny_model_dir: Path):
    config = SelectionConfig(density=0.1, lra_rank=4)
    with open_checkpoint(str(tiny_model_dir)) as model:
        found = spectra(model, config, iter, CPU)
    weights = matrices_of(tiny_model_dir)
    assert [row["matrix"] for row in found.rows] == list(weights)
    for row in found.rows:
        weight = weights[row["matrix"]].double()
        values = torch.linalg.svd(weight).S
        shares = values / values.sum()
        squares, k = weight.square().flatten(), round(0.1 * weight.numel())
        by_lift, by_size = stable_top_k(low_rank(weight, 4).abs(), k), stable_top_k(weight.abs(), k)
        expected = {
            "largest": float(values[0]),
            "effective_rank": float(torch.special.entr(shares).sum().exp()),
            "stable_rank": float(squares.sum() / values[0] ** 2),
            "energy_in_R": float(values[:4].square().sum() / squares.sum()),
            "held_by_mask": float(squares[by_lift].sum() / squares.sum()),
            "held_by_magnitude": float(squares[by_size].sum() / squares.sum()),
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3)
        assert row["held_by_magnitude"] > row["held_by_mask"] > 0.1
    curves, depth = found.figure.axes
    assert {line.get_label() for line in curves.lines} >= LAYERS
    assert len(depth.lines) == len(LAYERS)


def test_spectra_of_fewer_directions_than_the_rank_hold_all_of_the_energy(tiny_model_dir: Path):
    with open_checkpoint(str(tiny_model_dir), target_modules="k_proj") as model:
        found = spectra(model, SelectionConfig(density=0.1), iter, CPU)
    assert [row["energy_in_R"] for row in found.rows] == pytest.approx([1, 1])


@pytest.mark.parametrize("keep", ["largest", "smallest"])
def test_positions_of_the_selected_entries(tmp_path: Path, keep: str):
    """One matrix is ten times as large, so that nearly all are taken from it when all compete."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(10)
    model.save_pretrained(tmp_path)
    config = SelectionConfig(density=0.05, lra_rank=4, keep=keep)
    with open_checkpoint(str(tmp_path)) as opened:
        found = positions(opened, config, iter, CPU)
    weights, total = matrices_of(tmp_path), 0.0
    assert [row["matrix"] for row in found.rows] == list(weights)
    for row in found.rows:
        weight = weights[row["matrix"]]
        chosen = select_indices(weight, config).tolist()
        by_chance = select_indices(weight, SelectionConfig(density=0.05, criterion="random"))
        assert (row["selected"], row["entries"]) == (round(0.05 * weight.numel()), weight.numel())
        for axis, key in ((0, "in_busiest_rows"), (1, "in_busiest_columns")):
            lines = [divmod(index, weight.shape[1])[axis] for index in chosen]
            counts = sorted((lines.count(line) for line in set(lines)), reverse=True)
            assert row[key] == pytest.approx(sum(counts[: round(0.1 * weight.shape[axis])]) / len(chosen))
            # Few entries, drawn at random, are not spread evenly over the lines.
            assert row[f"random_{key}"] == share_in_busiest(by_chance, tuple(weight.shape), axis) > 0.1
        total += row["global_share"] * row["entries"]
    assert total == pytest.approx(sum(row["selected"] for row in found.rows))
    large = {row["matrix"]: row["global_share"] for row in found.rows}.pop("model.layers.1.self_attn.q_proj.weight")
    assert large > 0.6  # 768 entries are taken in all, and it has 1,024
    assert sum(row["global_share"] > 0.05 for row in found.rows) == 1
    rows, columns, _ = (axes.lines[-1].get_ydata()[0] for axes in found.figure.axes)
    for line, key in ((rows, "random_in_busiest_rows"), (columns, "random_in_busiest_columns")):
        assert line == pytest.approx(100 * sum(row[key] for row in found.rows) / 14)


def test_random_selections_overlap_as_chance_has_it(tmp_path: Path):
    folder = save_tiny_llama(tmp_path, hidden_size=64)
    configs = [SelectionConfig(density=0.2, criterion=name) for name in ("random", "magnitude")]
    with open_checkpoint(str(folder)) as model:
        found = overlaps(model, configs, iter, CPU)
    entries = [w.numel() for w in matrices_of(folder).values()]
    shared = sum(row["random / magnitude"] * n for row, n in zip(found.rows, entries, strict=True)) / sum(entries)
    assert shared == pytest.approx(0.2, abs=0.02)
