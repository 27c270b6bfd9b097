"""Test sets: their names, where they lie, and their rows as questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lift_lightning.datamodules.layouts import from_gpqa, from_gsm8k, from_strategyqa
from lift_lightning.datamodules.rows import DataError, Row, Rows, converted
from lift_lightning.datamodules.sources import is_url
from lift_lightning.evaluation.tasks import TASKS, Source, get_suite, get_task, is_known

_SOURCES = {task.source.path: task.source for task in TASKS.values() if task.source is not None}


def source_of(path: str) -> Source:
    """How a published test set is read; of any other, the split `test`."""
    return _SOURCES.get(path, Source(path, ""))


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


def suite_files(suite: str | Sequence[str], place: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    """Task name to path for the published test sets of suites or tasks.

    Args:
        suite: names of suites (`arithmetic`, `commonsense`) or tasks.
        place: a folder, or its address, that has `<folder>/test.json` for each, as `dataset` of LLM-Adapters has; the
            file itself for a single task; None for where each is published.

    Raises:
        DataError: Unknown names, or several places.
    """
    try:
        tasks = get_suite(suite)
    except ValueError as err:
        raise DataError(f"{err}: set --data.test_suite") from None
    if place is None:
        return {task.name: task.source.path for task in tasks if task.source is not None}
    if not isinstance(place, (str, Path)):
        raise DataError(
            f"with test_suite, test_path is the folder of the test sets, got {place!r}: leave one of the two out"
        )
    if is_url(str(place)):
        return {task.name: f"{str(place).rstrip('/')}/{task.folder or task.name}/test.json" for task in tasks}
    if Path(place).suffix and len(tasks) == 1:
        return {tasks[0].name: str(place)}
    return {task.name: str(Path(place) / (task.folder or task.name)) for task in tasks}


def as_questions(name: str, rows: Rows, seed: int) -> Rows:
    """Rows of a known task in its published layout as instruction and answer; others as they are.

    Args:
        name: of the task.
        rows: as they were read.
        seed: of the order of choices, where a task has none of its own.
    """
    if not is_known(name):
        return rows
    task = get_task(name)
    if task.samples not in (None, len(rows)):
        rank_zero_info(
            f"{rows.source} has {len(rows):,} rows, the published test set of {task.name} {task.samples:,}: scores on "
            "the two cannot be compared"
        )
    layouts: dict[str, Callable[[Row, str], Row]] = {
        "gsm8k": from_gsm8k,
        "strategyqa": from_strategyqa,
        "gpqa-diamond": partial(from_gpqa, seed=seed),
    }
    return converted(rows, layouts[task.name]) if task.name in layouts else rows
