"""The tasks: what each test set asks for, where it is published, and how its answers look.

A change to how a task asks, reads or scores raises the task's version.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["number", "letter", "label", "exact"]
GenericKind = Literal["number", "exact"]

# The test files that the paper used, as they are at the newest commit of AGI-Edgerunners/LLM-Adapters.
LLM_ADAPTERS_REVISION = "816657208af4db747803f87ba40a4c71383fed7a"
LLM_ADAPTERS = f"https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/{LLM_ADAPTERS_REVISION}"


@dataclass(frozen=True)
class Source:
    """Where a test set is published.

    Attributes:
        path: a URL, or the id of a dataset on the hub.
        licence: as its publisher states it.
        split: on the hub.
        subset: the dataset's configuration on the hub, where there are several.
    """

    path: str
    licence: str
    split: str = "test"
    subset: str | None = None


@dataclass(frozen=True)
class Task:
    """What a test set asks for.

    Attributes:
        name: as it stands in results; lower case for the known tasks.
        version: of the prompt, the extraction and the scoring of this task.
        kind: `number`; `letter`, one of `labels`; `label`, one of `labels` as a word; `exact`, the whole text.
        folder: the task's folder in the LLM-Adapters collection; empty for other tasks.
        labels: the answers that there are, for `letter` and `label`.
        samples: rows of the published test set; None for a file of the user's own.
        source: where it is published; None for a file of the user's own.
        max_new_tokens: where a completion ends that has not ended by itself.
        cue: what rule `paper` looks for, the answer being the group of its last match; empty for the first label
            anywhere in the text.
        confidential: its authors ask that no question be published: questions and completions, which may repeat them,
            are kept out of everything that is written.
    """

    name: str
    version: int
    kind: Kind
    folder: str = ""
    labels: tuple[str, ...] = ()
    samples: int | None = None
    source: Source | None = None
    max_new_tokens: int = 256
    cue: str = ""
    confidential: bool = False


def _of_llm_adapters(folder: str, kind: Kind, samples: int, labels: tuple[str, ...] = ()) -> Task:
    source = Source(f"{LLM_ADAPTERS}/dataset/{folder}/test.json", "ODC-By 1.0")
    # The limits of LLM-Adapters' code: a label needs no reasons.
    limit = 32 if kind == "label" else 256
    return Task(folder.lower(), 1, kind, folder, labels, samples, source, limit)


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))


ARITHMETIC = (
    _of_llm_adapters("MultiArith", "number", 600),
    _of_llm_adapters("gsm8k", "number", 1319),
    _of_llm_adapters("AddSub", "number", 395),
    _of_llm_adapters("AQuA", "letter", 254, tuple("ABCDE")),
    _of_llm_adapters("SingleEq", "number", 508),
    _of_llm_adapters("SVAMP", "number", 1000),
    _of_llm_adapters("mawps", "number", 238),
)
COMMONSENSE = (
    _of_llm_adapters("boolq", "label", 3270, ("true", "false")),
    _of_llm_adapters("piqa", "label", 1838, _numbered("solution", 2)),
    _of_llm_adapters("social_i_qa", "label", 1954, _numbered("answer", 5)),
    _of_llm_adapters("hellaswag", "label", 10042, _numbered("ending", 4)),
    _of_llm_adapters("winogrande", "label", 1267, _numbered("option", 2)),
    _of_llm_adapters("ARC-Easy", "label", 2376, _numbered("answer", 5)),
    _of_llm_adapters("ARC-Challenge", "label", 1172, _numbered("answer", 5)),
    _of_llm_adapters("openbookqa", "label", 500, _numbered("answer", 5)),
)
STRATEGYQA = Task(
    "strategyqa",
    1,
    "label",
    labels=("true", "false"),
    source=Source("ChilleD/StrategyQA", "MIT"),
    max_new_tokens=32,
)
# Rein et al. 2023 (arXiv 2311.12022). The limit is that of s1 (arXiv 2501.19393), whose models think at length.
GPQA_DIAMOND = Task(
    "gpqa-diamond",
    1,
    "letter",
    labels=tuple("ABCD"),
    samples=198,
    source=Source("Idavidrein/gpqa", "CC-BY 4.0", "train", "gpqa_diamond"),
    max_new_tokens=32768,
    cue=r"(?i:answer)[ \t]*:[ \t*]*[$(]?([A-D])\b",
    confidential=True,
)
# Of the bundled model, see lift_lightning/quickstart.
QUICKSTART = (
    Task("quickstart-source", 1, "exact"),
    Task("quickstart-bridge", 1, "number"),
    Task("quickstart-target", 1, "number"),
)
# Tasks that are tested together, and whose mean is reported.
SUITES = {"arithmetic": ARITHMETIC, "commonsense": COMMONSENSE}


def _key(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).lower()


TASKS = {_key(task.name): task for task in (*ARITHMETIC, *COMMONSENSE, STRATEGYQA, GPQA_DIAMOND, *QUICKSTART)}


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


def get_suite(names: str | Sequence[str]) -> list[Task]:
    """The published test sets of suites and single tasks, each once, in the order asked for.

    Args:
        names: of `SUITES`, or of tasks that are published.

    Raises:
        ValueError: if a name is neither.
    """
    found: dict[str, Task] = {}
    for name in [names] if isinstance(names, str) else names:
        task = TASKS.get(_key(name))
        tasks = SUITES.get(_key(name), (task,) if task is not None and task.source is not None else ())
        if not tasks:
            published = ", ".join(task.name for task in TASKS.values() if task.source is not None)
            raise ValueError(f"unknown test suite {name!r}; known are {', '.join(SUITES)} and the tasks {published}")
        found.update((task.name, task) for task in tasks)
    return list(found.values())
