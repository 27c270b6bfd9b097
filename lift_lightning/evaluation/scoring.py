"""Two rules that read an answer out of a model's text.

Rule `paper` is the one that the LIFT paper's figures were made with (the evaluation code of LLM-Adapters); it exists
for comparison and keeps that code's faults: "The Answer is B" reads as A, "10-5" as -5, and any number at the end of
the text counts. Rule `strict` reads the number, letter or label that the text states as its answer, and nothing where
it states none. Both are reported.
"""

from __future__ import annotations

import math
import re
from typing import Literal, TypedDict, get_args

from lift_lightning.evaluation.tasks import Task

Rule = Literal["paper", "strict"]
Answer = float | str | None

# |gold - answer| up to which two numbers are the same (LLM-Adapters, evaluate.py).
TOLERANCE = 1e-3


class Score(TypedDict):
    """The answers read from one prediction, None where a rule finds none, and whether each is right."""

    paper_answer: Answer
    strict_answer: Answer
    paper: bool
    strict: bool


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
    """The first letter anywhere, inside words too; labels in lower case. A task may have a cue instead."""
    if task.cue:
        found = re.findall(task.cue, text)
        return found[-1] if found else None
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
