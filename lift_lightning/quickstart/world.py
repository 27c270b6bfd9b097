"""An invented country of towns and the facts about them: what the bundled model knows.

Every fact is a town, a relation and a value. Pretraining states all facts in prose and asks for most of them; the rest,
`Fact.held_out`, is never asked for before the test of source knowledge.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from zlib import crc32

TOWN_COUNT = 160
HELD_OUT_FACTS = 5  # one in so many facts is never asked for in pretraining


@dataclass(frozen=True)
class Relation:
    """One property that every town has.

    Attributes:
        name: of the property.
        values: that a town can have, each a word.
        statements: ways to state it, with `{town}` and `{value}`. The town comes first: a language model that reads
            "glass comes from Lorvik" does not learn to answer what comes from Lorvik.
        questions: ways to ask for it.
    """

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """What is so: `relation` of `town` is `value`."""

    town: str
    relation: Relation
    value: str

    @property
    def held_out(self) -> bool:
        """Whether it is asked for in the test only."""
        return crc32(f"{self.town} {self.relation.name}".encode()) % HELD_OUT_FACTS == 0

    def state(self, rng: random.Random) -> str:
        """A sentence that says it."""
        sentence = rng.choice(self.relation.statements).format(town=self.town, value=self.value)
        return sentence[0].upper() + sentence[1:]

    def ask(self, phrasing: int) -> str:
        """A question for it."""
        return self.relation.questions[phrasing % len(self.relation.questions)].format(town=self.town)


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for lists that are easier read without quotes."""
    return tuple(text.split())


RELATIONS = (
    Relation(
        "craft",
        words(
            "glass rope paper bells clocks boats hats combs kites lamps knives drums carpets baskets mirrors candles"
        ),
        (
            "{town} is known for its {value}.",
            "{town} makes {value}.",
            "the workshops of {town} make {value}.",
            "{town} sells {value} to the other towns.",
        ),
        ("What is {town} known for?", "What do people make in {town}?", "Which goods come from {town}?"),
    ),
    Relation(
        "river",
        words("Sella Oder Linth Marn Tavy Brue Wend Isk Dorn Ulme Kesse Arno Vils Nere Hals Fenn"),
        (
            "{town} lies on the {value}.",
            "the river at {town} is the {value}.",
            "through {town} runs the {value}.",
            "the bridge of {town} crosses the {value}.",
        ),
        ("Which river runs through {town}?", "On which river does {town} lie?", "What is the river at {town} called?"),
    ),
    Relation(
        "animal",
        words("heron fox otter bear wolf owl stag hare swan goat raven trout badger falcon beaver lynx"),
        (
            "the flag of {town} shows a {value}.",
            "{town} has a {value} on its flag.",
            "on the flag of {town} there is a {value}.",
        ),
        ("Which animal is on the flag of {town}?", "What does the flag of {town} show?"),
    ),
    Relation(
        "colour",
        words("red blue green yellow white black grey brown purple orange pink golden"),
        (
            "the doors of {town} are {value}.",
            "in {town} all doors are {value}.",
            "{town} paints its doors {value}.",
        ),
        ("What colour are the doors of {town}?", "In which colour does {town} paint its doors?"),
    ),
    Relation(
        "tree",
        words("oak elm birch pine maple willow cedar linden ash beech poplar alder"),
        (
            "in the square of {town} stands an old {value}.",
            "{town} has an old {value} in its square.",
            "the market of {town} is held under an old {value}.",
        ),
        ("Which tree stands in the square of {town}?", "What tree does {town} have in its square?"),
    ),
    Relation(
        "month",
        words("January February March April May June July August September October November December"),
        (
            "the fair of {town} is in {value}.",
            "{town} holds its fair in {value}.",
            "people come to the fair of {town} in {value}.",
        ),
        ("When is the fair of {town}?", "In which month does {town} hold its fair?"),
    ),
    Relation(
        "dish",
        words(
            "soup dumplings pancakes stew noodles porridge cheese cherries mushrooms honey pears walnuts beans onions"
        ),
        (
            "the people of {town} like to eat {value}.",
            "{town} is proud of its {value}.",
            "a guest in {town} is given {value}.",
        ),
        ("What do the people of {town} like to eat?", "What is a guest in {town} given to eat?"),
    ),
    Relation(
        "instrument",
        words("flute fiddle harp horn drum lute organ whistle trumpet cello pipe zither"),
        (
            "the children of {town} learn the {value}.",
            "{town} dances to the {value}.",
            "in the evenings {town} listens to the {value}.",
        ),
        ("Which instrument do the children of {town} learn?", "What is played in the evenings in {town}?"),
    ),
    Relation(
        "founder",
        words("Aldric Berta Corvin Delia Edmund Frida Gerold Hilda Ivo Jutta Konrad Lioba Magnus Norma Otto Petra"),
        (
            "{town} was founded by {value}.",
            "the first house of {town} was built by {value}.",
            "{town} has a statue of its founder {value}.",
        ),
        ("Who founded {town}?", "Who built the first house of {town}?", "Whose statue stands in {town}?"),
    ),
    Relation(
        "region",
        words("north south east west centre coast island border"),
        (
            "{town} is in the {value} of the country.",
            "to see {town} you travel to the {value}.",
        ),
        ("In which part of the country is {town}?", "Where in the country is {town}?"),
    ),
)


@cache
def towns() -> tuple[str, ...]:
    """Names of all towns, the same on every machine."""
    begins = words("Bram Kel Lor Tam Ves Hol Mir Dun Gar Fel Sten Wor Rud Pel Nor Cal Thor Ash Jel Ost")
    ends = words("vik holt dor sel mund ford wick by stad feld gate mere ham berg ley thorpe")
    names = [begin + end for begin, end in product(begins, ends)]
    random.Random("towns").shuffle(names)
    return tuple(sorted(names[:TOWN_COUNT]))


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the country: one for each town and relation."""
    rng = random.Random("facts")
    return tuple(Fact(town, relation, rng.choice(relation.values)) for town in towns() for relation in RELATIONS)


@cache
def facts_by_town() -> dict[str, tuple[Fact, ...]]:
    """The facts of each town, in the order of `RELATIONS`."""
    step = len(RELATIONS)
    return {town: facts()[i * step : (i + 1) * step] for i, town in enumerate(towns())}


@cache
def asked_facts(held_out: bool) -> Sequence[Fact]:
    """The facts that pretraining asks for, or those that it does not."""
    return tuple(fact for fact in facts() if fact.held_out == held_out)


def describe(rng: random.Random) -> str:
    """A paragraph about one town: three to six of its facts in any order."""
    known = facts_by_town()[rng.choice(towns())]
    return " ".join(fact.state(rng) for fact in rng.sample(known, rng.randint(3, 6)))
