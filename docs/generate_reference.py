"""What of the reference is made from the code when the site is built; a hook of MkDocs, see mkdocs.yml.

On a page, `<!-- options: SECTION -->` becomes the table of that section's options: names, types, defaults and
explanations as the parser of the command line has them, which takes them from signatures and docstrings. Nothing of it
is stored, so nothing of it can be stale. `python docs/generate_reference.py` prints every table.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lift_lightning import datamodules
from lift_lightning.cli import LiftCLI, lightning_cli
from lift_lightning.datamodules import FineTuningDataModule
from lift_lightning.datamodules.sources import REVISIONS
from lift_lightning.evaluation.tasks import LLM_ADAPTERS_REVISION, TASKS
from lift_lightning.export import export

ROOT = Path(__file__).parents[1]
PACKAGE_COPY = ROOT / ".cache/docs"  # mkdocs.yml names it too
SENTENCE_END = re.compile(r"(?<=\.) (?=[A-Z])")
MARKER = re.compile(r"^<!-- options: (.+) -->$", re.MULTILINE)

WORDS = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", NoneType: "`null`"}


class Option(NamedTuple):
    """One setting.

    Attributes:
        name: as it is typed, without the dashes.
        kind: its type in words.
        default: as YAML; empty where a value must be given.
        text: its explanation.
    """

    name: str
    kind: str
    default: str
    text: str


class _ParserIsReady(Exception):
    """Raised instead of parsing, with the parser."""


class _ParserOnly(LiftCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _ParserIsReady(parser)


@cache
def command_line_parser(*, subcommands: bool = False) -> LightningArgumentParser:
    """The parser of the command line, which has parsed nothing: of the settings alone, or with the subcommands."""
    try:
        lightning_cli([], run=subcommands, cli=_ParserOnly)
    except _ParserIsReady as ready:
        return ready.args[0]
    raise AssertionError("LightningCLI did not come to parse")


def section(name: str) -> list[Option]:
    """The options of `model`, `lift` or `trainer`."""
    return _options(command_line_parser(), lambda option: option.startswith(f"{name}."))


def command_options(command: str) -> list[Option]:
    """What a command takes beside the sections. The explanations are Lightning's, and of these the beginning."""
    subparsers = command_line_parser(subcommands=True)._subcommands_action.choices
    found = _options(subparsers[command], lambda option: "." not in option and option != "data")
    return [option._replace(text=" ".join(SENTENCE_END.split(option.text)[:2])) for option in found]


def data_options(kind: type[FineTuningDataModule]) -> list[Option]:
    """The options of one DataModule, its parents' included."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    return _options(parser, lambda option: option.startswith("data."))


def data_modules() -> dict[str, type[FineTuningDataModule]]:
    """By class path: the bases first, then what there is for single datasets, and what configurations name."""
    kinds = [getattr(datamodules, name) for name in datamodules.__all__]
    bases = {kind for kind in kinds if any(kind in other.__mro__[1:] for other in kinds)}
    kinds.sort(key=lambda kind: (kind not in bases, len(kind.__mro__) if kind in bases else 0, kind.__name__))
    paths = [f"{datamodules.__name__}.{kind.__name__}" for kind in kinds]
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        paths.append(yaml.safe_load(file.read_text(encoding="utf-8")).get("data", {}).get("class_path", paths[0]))
    return {path: getattr(import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths}


def export_options() -> list[Option]:
    """The options of `export`."""
    parser = ArgumentParser()
    parser.add_function_arguments(export, as_positional=False)
    return _options(parser, lambda option: True)


def _options(parser: ArgumentParser, wanted: Callable[[str], bool]) -> list[Option]:
    found = []
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help") or not wanted(action.dest):
            continue
        text = " ".join((action.help or "").split()).replace("``", "`")  # Lightning's own are in RST
        default = "" if action.required else _yaml(action.default)
        found.append(Option(action.dest, _in_words(hint), default, text))
    return found


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        *first, last = (_in_words(part) for part in arguments)
        return f"{', '.join(first)} or {last}"
    if origin is list:
        return f"list of {_in_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_in_words(arguments[0])} to {_in_words(arguments[1])}"
    if origin is tuple:
        return f"[{', '.join(_in_words(part) for part in arguments)}]"
    return WORDS.get(hint) or f"`{getattr(hint, '__name__', hint)}`"


def _yaml(value: Any) -> str:
    """As in a configuration file, on one line."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def table(options: list[Option]) -> str:
    """Markdown, one row for each option."""
    lines = ["| option | default | type and explanation |", "|---|---|---|"]
    for option in options:
        default = f"`{option.default}`" if option.default else "must be given"
        cells = (f"`{option.name}`", default, f"{option.kind}<br>{option.text}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def data_tables() -> str:
    """The base in full; of each other DataModule what it adds to, or changes of, the one that it is made of."""
    modules = data_modules()
    (base_path, base), *others = modules.items()
    parts = [_summary(base_path, base), table(data_options(base))]
    for path, kind in others:
        parent = next(other for other in kind.__mro__[1:] if other in modules.values())
        known = {option[:3] for option in data_options(parent)}  # another wording of the explanation is no other option
        changed = [option for option in data_options(kind) if option[:3] not in known]
        parts += [f"### {kind.__name__}", _summary(path, kind)]
        heading = f"The options of `{parent.__name__}`, with these added or changed:"
        parts += [heading, table(changed)] if changed else [f"The options of `{parent.__name__}`."]
    return "\n\n".join(parts)


def _summary(path: str, kind: type) -> str:
    """The docstring up to its sections, which are in the tables."""
    lines = (kind.__doc__ or "").split("\n    Args:")[0].splitlines()
    return f"`data.class_path: {path}`\n\n" + "\n".join(map(str.strip, lines))


def trainer_names() -> str:
    """The names alone: what they mean is Lightning's to say."""
    return ", ".join(f"`{option.name}`" for option in section("trainer"))


def task_table() -> str:
    """Markdown, one row for each published test set."""
    lines = ["| task | version | answers | rows | limit | source | licence |", "|---|---:|---|---:|---:|---|---|"]
    for task in TASKS.values():
        if task.source is None:
            continue
        answers = f"{task.labels[0]} ... {task.labels[-1]}" if task.labels else f"a {task.kind}"
        where = f"LLM-Adapters `dataset/{task.folder}/test.json`" if task.folder else f"`{task.source.path}`"
        rows = "" if task.samples is None else f"{task.samples:,}"
        cells = (
            f"`{task.name}`",
            str(task.version),
            answers,
            rows,
            f"{task.max_new_tokens:,}",
            where,
            task.source.licence,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commit_table() -> str:
    """Markdown, one row for each dataset whose commit is pinned."""
    pinned = {"AGI-Edgerunners/LLM-Adapters (GitHub)": LLM_ADAPTERS_REVISION, **REVISIONS}
    rows = [f"| `{name}` | `{commit}` |" for name, commit in pinned.items()]
    return "\n".join(["| dataset | commit |", "|---|---|", *rows])


SECTIONS: dict[str, Callable[[], str]] = {
    "model": lambda: table(section("model")),
    "lift": lambda: table(section("lift")),
    "data": data_tables,
    "trainer": trainer_names,
    "tasks": task_table,
    "commits": commit_table,
    "fit": lambda: table(command_options("fit")),
    "export": lambda: table(export_options()),
}


def fill_in(markdown: str) -> str:
    """The page with its markers replaced.

    Raises:
        KeyError: if a marker asks for a section that there is not.
    """
    return MARKER.sub(lambda marker: SECTIONS[marker[1]](), markdown)


def copy_package(target: Path) -> None:
    """Lay the package out as it is installed: the Python reference is read from sources, which lie in four folders."""
    import tomllib  # of Python 3.11, which the site's generator needs too; the tables do not

    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(target, ignore_errors=True)
    for package in mapping:
        source = ROOT / mapping[package]
        for file in source.rglob("*.py"):
            place = target / package.replace(".", "/") / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)


# ---------------------------------------------------------------- MkDocs calls these by name


def on_startup(**_: Any) -> None:
    """Before anything is read; mkdocstrings passes over a folder that is not there when it is configured."""
    copy_package(PACKAGE_COPY)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of one page."""
    return fill_in(markdown)


if __name__ == "__main__":
    print("\n\n".join(f"## {name}\n\n{make()}" for name, make in SECTIONS.items()))
