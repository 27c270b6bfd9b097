"""Published layouts of questions, as rows with instruction, output and answer; rows that have these stay."""

from __future__ import annotations

import random
import re

from lift_lightning.datamodules.rows import DataError, Row, get_text

_CALCULATION = re.compile(r"<<[^<>]*>>")


def from_gsm8k(row: Row, where: str) -> Row:
    """Question, worked answer, and the number that it ends in (`#### N`), without the marks for a calculator."""
    if "question" not in row:
        return row
    worked, mark, number = get_text(row, "answer", where).rpartition("####")
    if not mark:
        raise DataError(f"{where}, column 'answer' does not end in '#### N', as those of GSM8K do: correct it")
    worked, number = _CALCULATION.sub("", worked).strip(), number.strip()
    return {
        "instruction": row["question"],
        "output": f"{worked}\n#### {number}",
        "answer": number.replace(",", ""),
    }


_TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}


def from_strategyqa(row: Row, where: str) -> Row:
    """A question of yes or no, asked and answered as those of boolq are."""
    if "question" not in row:
        return row
    answer = _TRUTH.get(str(row.get("answer")).strip().lower())
    if answer is None:
        raise DataError(f"{where}, column 'answer' is {row.get('answer')!r}; it must be true or false, or yes or no")
    question = get_text(row, "question", where)
    return {
        "instruction": f"Please answer the following question with true or false, question: {question}\n\n"
        "Answer format: true/false",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


_CHOICES = "ABCD"
_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def from_gpqa(row: Row, where: str, seed: int) -> Row:
    """A question of GPQA with its four choices in an order that seed and question decide, and the right one's letter.

    Args:
        row: with `Question`, `Correct Answer` and `Incorrect Answer 1` to 3.
        where: it stands, for messages.
        seed: of the order.
    """
    if "Question" not in row:
        return row
    question = get_text(row, "Question", where).strip()
    choices = [get_text(row, name, where).strip() for name in ("Correct Answer", *_WRONG)]
    # Of the question too: a row keeps its order when others are left out.
    order = random.Random(f"{seed} {question}").sample(range(4), 4)
    listed = "\n".join(f"{letter}) {choices[i]}" for letter, i in zip(_CHOICES, order, strict=True))
    instruction = (
        f"{question}\n\n{listed}\n\nExactly one of the four choices is right. Reason as long as you need to, then end "
        "with a line that has only the word Answer, a colon and the letter of your choice."
    )
    return {"instruction": instruction, "answer": _CHOICES[order.index(0)]}
