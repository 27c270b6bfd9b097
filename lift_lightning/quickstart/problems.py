"""Arithmetic word problems of one and of two steps, with worked solutions.

All numbers are whole and between 1 and 99. A problem is a start, a number of events, and a question; each event is one
calculation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

from lift_lightning.quickstart.world import words

LARGEST = 99

Split = Literal["train", "validation", "heldout"]  # of ten problems eight, one and one

NAMES = words(
    "Ana Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mia Nils Olga Paul Rosa Sam Tina Uwe Vera Will Yara Zoe"
)
THINGS = words(
    "apples pens stamps shells coins cards stones buttons eggs cups books nuts plums balls beads keys leaves tickets "
    "pencils marbles cookies flowers ribbons spoons"
)
CONTAINERS = words("boxes bags baskets jars drawers trays")
GAINS = (
    "{who} buys {n} more.",
    "{who} finds {n} more.",
    "{other} gives {who} {n} more {things}.",
    "{who} gets {n} {things} from {other}.",
    "{who} collects another {n}.",
)
LOSSES = (
    "{who} gives {n} to {other}.",
    "{who} loses {n} of them.",
    "{who} sells {n} {things}.",
    "{other} takes {n} of them.",
    "{who} leaves {n} {things} at home.",
)
FILLERS = (
    "It is a sunny day.",
    "The {things} are new.",
    "{other} is watching.",
    "{who} likes {things}.",
    "They meet at the market.",
)


@dataclass(frozen=True)
class Step:
    """One calculation: `left sign right = result`."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """What comes out."""
        if self.sign == "+":
            return self.left + self.right
        if self.sign == "-":
            return self.left - self.right
        return self.left * self.right if self.sign == "*" else self.left // self.right

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}."


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        start: the sentence that says what there is.
        events: the sentences that change it.
        ask: the question.
        steps: the calculations, in order.
    """

    start: str
    events: tuple[str, ...]
    ask: str
    steps: tuple[Step, ...]

    @property
    def question(self) -> str:
        """The problem as it is put."""
        return " ".join([self.start, *self.events, self.ask])

    @property
    def answer(self) -> int:
        """The number asked for."""
        return self.steps[-1].result

    @property
    def worked(self) -> str:
        """Every calculation, then the answer."""
        return " ".join([*map(str, self.steps), self.short])

    @property
    def short(self) -> str:
        """The answer alone."""
        return f"The answer is {self.answer}."

    @property
    def split(self) -> Split:
        """What it is for: decided by its text, so that no seed can bring a test question into training."""
        place = crc32(self.question.encode()) % 10
        return "heldout" if place == 0 else "validation" if place == 1 else "train"


class _Telling:
    """A problem in the making: who has what, how many by now, and what was told."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.who, self.other = rng.sample(NAMES, 2)
        self.things = rng.choice(THINGS)
        self.steps: list[Step] = []
        self.events: list[str] = []
        self.ask = f"How many {self.things} does {self.who} have now?"

    def say(self, sentence: str, **words: object) -> str:
        return sentence.format(who=self.who, other=self.other, things=self.things, **words)

    def start_with_groups(self) -> None:
        groups, size = self.rng.randint(2, 9), self.rng.randint(2, 9)
        container = self.rng.choice(CONTAINERS)
        self.start = self.say("{who} has {a} {c} with {b} {things} each.", a=groups, b=size, c=container)
        self.calculate("*", groups, size)

    def start_with(self, least: int, most: int) -> None:
        self.now = self.rng.randint(least, most)
        self.start = self.say("{who} has {n} {things}.", n=self.now)

    def calculate(self, sign: str, left: int, right: int) -> None:
        self.steps.append(Step(left, sign, right))
        self.now = self.steps[-1].result

    def gain(self) -> None:
        n = self.rng.randint(2, min(30, LARGEST - self.now))
        self.events.append(self.say(self.rng.choice(GAINS), n=n))
        self.calculate("+", self.now, n)

    def lose(self) -> None:
        n = self.rng.randint(2, min(30, self.now - 1))
        self.events.append(self.say(self.rng.choice(LOSSES), n=n))
        self.calculate("-", self.now, n)

    def change(self) -> None:
        """Gain or lose, whichever the number allows."""
        if self.now < 5 or (self.now < 70 and self.rng.random() < 0.5):
            self.gain()
        else:
            self.lose()

    def finish(self) -> Problem:
        if self.rng.random() < 0.25:
            place = self.rng.randint(0, len(self.events))
            self.events.insert(place, self.say(self.rng.choice(FILLERS)))
        return Problem(self.start, tuple(self.events), self.ask, tuple(self.steps))


def one_step(rng: random.Random) -> Problem:
    """What there is and one change to it, or boxes with as many things in each, or things to share out."""
    telling, kind = _Telling(rng), rng.random()
    if kind < 0.2:
        telling.start_with_groups()
        telling.ask = telling.say("How many {things} does {who} have?")
    elif kind < 0.35:
        size, groups = rng.randint(2, 9), rng.randint(2, 9)
        container = rng.choice(CONTAINERS)
        telling.start = telling.say("{who} puts {n} {things} into {g} {c}.", n=size * groups, g=groups, c=container)
        telling.ask = telling.say("How many {things} are in each?")
        telling.calculate("/", size * groups, groups)
    else:
        telling.start_with(3, 80)
        telling.change()
    return telling.finish()


def two_steps(rng: random.Random) -> Problem:
    """What there is and two changes to it, or boxes and a change."""
    telling = _Telling(rng)
    if rng.random() < 0.3:
        telling.start_with_groups()
    else:
        telling.start_with(3, 60)
        telling.change()
    telling.change()
    return telling.finish()


def story(rng: random.Random) -> str:
    """Prose in which somebody's things are counted after each of two to four changes. No question, no calculation."""
    telling = _Telling(rng)
    telling.start_with(3, 60)
    sentences = [telling.start]
    for _ in range(rng.randint(2, 4)):
        telling.change()
        sentences += [telling.events[-1], telling.say(rng.choice(COUNTS), n=telling.now)]
    return " ".join(sentences)


COUNTS = ("Now {who} has {n}.", "That makes {n} {things}.", "Then there are {n}.", "{who} counts {n} {things}.")


def drill(rng: random.Random, *, easy: bool = False) -> str:
    """A line of three to six calculations, each by itself; `easy` makes small numbers as frequent as large ones."""
    return " ".join(str(_random_step(rng, easy)) for _ in range(rng.randint(3, 6)))


def _random_step(rng: random.Random, easy: bool) -> Step:
    sign = rng.choice("++--*/")
    largest = rng.randint(3, LARGEST) if easy else LARGEST
    if sign == "+":
        left = rng.randint(1, largest - 1)
        return Step(left, "+", rng.randint(1, largest - left))
    if sign == "-":
        left = rng.randint(2, largest)
        return Step(left, "-", rng.randint(1, left - 1))
    left, right = rng.randint(2, 9), rng.randint(2, 9)
    return Step(left, "*", right) if sign == "*" else Step(left * right, "/", right)
