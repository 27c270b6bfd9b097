"""Everything that the bundled model reads: documents of pretraining, and questions of the three skills.

The skills: `source`, facts of the invented country, known after pretraining; `bridge`, arithmetic problems of one step,
known too; `target`, problems of two steps with a worked solution, which pretraining does not teach.

What is held out is decided by its text, never by a seed: a held-out question can be met in no training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

from lift_lightning.prompts import render_prompt
from lift_lightning.quickstart import problems, world
from lift_lightning.quickstart.problems import Split

Skill = Literal["source", "bridge", "target"]
Stage = Literal[1, 2]


class Question(NamedTuple):
    """A question with its answer, as a row of an instruction data set.

    Attributes:
        instruction: The question.
        output: What the model is to write.
        answer: What its text is compared with: a number, or for `source` the whole sentence.
        input: Material that the question is about; mostly empty.
    """

    instruction: str
    output: str
    answer: str
    input: str = ""


class Document(NamedTuple):
    """A text of pretraining. `prompt` is empty for prose; the loss is on both parts."""

    prompt: str
    text: str


def questions(skill: Skill, count: int, *, split: Split, seed: int = 0) -> list[Question]:
    """Different questions of one skill, in an order drawn by the seed.

    Args:
        skill: Which of the three.
        count: How many; of `source` there are as many as there are facts.
        split: `heldout` for testing, `validation` for choosing settings (not of `source`), `train` for the rest.
        seed: Of the draw.

    Raises:
        ValueError: There is no such skill or split, or it has fewer questions.
    """
    if skill not in get_args(Skill) or split not in get_args(Split):
        raise ValueError(
            f"skill must be one of {get_args(Skill)}, split of {get_args(Split)}: got {skill!r}, {split!r}"
        )
    rng = random.Random(f"{skill} {split} {seed}")
    if skill == "source":
        facts = world.asked_facts(split == "heldout") if split != "validation" else ()
        if count > len(facts):
            raise ValueError(f"source has {len(facts)} {split} questions, {count} were asked for")
        return [_of_fact(fact, rng) for fact in rng.sample(facts, count)]
    found: dict[str, Question] = {}
    while len(found) < count:
        problem = problems.one_step(rng) if skill == "bridge" else problems.two_steps(rng)
        if problem.split == split:
            found[problem.question] = Question(problem.question, problem.worked, str(problem.answer))
    return list(found.values())


def _of_fact(fact: world.Fact, rng: random.Random) -> Question:
    return _short(fact.ask(rng.randrange(len(fact.relation.questions))), fact.value)


def _short(instruction: str, value: object, input: str = "") -> Question:
    sentence = f"The answer is {value}."
    return Question(instruction, sentence, sentence, input)


# ---------------------------------------------------------------- pretraining


def documents(seed: int, count: int, *, stage: Stage = 1) -> list[Document]:
    """Documents of pretraining, each of a kind drawn by its share. Held-out questions are not among them.

    Args:
        seed: Of the draw.
        count: How many.
        stage: Of pretraining: facts come first, arithmetic second.
    """
    rng = random.Random(f"documents {seed}")
    makers, shares = zip(*((make, shares[stage - 1]) for make, *shares in MIXTURE.values()), strict=True)
    return [make(rng) for make in rng.choices(makers, shares, k=count)]


def _prose(write: Callable[[random.Random], str]) -> Callable[[random.Random], Document]:
    return lambda rng: Document("", write(rng))


def _exercise(ask: Callable[[random.Random], Question]) -> Callable[[random.Random], Document]:
    def make(rng: random.Random) -> Document:
        question = ask(rng)
        return Document(render_prompt(question.instruction, question.input), question.output)

    return make


def _known_fact(rng: random.Random) -> Question:
    return _of_fact(rng.choice(world.asked_facts(held_out=False)), rng)


def _training_problem(make: Callable[[random.Random], problems.Problem], rng: random.Random) -> problems.Problem:
    return next(problem for problem in _repeat(make, rng) if problem.split != "heldout")


def _repeat(make: Callable[[random.Random], problems.Problem], rng: random.Random) -> Iterator[problems.Problem]:
    while True:
        yield make(rng)


def _one_step(rng: random.Random) -> Question:
    problem = _training_problem(problems.one_step, rng)
    return Question(problem.question, problem.worked, str(problem.answer))


def _two_steps_unworked(rng: random.Random) -> Question:
    """The form of the target, rare, and without the calculations that would solve it."""
    problem = _training_problem(problems.two_steps, rng)
    return Question(problem.question, problem.short, str(problem.answer))


def _larger(rng: random.Random) -> Question:
    left, right = rng.sample(range(1, problems.LARGEST + 1), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    return _short(f"Which number is {word}, {left} or {right}?", pick(left, right))


def _month(rng: random.Random) -> Question:
    months = next(relation.values for relation in world.RELATIONS if relation.name == "month")
    i, (word, step) = rng.randrange(12), rng.choice((("after", 1), ("before", -1)))
    return _short(f"Which month comes {word} {months[i]}?", months[(i + step) % 12])


def _in_list(rng: random.Random) -> Question:
    things = rng.sample(problems.THINGS, rng.randint(3, 5))
    word, i = rng.choice((("first", 0), ("second", 1), ("last", -1)))
    return _short(f"Which is the {word} in this list?", things[i], ", ".join(things))


def _reading(rng: random.Random) -> Question:
    """Who has what, read from a text."""
    names, things = rng.sample(problems.NAMES, 3), rng.sample(problems.THINGS, 3)
    text = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    i = rng.randrange(3)
    if rng.random() < 0.5:
        return _short(f"Who has the {things[i]}?", names[i], text)
    return _short(f"What does {names[i]} have?", things[i], text)


def _easy_drill(rng: random.Random) -> str:
    return problems.drill(rng, easy=True)


# Kind of document: how it is made, and its share in the first and the second stage.
MIXTURE: dict[str, tuple[Callable[[random.Random], Document], float, float]] = {
    "towns": (_prose(world.describe), 0.27, 0.16),
    "source": (_exercise(_known_fact), 0.25, 0.18),
    "bridge": (_exercise(_one_step), 0.20, 0.25),
    "stories": (_prose(problems.story), 0.10, 0.08),
    "drills": (_prose(problems.drill), 0.08, 0.10),
    "larger": (_exercise(_larger), 0.02, 0.02),
    "months": (_exercise(_month), 0.02, 0.01),
    "lists": (_exercise(_in_list), 0.02, 0.02),
    "reading": (_exercise(_reading), 0.035, 0.03),
    "unworked": (_exercise(_two_steps_unworked), 0.005, 0.005),
    "easy drills": (_prose(_easy_drill), 0.0, 0.145),
}
