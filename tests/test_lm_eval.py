"""The tasks for lm-evaluation-harness ask and score as the package does. The harness itself is not needed."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
import yaml
from test_scoring import LABELS, NUMBERS
from tiny import byte_tokenizer

from lift_lightning.evaluation.scoring import TOLERANCE, score
from lift_lightning.evaluation.tasks import Task, get_task
from lift_lightning.prompts import encode_prompt, render_prompt

FOLDER = Path(__file__).parents[1] / "examples/lm_eval"
TASKS = [(FOLDER / "addsub.yaml", get_task("addsub")), (FOLDER / "boolq.yaml", get_task("boolq"))]
both = pytest.mark.parametrize(("file", "task"), TASKS, ids=[task.name for _, task in TASKS])


@cache
def functions() -> ModuleType:
    """The module beside the tasks."""
    spec = importlib.util.spec_from_file_location("lm_eval_functions", FOLDER / "llm_adapters.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as the harness does."""


def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, _, name = node.value.rpartition(".")
    assert module == "llm_adapters"
    return getattr(functions(), name)


Loader.add_constructor("!function", function)


def load(file: Path) -> dict[str, Any]:
    """A task; its own keys replace those of the file that it includes."""
    found = yaml.load(file.read_text(encoding="utf-8"), Loader)
    return {**load(file.parent / found.pop("include")), **found} if "include" in found else found


def read(file: Path, text: str) -> Any:
    """The answer that the task's filter reads from a text, the first of one."""
    (rule,) = load(file)["filter_list"]
    read, first = rule["filter"]
    assert (rule["name"], read["function"], first) == ("paper", "custom", {"function": "take_first"})
    ((answer,),) = read["filter_fn"]([[text]], [{}])
    return answer


def is_right(file: Path, text: str, gold: str) -> bool:
    found = load(file)["process_results"]({"answer": gold}, [read(file, text)])
    assert found in ({"acc": 0.0}, {"acc": 1.0})
    return bool(found["acc"])


@both
@pytest.mark.parametrize("text", ["", "  \n", "3 + 1", "two\nlines\n", "{{ no }} {% template %}", "<a> & 'b'"])
def test_the_prompt_is_ours(file: Path, task: Task, text: str) -> None:
    # The environment that the harness renders in: a line break at the end stays.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(load(file)["doc_to_text"])
    assert template.render(instruction="Add.", input=text) == render_prompt("Add.", text)
    assert template.render(instruction=f" Add {text} ", input="") == render_prompt(f" Add {text} ")


@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_left_to_itself_gives_our_ids(bos: bool) -> None:
    """The harness calls the tokenizer with its defaults, so that it puts a BOS in front by itself, or none."""
    tokenizer = byte_tokenizer(bos=bos)
    prompt = render_prompt("Add.", "3 + 1")
    assert tokenizer(prompt).input_ids == encode_prompt(tokenizer, prompt)
    assert (tokenizer.bos_token_id is not None) == bos


@both
def test_a_completion_ends_where_ours_does(file: Path, task: Task) -> None:
    found = load(file)
    assert found["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": task.max_new_tokens}
    assert found["metadata"] == {"version": task.version}
    assert found["dataset_kwargs"] == {"folder": task.folder}
    assert found["task"] == f"llm_adapters_{task.name}"


@pytest.mark.parametrize("text", [text for text, _, _ in NUMBERS])
@pytest.mark.parametrize("gold", ["4", "1,234.5", "-5"])
def test_numbers_are_read_by_rule_paper(text: str, gold: str) -> None:
    file, task = TASKS[0]
    ours = score(task, text, gold)
    assert read(file, text) == ours["paper_answer"]
    assert is_right(file, text, gold) == ours["paper"]


@pytest.mark.parametrize("text", [text for _, text, _, _ in LABELS])
@pytest.mark.parametrize("gold", ["true", "False "])
def test_labels_are_read_by_rule_paper(text: str, gold: str) -> None:
    file, task = TASKS[1]
    ours = score(task, text, gold)
    assert read(file, text) == ours["paper_answer"]
    assert is_right(file, text, gold) == ours["paper"]


@pytest.mark.parametrize("text", ["4.001", "3.999", "4.0011", "3.9989", "none"])
def test_numbers_are_right_within_a_thousandth(text: str) -> None:
    file, task = TASKS[0]
    assert functions().TOLERANCE == TOLERANCE
    assert is_right(file, text, "4") == score(task, text, "4")["paper"]


@both
def test_rows_are_those_of_the_file(file: Path, task: Task, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "b", "output": "c", "answer": 4}, {"instruction": "d", "answer": "4.5"}]
    (tmp_path / task.folder).mkdir()
    (tmp_path / task.folder / "test.json").write_text(json.dumps(rows))
    found = load(file)
    # The harness hands over the model's arguments and the task's metadata too.
    splits = found["custom_dataset"](
        **{"pretrained": "my-model", **found["metadata"], "llm_adapters": str(tmp_path)}, **found["dataset_kwargs"]
    )
    assert splits[found["test_split"]].to_list() == [
        {"instruction": "a", "input": "b", "answer": "4"},
        {"instruction": "d", "input": "", "answer": "4.5"},
    ]


def test_without_a_folder_of_test_sets_the_option_is_named() -> None:
    with pytest.raises(ValueError, match="add --metadata llm_adapters=<folder>"):
        functions().read_rows("AddSub")
