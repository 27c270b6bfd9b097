"""Noise on selected entries and the questions that are asked of the model under it, against readable twins."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from deltas import assert_same_bits
from networks import random_indices
from test_param_groups import MODELS
from tiny import byte_tokenizer, tiny_llama

from lift_lightning import SelectionConfig, select_indices
from lift_lightning.analysis.noise import Probes, ask, findings, masks_of, noisy, perturbation
from lift_lightning.analysis.probes import Choice, choice_accuracy, log_likelihoods, probability, read_choice
from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.perplexity import perplexity
from lift_lightning.param_groups import match_targets

MAGNITUDE = SelectionConfig(density=0.1, criterion="magnitude")
RANDOM = SelectionConfig(density=0.1, criterion="random")
TEXTS = [
    ("Madrid is located in the country of", " Spain"),
    ("Madrid is located in the country of", " France, I think"),
    ("a", "b"),
    ("", "nothing before it but the BOS"),
    ("Question: what?\nAnswer:", " 42"),
    ("a longer prompt " * 6, "and a continuation that is longer than the others are " * 2),
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return tiny_llama().eval()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def targets_of(model, pattern="all-linear"):
    """The targets, and their memory by name."""
    targets = match_targets(model, pattern)
    return targets, {target.name: target.parameter.detach() for target in targets}


def some_weights(dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two large matrices of different spread, and entries of each."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        "one": (0.5 * torch.randn(200, 300, generator=generator)).to(dtype),
        "two": (4 + 2 * torch.randn(150, 200, generator=generator)).to(dtype),
    }
    masks = {"one": random_indices(60_000, 30_000, seed=1), "two": random_indices(30_000, 20_000, seed=2)}
    return weights, masks


def copies(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_every_bit_is_as_it_was_afterwards(dtype: torch.dtype, relative: bool, fails: bool):
    weights, masks = some_weights(dtype)
    weights["one"].view(-1)[masks["one"][:2]] = torch.tensor([-0.0, 1e-7], dtype=dtype)
    before = copies(weights)

    def disturb() -> None:
        with noisy(weights, masks, 0.3, 0, relative=relative):
            assert not torch.equal(weights["one"], before["one"])
            assert not torch.equal(weights["two"], before["two"])
            if fails:
                raise KeyError("in the body")

    if fails:
        with pytest.raises(KeyError, match="in the body"):
            disturb()
    else:
        disturb()
    assert_same_bits(weights, before)


def test_every_bit_is_as_it_was_if_the_noise_cannot_be_made_of_all():
    weights, masks = some_weights()
    before = copies(weights)
    del masks["two"]
    with pytest.raises(KeyError, match="two"), noisy(weights, masks, 0.3, 0, relative=False):
        pass
    assert_same_bits(weights, before)


def test_only_the_chosen_entries_have_noise():
    weights, masks = some_weights()
    before = copies(weights)
    with noisy(weights, masks, 0.3, 0, relative=False):
        for name, weight in weights.items():
            changed = (weight != before[name]).flatten().nonzero().squeeze(1)
            assert torch.isin(changed, masks[name]).all()
            assert len(changed) > 0.999 * len(masks[name])


@pytest.mark.parametrize("scale", [0.01, 0.3])
@pytest.mark.parametrize("relative", [False, True])
def test_the_noise_is_normal_and_has_the_size_that_was_asked_for(scale: float, relative: bool):
    weights, masks = some_weights()
    before = copies(weights)
    with noisy(weights, masks, scale, 7, relative=relative):
        for name, weight in weights.items():
            noise = (weight - before[name]).flatten()[masks[name]].double()
            size = scale * (float(before[name].std()) if relative else 1)
            assert float(noise.std()) == pytest.approx(size, rel=0.02)
            assert abs(float(noise.mean())) < 4 * size / math.sqrt(len(noise))
            assert float((noise.abs() < size).double().mean()) == pytest.approx(0.683, abs=0.01)


def test_the_noise_is_that_of_the_seed_whatever_entries_have_it():
    weights, masks = some_weights()
    others = {"one": random_indices(60_000, 30_000, seed=8), "two": random_indices(30_000, 20_000, seed=9)}
    before = copies(weights)
    found = {}
    for label, chosen, scale, seed in (
        ("first", masks, 0.2, 5),
        ("other entries", others, 0.2, 5),
        ("twice the scale", masks, 0.4, 5),
        ("other seed", masks, 0.2, 6),
    ):
        with noisy(weights, chosen, scale, seed, relative=False):
            noise = [(weights[name] - before[name]).flatten()[chosen[name]] for name in weights]
        found[label] = torch.cat(noise)
    expected = 0.2 * torch.randn(30_000, generator=torch.Generator().manual_seed(5))
    near = {"rtol": 0, "atol": 2e-6}  # what adding to the weight rounds away
    torch.testing.assert_close(found["first"][:30_000], expected, **near)
    torch.testing.assert_close(found["other entries"], found["first"], **near)
    torch.testing.assert_close(found["twice the scale"], 2 * found["first"], **near)
    assert (found["other seed"] - found["first"]).abs().median() > 0.1


def test_noise_in_bfloat16_is_added_in_float32_and_rounded_once():
    weights, masks = some_weights(torch.bfloat16)
    before = copies(weights)
    noise = torch.randn(30_000, generator=torch.Generator().manual_seed(2))
    with noisy(weights, masks, 0.3, 2, relative=False):
        expected = (before["one"].flatten()[masks["one"]].float() + 0.3 * noise).bfloat16()
        assert torch.equal(weights["one"].flatten()[masks["one"]], expected)


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("config", [MAGNITUDE, SelectionConfig(density=0.1, lra_rank=4)], ids=["magnitude", "lift"])
def test_masks_are_the_selection_of_each_matrix(model, config):
    targets, weights = targets_of(model)
    masks = masks_of(targets, config)
    assert list(masks) == list(weights)
    assert len(masks) == 14
    assert all(torch.equal(masks[name], select_indices(weight, config)) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_masks_of_experts_are_of_gate_and_up_of_each(name: str):
    """With a budget each, as in training."""
    torch.manual_seed(0)
    targets, weights = targets_of(MODELS[name](), "gate_proj")
    for key, chosen in masks_of(targets, MAGNITUDE).items():
        mask = torch.zeros(weights[key].numel(), dtype=torch.bool)
        mask[chosen] = True
        mask, weight = mask.view(weights[key].shape), weights[key].abs()
        for expert in range(3):
            gate = [slice(0, 12), slice(None)] if name == "mixtral" else [slice(None), slice(0, None, 2)]
            up = [slice(12, 24), slice(None)] if name == "mixtral" else [slice(None), slice(1, None, 2)]
            for half in (gate, up):
                part, scores = mask[expert][tuple(half)], weight[expert][tuple(half)]
                assert int(part.sum()) == round(0.1 * 12 * 16)
                assert scores[part].min() >= scores[~part].max()


def test_a_random_choice_is_another_one_in_each_matrix_and_for_each_seed(model):
    targets, _ = targets_of(model, "up_proj")  # of one shape
    found = [masks_of(targets, SelectionConfig(density=0.1, criterion="random", seed=seed)) for seed in (0, 0, 1)]
    flat = [tuple(chosen.tolist()) for masks in (found[0], found[2]) for chosen in masks.values()]
    assert len(set(flat)) == 4
    assert {len(chosen) for chosen in flat} == {round(0.1 * 48 * 32)}
    assert_same_bits(found[0], found[1])


# ------------------------------------------------------------------ perturbation


PROBES = Probes(
    text="the quick brown fox", prompt="Madrid is in", answer=" Spain", choices=[Choice("2+2?", ("4", "5"), 0)]
)


def test_the_rows_are_what_the_probes_find_under_the_noise_of_each_seed(model, tokenizer):
    configs = {"large": MAGNITUDE, "any": RANDOM}
    before = weights_of(model)
    rows = perturbation(model, tokenizer, PROBES, configs, [0.05, 0.2], [0, 3])
    assert_same_bits(weights_of(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert rows[0] == {"selection": "none", "scale": 0.0, "seed": 0, "entries": 0, **ask(model, tokenizer, PROBES)}
    cases = [(row["selection"], row["seed"], row["scale"]) for row in rows[1:]]
    assert cases == [(label, seed, scale) for label in configs for seed in (0, 3) for scale in (0.05, 0.2)]
    targets, weights = targets_of(model)
    for row in rows[1:]:
        config = MAGNITUDE if row["selection"] == "large" else replace(RANDOM, seed=row["seed"])
        chosen = masks_of(targets, config)
        assert row["entries"] == sum(round(0.1 * weight.numel()) for weight in weights.values())
        with noisy(weights, chosen, row["scale"], row["seed"], relative=False):
            expected = ask(model, tokenizer, PROBES)
        assert {key: row[key] for key in expected} == expected
        assert row["perplexity"] != rows[0]["perplexity"]
        assert row["probability"] != rows[0]["probability"]


def test_relative_noise_and_some_targets_only(model, tokenizer):
    probes = Probes(prompt="Madrid is in", answer=" Spain")
    (row,) = perturbation(
        model, tokenizer, probes, {"x": MAGNITUDE}, [2.0], [1], target_modules="q_proj", relative=True, before=False
    )
    targets, weights = targets_of(model, "q_proj")
    with noisy(weights, masks_of(targets, MAGNITUDE), 2.0, 1, relative=True):
        expected = probability(model, tokenizer, "Madrid is in", " Spain")
    assert row == {"selection": "x", "scale": 2.0, "seed": 1, "entries": 2 * 102, "probability": expected}


def test_the_weights_are_as_they_were_if_a_probe_fails(model, tokenizer, monkeypatch: pytest.MonkeyPatch):
    before = weights_of(model)

    def broken(*_) -> dict[str, float]:
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lift_lightning.analysis.noise.ask", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        perturbation(model, tokenizer, PROBES, {"x": MAGNITUDE}, [0.1], [0], before=False)
    assert_same_bits(weights_of(model), before)


def test_what_is_empty_is_not_asked(model, tokenizer):
    assert ask(model, tokenizer, Probes()) == {}
    assert list(ask(model, tokenizer, Probes(text="some text"))) == ["perplexity"]
    assert list(ask(model, tokenizer, Probes(prompt="a", answer="b"))) == ["probability"]
    assert list(ask(model, tokenizer, Probes(choices=[Choice("q", ("a", "b"), 0)]))) == ["accuracy"]
    text = "a text of some length " * 3
    found = ask(model, tokenizer, Probes(text=text, window=32, max_tokens=50))
    assert found["perplexity"] == perplexity(model, tokenizer, text, window=32, stride=16, max_tokens=50).token


def test_the_table_has_the_mean_and_the_range_over_seeds():
    def row(label: str, scale: float, seed: int, value: float) -> dict:
        return {"selection": label, "scale": scale, "seed": seed, "entries": 5, "perplexity": value}

    rows = [row("none", 0.0, 0, 8.0)]
    rows += [
        row("LIFT", 0.1, 0, 10.0),
        row("LIFT", 0.1, 1, 20.0),
        row("random", 0.1, 0, 9.0),
        row("random", 0.1, 1, 9.5),
    ]
    found = findings(rows, relative=False)
    assert found.name == "perturb"
    assert found.rows == rows
    columns = {column.header: list(column.cells) for column in found.table.columns}
    assert columns == {
        "selection": ["none", "LIFT", "random"],
        "scale": ["0", "0.1", "0.1"],
        "perplexity": ["8", "15 (10 to 20)", "9.25 (9 to 9.5)"],
    }
    (axes,) = found.figure.axes
    assert axes.get_xlabel() == "standard deviation of the noise"
    assert [line.get_ydata().tolist() for line in axes.lines] == [[8, 15], [8, 9.25]]
    (axes,) = findings(rows, relative=True).figure.axes
    assert axes.get_xlabel() == "noise / std of the matrix"


# ------------------------------------------------------------------ likelihoods


def one_by_one(model, tokenizer, prompt: str, continuation: str) -> float:
    """The definition: each byte after the prompt, given all before it, one forward pass of one text for each."""
    ids = tokenizer(prompt + continuation).input_ids
    start = len(tokenizer(prompt).input_ids)
    total = 0.0
    for place in range(start, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_log_likelihoods_of_prompts_of_different_lengths_are_those_of_one_at_a_time(model, tokenizer, batch_size: int):
    expected = [one_by_one(model, tokenizer, *text) for text in TEXTS]
    found = log_likelihoods(model, tokenizer, TEXTS, batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-5)
    assert log_likelihoods(model, tokenizer, TEXTS[::-1], batch_size=batch_size) == pytest.approx(found[::-1], rel=1e-6)


def test_log_likelihoods_without_a_bos(model):
    tokenizer = byte_tokenizer(bos=False)
    texts = [text for text in TEXTS if text[0]]
    expected = [one_by_one(model, tokenizer, *text) for text in texts]
    assert log_likelihoods(model, tokenizer, texts) == pytest.approx(expected, rel=1e-5)


def test_no_texts_have_no_log_likelihoods(model, tokenizer):
    assert log_likelihoods(model, tokenizer, []) == []


class Words:
    """A tokenizer whose tokens depend on what follows: a space belongs to the word after it, if there is one."""

    bos_token_id = None
    pieces = ("a", " ", "b", " b")

    def __call__(self, text: str, **_):
        ids = []
        while text:
            piece = max((p for p in self.pieces if text.startswith(p)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return type("Encoding", (), {"input_ids": ids})


def test_a_token_across_the_border_belongs_to_the_continuation(model):
    """ "a " + "b" is [a, " b"], of which the prompt alone has [a] only."""
    with torch.no_grad():
        logits = model(torch.tensor([[0]])).logits[0, -1].double()
    expected = float(logits.log_softmax(-1)[3])
    assert log_likelihoods(model, Words(), [("a ", "b")]) == pytest.approx([expected], rel=1e-5)
    assert log_likelihoods(model, Words(), [("a ", "b"), ("a", " bab")])[0] == pytest.approx(expected, rel=1e-5)


def test_all_logits_are_taken_from_a_model_that_cannot_leave_some_out(model, tokenizer):
    expected = log_likelihoods(model, tokenizer, TEXTS)

    class Plain(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask, use_cache):
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    assert log_likelihoods(Plain(), tokenizer, TEXTS) == pytest.approx(expected, rel=1e-6)


def test_the_probability_is_of_all_tokens_of_the_answer_together(model, tokenizer):
    expected = math.exp(one_by_one(model, tokenizer, "Madrid is in", " Spain"))
    found = probability(model, tokenizer, "Madrid is in", " Spain")
    assert found == pytest.approx(expected, rel=1e-4)
    both = probability(model, tokenizer, "x", "a") * probability(model, tokenizer, "xa", "b")
    assert probability(model, tokenizer, "x", "ab") == pytest.approx(both, rel=1e-4)


# ------------------------------------------------------------------ questions with options


def row_of(instruction: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.mark.parametrize(
    ("instruction", "answer", "expected"),
    [
        (
            "Please choose the correct answer to the question: Q?\n\nAnswer1: a b Answer2: c\n\n"
            "Answer format: answer1/answer2",
            "answer2",
            Choice("Q?", ("a b", "c"), 1),
        ),
        (
            "Please choose the correct answer to the question: What is 1+1? I ask: now.\n\n"
            "Answer1: one Answer2: two: 2 Answer3: answer3 is none Answer4: 11\n\n"
            "Answer format: answer1/answer2/answer3/answer4",
            "answer1",
            Choice("What is 1+1? I ask: now.", ("one", "two: 2", "answer3 is none", "11"), 0),
        ),
        (
            "Please choose the correct solution to the question: How?\n\nSolution1: this way\n\n"
            "Solution2: that way.\n\nAnswer format: solution1/solution2",
            "solution1",
            Choice("How?", ("this way", "that way."), 0),
        ),
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: The _ is here.\n\n"
            "Option1: cat Option2: dog the correct answer is\n\nAnswer format: option1/option2",
            "option2",
            Choice(
                "Please choose the correct answer to fill in the blank to complete the given sentence: The _ is here.",
                ("cat", "dog the correct answer is"),
                1,
            ),
        ),
        (
            "Please choose the correct ending to complete the given sentence: A man sits. He\n\n"
            "Ending1: eats. Ending2: sleeps. Ending3: goes. Ending4: is.\n\nAnswer format: ending1/ending2",
            "ending4",
            Choice(
                "Please choose the correct ending to complete the given sentence: A man sits. He",
                ("eats.", "sleeps.", "goes.", "is."),
                3,
            ),
        ),
    ],
    ids=["arc", "openbookqa", "piqa", "winogrande", "hellaswag"],
)
def test_questions_of_the_commonsense_sets_are_read(instruction: str, answer: str, expected: Choice):
    assert read_choice(row_of(instruction, answer), "here") == expected


QUESTION = (
    "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: c\n\nAnswer format: answer1/answer2"
)


@pytest.mark.parametrize(
    "row",
    [
        row_of(QUESTION, "answer3"),
        row_of(QUESTION, "answer0"),
        row_of(QUESTION, "true"),
        row_of(QUESTION, "2"),
        row_of(QUESTION, "answer2 or answer1"),
        row_of("Please answer with true or false, question: Is it?\n\nAnswer format: true/false", "true"),
        row_of("Please choose: Q?\n\nAnswer1: a\n\nAnswer format: answer1/answer2", "answer1"),
        {"answer": "answer1"},
        {"instruction": QUESTION},
        {},
    ],
)
def test_what_is_no_question_with_options_is_told_with_its_place(row: dict):
    with pytest.raises(
        ConfigError, match=r"test\.json, row 7 is no question with options: .* such as 'answer2'"
    ) as told:
        read_choice(row, "test.json, row 7")
    assert repr(str(row.get("instruction", ""))[:60]) in str(told.value)
    assert str(told.value).endswith(repr(row.get("answer", "")))


def test_the_accuracy_is_the_share_of_questions_whose_right_option_is_likeliest_by_character(model, tokenizer):
    generator = torch.Generator().manual_seed(1)
    choices = []
    for i in range(12):
        options = []
        for _ in range(2 + i % 3):
            length = int(torch.randint(1, 9, (1,), generator=generator))
            letters = torch.randint(97, 123, (length,), generator=generator).tolist()
            options.append("".join(map(chr, letters)))
        choices.append(Choice(f"{i} or {i + 1}?", tuple(options), i % 2))
    best, best_in_sum = [], []
    for one in choices:
        sums = [one_by_one(model, tokenizer, f"Question: {one.question}\nAnswer:", f" {o}") for o in one.options]
        scores = [total / len(option) for total, option in zip(sums, one.options, strict=True)]
        best.append(scores.index(max(scores)))
        best_in_sum.append(sums.index(max(sums)))
    right = sum(found == one.answer for found, one in zip(best, choices, strict=True))
    assert 0 < right < 12
    assert best != best_in_sum  # else the test could not tell them apart
    assert choice_accuracy(model, tokenizer, choices) == right / 12
    others = [Choice(one.question, one.options, found) for one, found in zip(choices, best, strict=True)]
    assert choice_accuracy(model, tokenizer, others) == 1
