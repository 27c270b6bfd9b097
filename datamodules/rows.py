"""Read and check raw rows from a file, a folder or the Hugging Face hub: every error names file, row and column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

EXTENSIONS = (".json", ".jsonl", ".parquet")
# A path that ends in one of these is a file's, even if a hub id may look the same.
FILE_EXTENSIONS = (*EXTENSIONS, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
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


def read_rows(
    path: str,
    split: str = "train",
    *,
    revision: str | None = None,
    subset: str | None = None,
    option: str = "--data.path",
) -> Rows:
    """All rows of a file, a folder or a dataset on the hub.

    A path that exists, or that can only be a local one (`looks_local`), is never looked up on the hub.

    Args:
        path: `.json` (a list of objects), `.jsonl`, `.parquet`, a folder with one of these, or a hub id.
        split: Name of the split: which file of a folder, which split on the hub.
        revision: Branch, tag or commit on the hub.
        subset: Configuration of a dataset on the hub that has several.
        option: Command line option that sets the path, for messages.

    Raises:
        DataError: Nothing there, not readable, empty, or not rows.
    """
    local = Path(path).expanduser()
    if local.exists() or looks_local(path):
        rows = Rows(path)
        for file in find_files(local, split, option):
            for number, row in _READERS[file.suffix.lower()](file):
                rows.rows.append(row)
                rows.places.append((f"{file}, {'line' if file.suffix.lower() == '.jsonl' else 'row'}", number))
    else:
        rows = _read_hub(path, split, revision, subset, option)
    if not rows.rows:
        raise DataError(f"{path} has no rows: give {option} a file with at least one")
    return rows


def looks_local(path: str) -> bool:
    """Whether a path that need not exist can only be meant as a local one (a hub id is `name` or `owner/name`)."""
    return not HUB_ID.fullmatch(path) or path.lower().endswith(FILE_EXTENSIONS)


def find_files(path: Path, split: str, option: str = "--data.path") -> list[Path]:
    """The data files behind a local path.

    A folder holds `<split>.json`, `.jsonl` or `.parquet`, or the parquet shards `<split>-*.parquet` of a dataset
    downloaded from the hub (there or in `data/`), or a single data file of any name.

    Raises:
        DataError: No such path, an unknown extension, or a folder where the file is not clear.
    """
    known = ", ".join(EXTENSIONS)
    if not path.exists():
        raise DataError(
            f"{path} looks like a local path and does not exist: correct {option} (a hub id is written owner/name)"
        )
    if path.is_file():
        if path.suffix.lower() not in EXTENSIONS:
            raise DataError(
                f"{path} has the extension {path.suffix!r}; {option} reads {known}: convert the file or rename it"
            )
        return [path]
    found = [path / (split + extension) for extension in EXTENSIONS if (path / (split + extension)).is_file()]
    if len(found) == 1:
        return found
    shards = sorted([*path.glob(f"{split}-*.parquet"), *path.glob(f"data/{split}-*.parquet")])
    if not found and shards:
        return shards
    candidates = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
    if not found and len(candidates) == 1:
        return candidates
    there = ", ".join(file.name for file in found or candidates) or "no data file"
    raise DataError(
        f"the folder {path} must hold exactly one of {', '.join(split + extension for extension in EXTENSIONS)}, or a "
        f"single data file ({known}); it holds: {there}. Give {option} the file itself"
    )


def read_text(file: Path) -> str:
    """The text of a file, without a mark of its encoding.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(f"{file} is not UTF-8 (byte {err.start}: {err.reason}): save it as UTF-8") from err


def _read_json(file: Path) -> Iterator[tuple[int, Row]]:
    text = read_text(file)
    if not text.strip():
        raise DataError(f"{file} is empty: it must hold a list of objects")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as err:
        hint = "; one object per line is JSON lines: rename it to .jsonl" if err.msg == "Extra data" else ""
        raise DataError(f"{file} is not JSON at line {err.lineno}, column {err.colno}: {err.msg}{hint}") from err
    if not isinstance(data, list):
        raise DataError(f"{file} holds {describe(data)} at the top; it must be a list of objects, one per row")
    for number, row in enumerate(data, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number} is {describe(row)}; each row must be an object with named columns")
        yield number, row


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    # Not str.splitlines: it also breaks at U+2028 and the like, which JSON strings may hold.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise DataError(
                f"{file}, line {number} is not JSON at column {err.colno}: {err.msg}: {_short(line)}. Repair or "
                "remove the line"
            ) from err
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number} is {describe(row)}; each line must be an object with named columns")
        yield number, row


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as err:
        raise DataError(
            f"{file} is not a readable parquet file: {str(err).splitlines()[0]}. Download or write it again"
        ) from err
    yield from enumerate(table.to_pylist(), start=1)


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_hub(path: str, split: str, revision: str | None, subset: str | None, option: str) -> Rows:
    import datasets

    named = {} if subset is None else {"name": subset}
    try:
        data = datasets.load_dataset(path, split=split, revision=revision, **named)
    except Exception as err:  # the hub client raises many kinds: offline, not found, gated, no such split
        reason = (str(err).splitlines() or [""])[0]
        raise DataError(
            f"cannot load {path!r} (split {split!r}, revision {revision!r}) from the Hugging Face hub, and there is "
            f"no such local file or folder: {type(err).__name__}: {reason}. Without the hub, give a local file: "
            f"{option} /path/to/file.json"
        ) from err
    return Rows(path, list(data), [(f"{path} ({split}), row", i + 1) for i in range(len(data))])


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


def name_tasks(test_path: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    """Task name to path: the folder's name for `<name>/test.json` and for a folder, else the file's stem.

    Raises:
        DataError: Two files with one name.
    """
    if test_path is None:
        return {}
    if isinstance(test_path, dict):
        return {str(name): str(path) for name, path in test_path.items()}
    tasks: dict[str, str] = {}
    for path in [test_path] if isinstance(test_path, (str, Path)) else test_path:
        place = Path(path).expanduser()
        name = place.absolute().parent.name if place.stem == "test" else place.stem if place.suffix else place.name
        if name in tasks:
            raise DataError(
                f"{tasks[name]} and {path} are both called {name!r}: name them with --data.test_path "
                "{name: path, ...}"
            )
        tasks[name] = str(path)
    return tasks


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
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)} ({_short(repr(value))})"


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
