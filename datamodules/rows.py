"""Raw rows and what is asked of them: every error names file, row and column."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Row = dict[str, Any]


class DataError(ValueError):
    """Bad input data; the message names where it is and what to do."""


@dataclass(frozen=True)
class Columns:
    """What a row must have.

    Attributes:
        text: Columns with non-empty text.
        optional: Columns with text that may be empty or absent; they become `""`.
        answer: Column of a short answer, text or number, kept as text; None where the rows have none.
        needs_answer: Whether a row without an answer is an error.
    """

    text: tuple[str, ...] = ("instruction", "output")
    optional: tuple[str, ...] = ("input",)
    answer: str | None = "answer"
    needs_answer: bool = False


@dataclass
class Rows:
    """Raw rows and where each one stands.

    Attributes:
        source: The path or hub id that was asked for.
        rows: One dict per row.
        places: For each row its file and "line" or "row", and its number from 1.
    """

    source: str
    rows: list[Row] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """The place of row `i` for a message: `train.jsonl, line 7`."""
        label, number = self.places[i]
        return f"{label} {number}"

    def subset(self, indices: Sequence[int]) -> Rows:
        return Rows(self.source, [self.rows[i] for i in indices], [self.places[i] for i in indices])


def check_rows(rows: Rows, columns: Columns) -> Rows:
    """The same rows with exactly the columns asked for, all of them text.

    Raises:
        DataError: A column is missing, has another type, or is empty where it must not be.
    """
    checked = [_check_row(row, i, rows, columns) for i, row in enumerate(rows.rows)]
    return Rows(rows.source, checked, rows.places)


def converted(rows: Rows, convert: Callable[[Row, str], Row]) -> Rows:
    """Each row as `convert` makes it, which is told where the row stands."""
    return Rows(rows.source, [convert(row, rows.where(i)) for i, row in enumerate(rows.rows)], rows.places)


def get_text(row: Row, name: str, where: str) -> str:
    """The text in a column of a raw row.

    Raises:
        DataError: There is no such column, or something else in it.
    """
    value = _get(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}, column {name!r} is {describe(value)}; it must be text")
    return value


def drop_empty(rows: Rows, columns: Columns) -> Rows:
    """The rows without those whose required text is blank."""
    keep = [i for i, row in enumerate(rows.rows) if not any(_is_blank(row.get(name)) for name in columns.text)]
    return rows if len(keep) == len(rows) else rows.subset(keep)


def question_key(text: str) -> str:
    """Letters and digits of a question in lower case: the same for copies that differ in spacing or punctuation."""
    return "".join(filter(str.isalnum, text.lower()))


def split_rows(size: int, val_size: int, seed: int, max_samples: int | None = None) -> tuple[list[int], list[int]]:
    """Row numbers for training and validation, each ascending; the held-out ones depend on (size, val_size, seed) only.

    Raises:
        DataError: Nothing is left to train on.
    """
    if val_size >= size:
        raise DataError(
            f"val_size {val_size} leaves nothing of {size} rows to train on: set --data.val_size below {size}"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[val_size:][:max_samples]), sorted(order[:val_size])


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _check_row(row: Row, i: int, rows: Rows, columns: Columns) -> Row:
    out = {}
    for name in columns.text:
        value = get_text(row, name, rows.where(i))
        if _is_blank(value):
            raise DataError(
                f"{rows.where(i)}, column {name!r} is empty ({value!r}): fill it in, remove the row, or set "
                "--data.skip_empty true"
            )
        out[name] = value
    for name in columns.optional:
        given = row.get(name)
        if given is not None and not isinstance(given, str):
            raise DataError(f"{rows.where(i)}, column {name!r} is {describe(given)}; it must be text, or left out")
        out[name] = given or ""
    if columns.answer is not None:
        if columns.needs_answer:
            _get(row, columns.answer, rows.where(i))
        out[columns.answer] = _answer(row.get(columns.answer), i, rows, columns)
    return out


def _get(row: Row, name: str, where: str) -> Any:
    if name not in row:
        raise DataError(
            f"{where} has no column {name!r}; it has: {', '.join(map(repr, row)) or 'none'}. Add or rename the column"
        )
    return row[name]


def _answer(value: Any, i: int, rows: Rows, columns: Columns) -> str:
    """Answers come as text or number, mixed in one file; parquet writes a missing number as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or _is_blank(value):
        if columns.needs_answer:
            raise DataError(
                f"{rows.where(i)}, column {columns.answer!r} is empty ({value!r}): a test row needs its answer"
            )
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise DataError(f"{rows.where(i)}, column {columns.answer!r} is {describe(value)}; it must be text or a number")
    return str(value)


def describe(value: Any) -> str:
    """`a number (3)`: a value's kind in the reader's words, and the value."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)} ({short(repr(value))})"


def short(text: str, limit: int = 80) -> str:
    """The beginning of a long text, for a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
