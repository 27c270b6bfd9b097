"""What the bundled model reads: right by arithmetic, the same for the same seed, and free of what is held out."""

import re
from collections import Counter
from itertools import pairwise

import pytest

from lift_lightning.prompts import PREAMBLE, render_prompt
from lift_lightning.quickstart import problems, world
from lift_lightning.quickstart.pretrain import BATCHES_A_BLOCK, Recipe
from lift_lightning.quickstart.text import MIXTURE, documents, questions
from lift_lightning.quickstart.tokenizer import TEMPLATE, VOCAB_SIZE, train_tokenizer

# Blocks of the pretraining that made the bundled model, from the beginning and from the second stage.
BLOCK = Recipe.batch_size * BATCHES_A_BLOCK
DOCUMENTS = [d for block in range(20) for d in documents(Recipe.seed * 1_000_000 + block, BLOCK)]
DOCUMENTS += [d for block in range(300, 315) for d in documents(Recipe.seed * 1_000_000 + block, BLOCK, stage=2)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def asked() -> set[str]:
    """Every question that stands in the documents, without the frame of the prompt."""
    head, tail = f"{PREAMBLE}\n\n### Instruction:\n", "\n\n### "
    return {document.prompt.removeprefix(head).split(tail)[0] for document in DOCUMENTS if document.prompt}


# ---------------------------------------------------------------- held out


def test_no_held_out_fact_is_asked_for_in_pretraining():
    held_out = [fact for fact in world.facts() if fact.held_out]
    assert len(held_out) == 313
    forbidden = {fact.ask(i) for fact in held_out for i in range(len(fact.relation.questions))}
    assert len(forbidden) > 2 * len(held_out)
    assert not forbidden & asked()
    allowed = {fact.ask(i) for fact in world.asked_facts(held_out=False) for i in range(3)}
    assert len(allowed & asked()) > 0.7 * len(allowed)  # so the comparison above could have found something


def test_every_fact_is_stated_in_pretraining():
    prose = "\n".join(document.text for document in DOCUMENTS if not document.prompt)
    stated = {
        fact
        for fact in world.facts()
        for pattern in fact.relation.statements
        if pattern.format(town=fact.town, value=fact.value)[1:] in prose
    }
    assert len(stated) == len(world.facts()) == 1600


def test_no_held_out_problem_is_in_pretraining_or_training():
    tests = {q.instruction for skill in ("bridge", "target") for q in questions(skill, 1000, split="heldout")}
    assert len(tests) == 2000
    assert not tests & asked()
    for seed in range(3):
        for skill in ("bridge", "target"):
            train = {q.instruction for q in questions(skill, 3000, split="train", seed=seed)}
            validation = {q.instruction for q in questions(skill, 300, split="validation", seed=seed)}
            assert len(train) == 3000
            assert not train & tests
            assert not validation & (train | tests)


def test_pretraining_never_works_a_problem_of_two_steps():
    two = [d for d in DOCUMENTS if d.prompt and d.text.count("=") >= 2]
    assert two == []
    assert sum(d.text.count("=") == 1 for d in DOCUMENTS if d.prompt) > 5000  # problems of one step are worked
    # In prose there are calculations too. One goes on with what the last one gave no more often than by chance.
    lines = [re.findall(r"(\d+) . \d+ = (\d+)", d.text) for d in DOCUMENTS if not d.prompt and "=" in d.text]
    beside = [previous[1] == step[0] for line in lines for previous, step in pairwise(line)]
    apart = [line[0][1] == other[1][0] for line, other in pairwise(lines)]
    assert len(beside) > 10_000
    assert sum(beside) / len(beside) < 1.5 * sum(apart) / len(apart)


def test_held_out_is_not_a_matter_of_the_seed():
    first, second = (questions("target", 50, split="heldout", seed=seed) for seed in (0, 1))
    assert first == questions("target", 50, split="heldout", seed=0)
    assert first != second


# ---------------------------------------------------------------- right


@pytest.mark.parametrize(("skill", "steps"), [("bridge", 1), ("target", 2)])
def test_worked_solutions_are_right(skill, steps):
    for question in questions(skill, 1000, split="train", seed=5):
        calculations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", question.output)
        assert len(calculations) == steps
        for left, sign, right, result in calculations:
            assert eval(f"{left} {sign} {right}") == int(result)
        numbers = [int(n) for n in re.findall(r"\d+", question.output + question.instruction)]
        assert min(numbers) >= 1
        assert max(numbers) <= problems.LARGEST
        assert question.output.endswith(f" The answer is {question.answer}.")
        assert calculations[-1][-1] == question.answer
        told = Counter(re.findall(r"\d+", question.instruction))
        used = Counter(n for left, _, right, _ in calculations for n in (left, right))
        for _, _, _, result in calculations[:-1]:  # what a step gave is not told
            used[result] -= 1
        assert +used == told


def test_stories_count_right():
    stories = [d.text for d in DOCUMENTS if not d.prompt and re.match(r"\w+ has \d+ \w+\. ", d.text)]
    assert len(stories) > 2000
    for story in stories[:500]:
        numbers = [int(n) for n in re.findall(r"\d+", story)]
        now, rest = numbers[0], numbers[1:]
        for n, count in zip(rest[::2], rest[1::2], strict=True):
            assert count in (now + n, now - n)
            now = count


def test_facts_are_one_value_each():
    assert len(set(world.towns())) == world.TOWN_COUNT == 160
    assert all(fact.value in fact.relation.values for fact in world.facts())
    for relation in world.RELATIONS:
        assert all("{town}" in text and "{value}" in text for text in relation.statements)
        assert all(text.index("{town}") < text.index("{value}") for text in relation.statements if text[0] == "{")
        assert all("{town}" in text and "{value}" not in text for text in relation.questions)
        used = Counter(fact.value for fact in world.facts() if fact.relation is relation)
        assert max(used.values()) < 0.25 * world.TOWN_COUNT  # no answer is right by guessing


def test_documents_are_the_same_for_a_seed():
    assert documents(3, 200) == documents(3, 200)
    assert documents(3, 200) != documents(4, 200)
    assert documents(3, 200) != documents(3, 200, stage=2)
    for stage in (1, 2):
        assert sum(entry[stage] for entry in MIXTURE.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("target", 5, "test"), "split of"),
        (("arithmetic", 5, "train"), "skill must be one of"),
        (("source", 400, "heldout"), "source has 313 heldout questions, 400 were asked for"),
        (("source", 1, "validation"), "source has 0 validation questions"),
    ],
)
def test_what_is_not_there_is_an_error(arguments, message):
    skill, count, split = arguments
    with pytest.raises(ValueError, match=message):
        questions(skill, count, split=split)


# ---------------------------------------------------------------- tokenizer


def test_tokens_give_the_text_back(tokenizer):
    for document in DOCUMENTS[:300]:
        text = document.prompt + document.text
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    foreign = "Ünïcode, 12.5 €\n\ttabs"
    assert tokenizer.decode(tokenizer(foreign).input_ids) == foreign


def test_one_token_for_a_digit_a_town_and_a_part_of_the_template(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(tokenizer(" has 57").input_ids) == ["Ġhas", "Ġ", "5", "7"]
    assert all(len(tokenizer(f" {town}").input_ids) == 1 for town in world.towns())
    assert all(len(tokenizer(part).input_ids) == 1 for part in TEMPLATE)
    ids = tokenizer(render_prompt("Who?", "Text.")).input_ids
    assert [tokenizer.decode(i) for i in (ids[0], ids[-1])] == [TEMPLATE[0], TEMPLATE[2]]
    assert tokenizer.decode(ids) == render_prompt("Who?", "Text.")
