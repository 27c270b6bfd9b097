"""Tasks with their versions, and two rules that read an answer out of a model's text.

Rule `paper` is the one that the LIFT paper's figures were made with (the evaluation code of LLM-Adapters); it exists
for comparison and keeps that code's faults: "The Answer is B" reads as A, "10-5" as -5, and any number at the end of
the text counts. Rule `strict` reads the number, letter or label that the text states as its answer, and nothing where
it states none. Both are reported.

A change to how a task reads or scores answers raises the task's version.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

Kind = Literal["number", "letter", "label", "exact"]
GenericKind = Literal["number", "exact"]
Rule = Literal["paper", "strict"]
Answer = float | str | None

# |gold - answer| up to which two numbers are the same (LLM-Adapters, evaluate.py).
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Task:
    """What a test set asks for.

    Attributes:
        name: as it stands in results; lower case for the known tasks.
        version: of the extraction and scoring of this task.
        kind: `number`; `letter`, one of `labels`; `label`, one of `labels` as a word; `exact`, the whole text.
        folder: the task's folder in the LLM-Adapters collection; empty for a file of the user's own.
        labels: the answers that there are, for `letter` and `label`.
    """

    name: str
    version: int
    kind: Kind
    folder: str = ""
    labels: tuple[str, ...] = ()

    @property
    def max_new_tokens(self) -> int:
        """Where a completion ends that has not ended by itself, as in LLM-Adapters' code: a label needs no reasons."""
        return 32 if self.kind == "label" else 256


class Score(TypedDict):
    """The answers read from one prediction, None where a rule finds none, and whether each is right."""

    paper_answer: Answer
    strict_answer: Answer
    paper: bool
    strict: bool


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))


ARITHMETIC = (
    Task("multiarith", 1, "number", "MultiArith"),
    Task("gsm8k", 1, "number", "gsm8k"),
    Task("addsub", 1, "number", "AddSub"),
    Task("aqua", 1, "letter", "AQuA", tuple("ABCDE")),
    Task("singleeq", 1, "number", "SingleEq"),
    Task("svamp", 1, "number", "SVAMP"),
    Task("mawps", 1, "number", "mawps"),
)
COMMONSENSE = (
    Task("boolq", 1, "label", "boolq", ("true", "false")),
    Task("piqa", 1, "label", "piqa", _numbered("solution", 2)),
    Task("social_i_qa", 1, "label", "social_i_qa", _numbered("answer", 5)),
    Task("hellaswag", 1, "label", "hellaswag", _numbered("ending", 4)),
    Task("winogrande", 1, "label", "winogrande", _numbered("option", 2)),
    Task("arc-easy", 1, "label", "ARC-Easy", _numbered("answer", 5)),
    Task("arc-challenge", 1, "label", "ARC-Challenge", _numbered("answer", 5)),
    Task("openbookqa", 1, "label", "openbookqa", _numbered("answer", 5)),
)
REASONING = (Task("strategyqa", 1, "label", labels=("true", "false")),)


# Of the bundled model, see lift_lightning/quickstart.
QUICKSTART = (
    Task("quickstart-source", 1, "exact"),
    Task("quickstart-bridge", 1, "number"),
    Task("quickstart-target", 1, "number"),
)


def _key(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).lower()


TASKS = {_key(task.name): task for task in (*ARITHMETIC, *COMMONSENSE, *REASONING, *QUICKSTART)}


def is_known(name: str) -> bool:
    """Whether the task of this name comes with its own scoring."""
    return _key(name) in TASKS


def get_task(name: str, *, generic: GenericKind | None = None) -> Task:
    """The task of this name; upper and lower case, hyphens and underscores make no difference.

    Args:
        name: of a known task or its folder, as `AddSub`, or of a test set of the user's own.
        generic: how to score a test set that is not known: `number`, by the rules of the arithmetic tasks, or `exact`,
            the whole text. No effect on known names.

    Raises:
        ValueError: if the name is not known and `generic` is not given, or `generic` is no kind.
    """
    if generic is not None and generic not in get_args(GenericKind):
        raise ValueError(f"generic must be one of {', '.join(get_args(GenericKind))}, got {generic!r}")
    if (task := TASKS.get(_key(name))) is not None:
        return task
    if generic is None:
        known = ", ".join(task.name for task in TASKS.values())
        raise ValueError(
            f"unknown task {name!r}; known are {known}. "
            "For a test set of your own say how it is scored: generic='number' or generic='exact'"
        )
    return Task(name, 1, generic)


def score(task: Task, prediction: str, gold: str | float) -> Score:
    """Read one prediction by both rules and compare with the gold answer.

    Args:
        task: what was asked.
        prediction: the model's text, without the prompt.
        gold: the right answer, as the test set states it.

    Raises:
        ValueError: if the gold answer is none that the task can have.
    """
    right = parse_gold(task, gold)
    paper, strict = extract(task, prediction, "paper"), extract(task, prediction, "strict")
    return {
        "paper_answer": paper,
        "strict_answer": strict,
        "paper": _equal(paper, right),
        "strict": _equal(strict, right),
    }


def parse_gold(task: Task, gold: str | float) -> float | str:
    """The gold answer of a test set as a value that answers are compared with.

    Raises:
        ValueError: if it is none that the task can have.
    """
    text = str(gold).strip()
    if task.kind == "number":
        try:
            value = float(text.replace(",", ""))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"task {task.name}: the gold answer must be a number, got {gold!r}")
        return value
    if task.kind == "exact":
        return " ".join(text.split())
    text = text.upper() if task.kind == "letter" else text.lower()
    if text not in task.labels:
        raise ValueError(f"task {task.name}: the gold answer must be one of {', '.join(task.labels)}, got {gold!r}")
    return text


def extract(task: Task, text: str, rule: Rule) -> Answer:
    """Read the answer out of a model's text.

    Args:
        task: decides what an answer looks like.
        text: the model's text, without the prompt.
        rule: `paper` or `strict`, see the top of this module.

    Returns:
        A finite number, a letter, a label or a text, according to the task's kind; None where the rule finds none.

    Raises:
        ValueError: if the rule is unknown.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    if task.kind == "exact":
        return " ".join(text.split()) or None
    if rule == "paper":
        return _paper_number(text) if task.kind == "number" else _paper_choice(task, text)
    # What follows the model's answer when it goes on to make up the next question is not part of its answer.
    text = _NEXT_PROMPT.split(text, maxsplit=1)[0].translate(_PLAIN_SIGNS)
    if task.kind == "number":
        return _strict_number(text)
    return _strict_letter(task, text) if task.kind == "letter" else _strict_label(task, text)


def _equal(answer: Answer, gold: float | str) -> bool:
    if isinstance(answer, float) and isinstance(gold, float):
        # The margin keeps a difference of exactly 0.001 in decimals inside.
        return abs(answer - gold) <= TOLERANCE + 1e-12 * max(1.0, abs(gold))
    return answer is not None and answer == gold


# --- rule `paper` ----------------------------------------------------------------------------------------------------


def _paper_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return _finite(float(numbers[-1])) if numbers else None


def _paper_choice(task: Task, text: str) -> str | None:
    """The first letter anywhere, inside words too; labels in lower case."""
    match = re.search("|".join(task.labels), text if task.kind == "letter" else text.lower())
    return match[0] if match else None


# --- rule `strict` ---------------------------------------------------------------------------------------------------

_NEXT_PROMPT = re.compile(r"###\s*(?:Instruction|Input|Response)\s*:")
_PLAIN_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "÷": "/", "·": "*"})

# "the answer is", "The answer to 3.5 + 2 would be", "Answer:", but no restated list of choices and no "answer is not".
_CUE = (
    r"\b(?:{words})\b(?!\s*(?:choices|options|format)\b)(?:[^.\n:=]|\.(?=\d)){{0,60}}?"
    r"(?:\b(?:is|are|was|be|equals)\b|[:=])(?!\s*not\b)"
)
_NUMBER_CUE = re.compile(_CUE.format(words="answer") + r"|####|\\boxed\s*\{", re.IGNORECASE)
_CHOICE_CUE = re.compile(
    _CUE.format(words="answer|option|choice|solution|ending") + r"|####|\\boxed\s*\{", re.IGNORECASE
)

# A mixed number or fraction (3 1/2, 3/4), thousands set apart (1,234.50, 118 000), plain (12, 0.5, .5).
_UNSIGNED = r"(?:(?:\d+ )?\d+/\d+|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?: \d{3})+(?!\d)|\d+(?:\.\d+)?|\.\d+)"
# A minus is a sign only where nothing stands before it that it could be subtracted from.
_TERM = rf"(?:(?<![\w).%])-[$€£]?|[$€£]|(?<![\w.])){_UNSIGNED}%?"
_UNIT = r"(?:\s*[A-Za-z]+)?"
_SUM = rf"{_TERM}(?:{_UNIT}[\s()]*[-+*/x^][\s()]*{_TERM})*"
_EQUATION = re.compile(rf"{_SUM}(?:{_UNIT}[\s()]*=[\s()]*{_SUM})*")
_WHOLE_TERM = re.compile(_TERM)
_OR = re.compile(r"[\s)*]*(?:[A-Za-z]+\s+)?\bor\s+")


_SENTENCE_END = re.compile(r"(?<=[.!?])(?!\d)\s*(?=\S)|\n+")
# Characters; keeps the work linear for a model that repeats "the answer is" until it is cut off.
_LONGEST_STATEMENT = 500


def _statements(text: str, cue: re.Pattern[str]) -> list[str]:
    """What follows each cue up to the end of its sentence, the last cue first."""
    statements = []
    for match in reversed(list(cue.finditer(text))):
        rest = text[match.end() : match.end() + _LONGEST_STATEMENT].lstrip(" \t\r\n:=*")
        statements.append(re.split(r"[.!?](?!\d)|\n", rest, maxsplit=1)[0])
    return statements


def _strict_number(text: str) -> float | None:
    for statement in _statements(text, _NUMBER_CUE):
        if match := _EQUATION.search(statement):
            return None if _offers_another(statement, match.end(), _EQUATION) else _result(match[0])
    # No answer sentence: the last sentence counts as one, unless it asks, as a repeated question does.
    last = _SENTENCE_END.split(text.strip())[-1]
    equations = [] if last.endswith("?") else _EQUATION.findall(last)
    return _result(equations[-1]) if equations else None


def _result(equation: str) -> float | None:
    """The value after the last equals sign; None where a sum is left that nobody worked out."""
    last = equation.rsplit("=", 1)[-1].strip(" \t\r\n()")
    if not _WHOLE_TERM.fullmatch(last):
        return None
    plain = re.sub(r"[$€£,%]", "", last)
    sign = -1.0 if plain.startswith("-") else 1.0
    plain = plain.lstrip("-")
    if "/" not in plain:
        return _finite(sign * float(plain.replace(" ", "")))
    whole, _, fraction = plain.rpartition(" ")
    numerator, _, denominator = fraction.partition("/")
    if float(denominator) == 0:
        return None
    return _finite(sign * (float(whole or 0) + float(numerator) / float(denominator)))


def _finite(value: float) -> float | None:
    """JSON has no infinity, which hundreds of digits in a row overflow to."""
    return value if math.isfinite(value) else None


def _strict_letter(task: Task, text: str) -> str | None:
    letters = "".join(task.labels)
    # "A" before a word is an article, unless the word joins or explains.
    article = r"(?!\s+(?!(?:or|and|because|since|as|is|which|but|so|for)\b)[a-z])"
    option = re.compile(rf"\(\s*(?i:([{letters}]))\s*\)|(?<![\w'])(?:([{letters[1:]}])|(A){article})(?![\w'])")
    if (found := _stated_choice(_statements(text, _CHOICE_CUE), option)) is not None:
        return found.upper() or None
    # No answer sentence: the text is the bare option, or names one option as such.
    if match := re.match(rf"\W*([{letters}])(?:\W*$|\)|[.:](?!\w))", text):
        return match[1]
    named = {match.upper() for match in re.findall(rf"(?i:\b(?:option|choice)\s+\(?([{letters}])\b)", text)}
    return named.pop() if len(named) == 1 else None


def _strict_label(task: Task, text: str) -> str | None:
    text = text.lower()
    words = "|".join(re.sub(r"(\d)$", r"\\s?\1", label) for label in task.labels)
    label = re.compile(rf"(?<!not )\b({words})\b")
    if (found := _stated_choice(_statements(text, _CHOICE_CUE), label)) is not None:
        return re.sub(r"\s", "", found) or None
    named = {re.sub(r"\s", "", match) for match in label.findall(text)}
    return named.pop() if len(named) == 1 else None


def _stated_choice(statements: list[str], choice: re.Pattern[str]) -> str | None:
    """The first choice of the last statement that has one; empty where it offers two; None where none has any."""
    for statement in statements:
        if match := choice.search(statement):
            if _offers_another(statement, match.end(), choice):
                return ""
            return next(group for group in match.groups() if group)
    return None


def _offers_another(statement: str, end: int, answer: re.Pattern[str]) -> bool:
    """Whether "or" and a second answer follow: a text that hedges states no answer."""
    joined = _OR.match(statement, end)
    return joined is not None and answer.match(statement, joined.end()) is not None
