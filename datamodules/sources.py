"""Where rows come from: a file, a folder, a URL, or the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lift_lightning.datamodules.rows import DataError, Row, Rows, describe, short

EXTENSIONS = (".json", ".jsonl", ".parquet", ".csv")
# A path that ends in one of these is a file's, even if a hub id may look the same.
FILE_EXTENSIONS = (*EXTENSIONS, ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Commits on the hub of datasets that are named in this package, taken where no revision is asked for.
REVISIONS = {
    "Idavidrein/gpqa": "90b8e5be2b1d3d2dbfe016cdab47981150600c4a",
    "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "openai/openai_humaneval": "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    "simplescaling/s1K": "278d72baaa2b887a7e76a70a0ae254a5a45536e4",
    "tatsu-lab/alpaca": "dce01c9b08f87459cf36a430d809084718273017",
}


def read_rows(
    path: str,
    split: str = "train",
    *,
    revision: str | None = None,
    subset: str | None = None,
    option: str = "--data.path",
) -> Rows:
    """All rows of a file, a folder, a URL or a dataset on the hub.

    A path that exists, or that can only be a local one (`looks_local`), is never looked up on the hub.

    Args:
        path: `.json` (a list of objects), `.jsonl`, `.parquet`, `.csv` (names in its first line), a folder with one of
            these, the http(s) address of such a file, or a hub id.
        split: Name of the split: which file of a folder, which split on the hub.
        revision: Branch, tag or commit on the hub; None for the commit of `REVISIONS`, if it is there.
        subset: Configuration of a dataset on the hub that has several.
        option: Command line option that sets the path, for messages.

    Raises:
        DataError: Nothing there, not readable, empty, or not rows.
    """
    local = Path(path).expanduser()
    if is_url(path):
        _check_suffix(Path(path), option)
        rows = _read_files(path, [(path, _download(path, option))])
    elif local.exists() or looks_local(path):
        rows = _read_files(path, [(str(file), file) for file in find_files(local, split, option)])
    else:
        rows = _read_hub(path, split, revision, subset, option)
    if not rows.rows:
        raise DataError(f"{path} has no rows: give {option} a file with at least one")
    return rows


def _read_files(source: str, files: list[tuple[str, Path]]) -> Rows:
    """The rows of files, each with the name that says what is in it; a download has another in its cache."""
    rows = Rows(source)
    for name, file in files:
        suffix = Path(name).suffix.lower()
        for number, row in _READERS[suffix](file):
            rows.rows.append(row)
            rows.places.append((f"{name}, {_UNITS.get(suffix, 'row')}", number))
    return rows


def is_url(path: str) -> bool:
    """Whether a path is the address of a file on the web."""
    return path.startswith(("http://", "https://"))


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
        _check_suffix(path, option)
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


def _check_suffix(path: Path, option: str) -> None:
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(
            f"{path} has the extension {path.suffix!r}; {option} reads {', '.join(EXTENSIONS)}: convert the file or "
            "rename it"
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
                f"{file}, line {number} is not JSON at column {err.colno}: {err.msg}: {short(line)}. Repair or "
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


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    lines = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        for number, row in enumerate(lines, start=1):
            if None in row or None in row.values():
                count = len(lines.fieldnames or ())
                raise DataError(f"{file}, row {number} does not have the {count} fields of the first line: correct it")
            yield number, row
    except csv.Error as err:
        raise DataError(f"{file} is not CSV after line {lines.line_num}: {err}. Write it again") from err


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
_UNITS = {".jsonl": "line"}  # what a place is counted in, where it is not rows


def _download(url: str, option: str) -> Path:
    """The file, from the cache of Hugging Face datasets if it has been there before."""
    import datasets

    try:
        return Path(datasets.DownloadManager().download(url))
    except Exception as err:  # offline, not found, no such host: the client raises many kinds
        reason = (str(err).splitlines() or [""])[0]
        raise DataError(
            f"cannot download {url}: {type(err).__name__}: {reason}. Download it by other means, and give {option} the "
            "local file"
        ) from err


def _read_hub(path: str, split: str, revision: str | None, subset: str | None, option: str) -> Rows:
    import datasets

    named = {} if subset is None else {"name": subset}
    if revision is None and (revision := REVISIONS.get(path)) is None:
        rank_zero_info(f"{path} is taken from the hub as it is today: name a commit to get the same rows tomorrow")
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
