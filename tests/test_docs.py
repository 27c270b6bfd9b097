"""What the documentation tells a reader to do works, and the site that shows it builds.

Every fenced block of README.md, CONTRIBUTING.md and docs/ has one of these languages; none means `shell`:

- `python`: the blocks of a page run in order, in one namespace, in an empty folder with a small model and its rows.
- `shell`: each command is run (`python main.py ...`, made small), looked up (`make ...`, examples, the quickstart), or
  has its place and its reason in NOT_RUN.
- `yaml`: settings that the command line takes on top of configs/math10k.yaml, its objects made. `json`: parsed.
- `text`, `bibtex`: what a reader sees or copies. A command does not belong there.

A block with a title, as in ```` ```json title="rows.json" ````, is a file: it is there for the blocks after it. Names
in PLACEHOLDERS stand for what a reader has. Options that the text mentions (`lift.rank`) must exist, as must relative
links of pages outside the site.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from tiny import write_sums

from lift_lightning import cli
from lift_lightning.evaluation.tasks import ARITHMETIC, COMMONSENSE, LLM_ADAPTERS

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs/math10k.yaml"
needs_mkdocs = pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned MkDocs packages need Python 3.11")

# What stands for something of the reader's, and what it is here: names in FIXTURES, or code of PRELUDE.
PLACEHOLDERS = {
    "path/to/a/model": "MODEL",
    "path/to/rows.json": "ROWS",
    "path/to/gsm8k.json": "GSM8K",
    "path/to/own_questions.json": "QUESTIONS",
    "path/to/LLM-Adapters/dataset": "TESTS",
    "path/to/text.txt": "TEXT",
    # Of the hub, in commands and in the configurations that they name.
    "meta-llama/Llama-3.2-1B": "MODEL",
    "meta-llama/Meta-Llama-3-8B": "MODEL",
    f"{LLM_ADAPTERS}/ft-training_set/math_10k.json": "ROWS",
    # Of python blocks.
    "class YourModule(lightning.LightningModule):": "class YourModule(SmallModule):",
}
# Sizes of python blocks, so that they end in a second.
SMALLER = {
    "max_steps=1000": "max_steps=3, accelerator='cpu', devices=1, logger=False, enable_progress_bar=False",
    "interval=200, rank=128, lra_rank=128": "interval=2, rank=2, lra_rank=3",
}
# Run before the first python block of each page.
PRELUDE = """
import lightning, torch

class SmallModule(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8))

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

your_data = torch.utils.data.DataLoader(torch.randn(32, 16), batch_size=4)
"""
# Commands that are neither run nor looked up, and why.
NOT_RUN = {
    "git clone <this repository> && cd lift-lightning": "needs a network; there is no address in it",
    "export LIFT_SMOLLM2_DIR=/path/to/SmolLM2-135M": "names a folder of the reader's",
    "python main.py consolidate --ckpt_path runs/70b/step=400.ckpt --output runs/70b/step=400-whole.ckpt": (
        "tests/test_distributed.py makes such a folder and consolidates it"
    ),
    "python main.py test --config configs/math10k.yaml --model.model_name_or_path SmolLM2-135M-Instruct "
    "--model.num_beams 1 --data.test_limit 200 --data.eval_batch_size 32 --data.test_path '[AddSub/test.json,"
    "MultiArith/test.json,gsm8k/test.json,boolq/test.json,ARC-Easy/test.json,openbookqa/test.json]' "
    "--trainer.accelerator cpu --trainer.precision 32-true": "needs the test sets and a real model, and an hour",
    "python main.py perplexity --model_name_or_path SmolLM2-135M-Instruct --path wikitext2/test.txt "
    "--output perplexity.json --max_tokens 20000": "needs the text and a real model",
    "python main.py humaneval --model_name_or_path path/to/a/model --path path/to/HumanEval.jsonl.gz "
    "--output humaneval --allow_code_execution true": "tests/test_humaneval.py runs it where the machine allows it",
    "python main.py sweep --option lift.rank --values '[16, 32, 64, 128, 256]' --output runs/ranks -- "
    "--config configs/math10k.yaml --data.test_suite arithmetic --data.test_path path/to/LLM-Adapters/dataset": (
        "tests/test_sweep.py runs a smaller one"
    ),
    "python main.py sweep --option lift.rank --values '[16, 32, 64, 128, 256]' --output runs/cola-ranks "
    "--metric val_matthews -- --config configs/glue.yaml --data.task cola": "needs GLUE",
    "python3 -m venv lm-eval-env": "makes an environment for another program",
    "lm-eval-env/bin/pip install 'lm_eval[hf]==0.4.13'": "needs a network",
    "lm-eval-env/bin/lm_eval run --model hf --model_args pretrained=my-model,dtype=float32 --include_path "
    "examples/lm_eval --tasks llm_adapters_addsub,llm_adapters_boolq --metadata "
    "llm_adapters=path/to/LLM-Adapters/dataset --device cpu --batch_size 16 --limit 100 --log_samples --output_path "
    "lm-eval-results": "needs another program; tests/test_lm_eval.py reads its tasks",
    "torchrun --nproc-per-node 2 examples/plug_in_fsdp2.py": "tests/test_examples.py runs it",
    "python main.py delta merge --inputs '[my-delta, other-delta]' --output both --overlap mean": (
        "needs a second delta; tests/test_delta_commands.py merges"
    ),
    "python main.py delta push --delta my-delta --repo_id user/name": "tests/test_delta_format.py pushes, to no hub",
    "bash benchmarks/merge_deltas.sh": "needs a real model and its rows, and half an hour",
    "pip install -c constraints.txt -e .": "changes the environment of the tests; tests/test_packaging.py installs",
}
NOT_RUN |= {
    "python -m benchmarks.studies.page": "writes into the repository; tests/test_studies.py checks what it writes",
    "python -m benchmarks.studies.toy": "takes some minutes, and what was run is not run again",
    "python -m benchmarks.studies.random_matrices": "takes a quarter of an hour",
    "python -m benchmarks.studies.perturbation": "needs a real model and its data, and an hour",
    "python -m benchmarks.studies.learning --jobs 2": "takes hours; tests/test_studies.py makes one run",
    "python -m benchmarks.studies.memory": "needs a real model; tests/test_analysis_memory.py measures too",
}
# Of docs/glue.md: they need GLUE, or models of the hub. tests/test_glue.py runs such commands on rows made there.
NOT_RUN |= dict.fromkeys(
    (
        "python main.py fit --config configs/glue.yaml --data.task cola",
        "python main.py fit --config configs/glue.yaml --data.task rte --trainer.max_epochs 10 "
        "--data.path path/to/RTE --model.model_name_or_path path/to/a/model",
        "python main.py fit --config configs/glue.yaml --trainer.accelerator cpu --data.task sst2 --data.path "
        "path/to/SST-2 --model.model_name_or_path path/to/SmolLM2-135M --lift.rank 16 --lift.lra_rank 16 "
        "--lift.interval 20 --data.max_samples 1024 --trainer.max_epochs 1 --model.lr 1e-3",
    ),
    "needs GLUE",
)
# make X is looked up in the Makefile, and not run: the tests are among its targets.

TITLE = re.compile(r'title="([^"]+)"')
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMANDS = ("python ", "lift-lightning ", "make ", "pip ", "git ", "$ ")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str | None
    body: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = TITLE.search(rest)
        body = textwrap.dedent(match["body"])
        line = text[: match.start()].count("\n") + 1
        found.append(Block(page, line, language or "shell", title and title[1], body))
    return found


def commands(block: Block) -> list[str]:
    """Continued lines joined, comments and prompts taken away."""
    joined = re.sub(r"\\\n\s*", "", block.body)
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if line and not line.startswith("#")]


PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
WITH_BLOCKS = sorted({block.page for block in BLOCKS})


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------- what pages run in


@pytest.fixture(scope="session")
def things(tiny_model_dir: Path, sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What PLACEHOLDERS stand for."""
    folder = tmp_path_factory.mktemp("things")
    gsm8k = write_sums(folder / "gsm8k.json", rows=3, seed=5)
    questions = write_sums(folder / "own_questions.json", rows=3, seed=6)
    for task in (*ARITHMETIC, *COMMONSENSE):
        (folder / f"tests/{task.folder}").mkdir(parents=True)
        row = {"instruction": f"{task.name}?", "answer": task.labels[0] if task.labels else 4}
        (folder / f"tests/{task.folder}/test.json").write_text(json.dumps([row]))
    (folder / "text.txt").write_text("A text of some length. " * 20)
    found = {"MODEL": tiny_model_dir, "ROWS": sums_file, "GSM8K": gsm8k, "QUESTIONS": questions}
    return {name: str(path) for name, path in {**found, "TESTS": folder / "tests", "TEXT": folder / "text.txt"}.items()}


def fill_in(text: str, things: dict[str, str]) -> str:
    for name, thing in PLACEHOLDERS.items():
        text = text.replace(name, things.get(thing, thing))
    return text


def filled_in(value: Any, things: dict[str, str]) -> Any:
    """The same for the texts in a setting: a list or mapping of files."""
    return yaml.safe_load(fill_in(yaml.safe_dump(value), things))


@pytest.fixture(scope="session")
def finished_run(things: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which configs/math10k.yaml has been run: what pages on resuming, testing and exporting begin from."""
    folder = tmp_path_factory.mktemp("finished")
    with inside(folder):
        run_command("python main.py fit --config configs/math10k.yaml", things)
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In a folder with the repository's files, whose modules can be imported; paths and modules come back after."""
    for name in ("configs", "examples", "docs", "Makefile"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    here, argv, modules, before = Path.cwd(), list(sys.argv), set(sys.modules), os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(folder))
    try:
        os.chdir(folder)
        yield
    finally:
        os.chdir(here)
        sys.path.remove(str(folder))
        sys.argv[:] = argv
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


# ---------------------------------------------------------------- commands


@cache
def generator() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate_reference
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return generate_reference


def parsed(args: list[str]) -> dict[str, Any]:
    """The settings of a command, as a nested dict."""
    parser = generator().command_line_parser(subcommands=True)
    found = parser.parse_args(args)
    return found[found.subcommand].as_dict()


def smaller(settings: dict[str, Any], things: dict[str, str]) -> dict[str, Any]:
    """Overrides that make any configuration run in a second, with what is there of models and rows."""
    lift = {"lra_rank": 6, "interval": 2}
    if settings["lift"]["density"] is None:
        lift["rank"] = 4
    callbacks = settings["trainer"]["callbacks"] or []
    for callback in callbacks:
        if callback["class_path"].endswith("Checkpoint") and callback["init_args"]["every_n_train_steps"]:
            callback["init_args"]["every_n_train_steps"] = 1
    data = settings["data"]["init_args"]
    sizes = {"val_size": min(data["val_size"], 4), "batch_size": min(data["batch_size"], 4), "test_limit": 3}
    given = {name: filled_in(data[name], things) for name in ("path", "test_path") if name in data}
    return {
        "model": {
            "model_name_or_path": filled_in(settings["model"]["model_name_or_path"], things),
            "num_beams": 1,
            "max_new_tokens": 3,
        },
        "lift": lift,
        "data": {"init_args": {**given, **sizes, "max_length": 512, "max_samples": 16, "cache_dir": "cache"}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": callbacks,
        },
    }


def run_command(command: str, things: dict[str, str]) -> None:
    """A command of `python main.py`, in this process, as the dispatcher runs it."""
    words = [fill_in(word, things) for word in shlex.split(command)]
    args = words[2:] if words[0] == "python" else words[1:]
    if args[0] not in ("export", "predict", "perplexity", "delta", "analyze") and "--help" not in args:
        fit = ["fit" if args[0] in ("run", "data") else args[0], *args[1:]]
        settings = parsed([word for word in fit if word != "--print_config"])
        Path("smaller.yaml").write_text(yaml.safe_dump(smaller(settings, things)), encoding="utf-8")
        args = [*args, "--config", "smaller.yaml"]
        if "--print_config" in args:
            args = [*(word for word in args if word != "--print_config"), "--print_config"]
    sys.argv = ["lift-lightning", *args]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(f"{command!r} ended with status {stop.code}") from stop


def check_command(command: str, things: dict[str, str]) -> None:
    """Run a command or look it up; whatever is neither run nor listed fails."""
    if command in NOT_RUN:
        return
    words = shlex.split(command)
    if "configs/strategies/" in command:
        parsed(words[2:])  # tests/test_distributed.py runs the strategies, in processes of their own
    elif words[:2] == ["python", "main.py"] or words[0] == "lift-lightning":
        run_command(command, things)
    elif words[0] == "make":
        check_make(words[1:])
    elif words[0] == "python" and Path(words[1]).parent.name in ("examples", "benchmarks"):
        assert (ROOT / words[1]).is_file()  # tests/test_examples.py runs them
    elif words[:2] == ["python", "-m"] and words[2].startswith("lift_lightning.quickstart"):
        assert find_spec(words[2])  # its own tests run it; options are those of `fit`, beside its own
        overrides = [f"{a}={b}" for a, b in pairwise(words) if re.match(r"--(model|lift|data|trainer)\.", a)]
        parsed(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *overrides])
    elif words[0] == "python" and words[1].startswith("docs/"):
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        pytest.fail(f"{command!r} is neither run nor listed in NOT_RUN")


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {name!r}"


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=ids)
# Small matrices have no rank of 32: the choice of a rank is not what a page is tested for.
@pytest.mark.filterwarnings("ignore:the rank of the approximation, .* is not below")
def test_what_a_page_shows_works(page: Path, things: dict[str, str], finished_run: Path, tmp_path: Path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    namespace: dict[str, Any] = {}
    with inside(tmp_path):
        exec(PRELUDE, namespace)
        for block in blocks(page):
            try:
                check_block(block, namespace, things)
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                raise AssertionError(f"{block.place} ({block.language}): {type(error).__name__}: {error}") from error


def check_block(block: Block, namespace: dict[str, Any], things: dict[str, str]) -> None:
    if block.title:
        Path(block.title).write_text(fill_in(block.body, things), encoding="utf-8")
    if block.language == "shell":
        for command in commands(block):
            check_command(command, things)
    elif block.language == "python":
        source = fill_in(block.body, things)
        for large, small in SMALLER.items():
            source = source.replace(large, small)
        exec(compile(source, block.place, "exec"), namespace)
    elif block.language == "yaml":
        Path("block.yaml").write_text(block.body, encoding="utf-8")
        # Made, not parsed only: what a callback refuses is found then.
        files = ["--config", str(BASE), "--config", "block.yaml"]
        cli.lightning_cli([*files, "--trainer.accelerator", "cpu"], run=False)
    elif block.language == "json":
        json.loads(block.body)
    else:
        assert block.language in ("text", "bibtex"), f"{block.language!r} is none of the languages that are checked"
        found = [line for line in block.body.splitlines() if line.strip().startswith(COMMANDS)]
        assert not found, f"a command in a block of output: {found[0]!r}; make it a block of its own"


def test_the_tables_hold_nothing_that_no_page_has():
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES) + BASE.read_text(encoding="utf-8")
    texts += "".join(file.read_text(encoding="utf-8") for file in (ROOT / "configs/models").glob("*.yaml"))
    assert [name for name in [*PLACEHOLDERS, *SMALLER] if name not in texts] == []
    shown = {command for block in BLOCKS if block.language == "shell" for command in commands(block)}
    assert sorted(set(NOT_RUN) - shown) == []


def test_options_that_the_text_mentions_exist():
    found = generator()
    known = {option.name for name in ("model", "lift", "trainer") for option in found.section(name)}
    known |= {option.name for kind in found.data_modules().values() for option in found.data_options(kind)} | {
        "data.class_path"
    }
    unknown = []
    for page in PAGES:
        for code in CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if (match := re.match(r"(--)?((?:model|lift|data|trainer)\.[a-z_]+)($|[ :=])", code)) and (
                match[2] not in known
            ):
                unknown.append(f"{page.relative_to(ROOT)}: {code}")
    assert unknown == []


def test_commands_in_the_text_exist(capsys):
    for page in PAGES:
        for code in CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if code.startswith("make ") and "…" not in code:
                check_make(shlex.split(code)[1:])
            elif re.match(r"(python main\.py|lift-lightning) [a-z]", code):
                command = code.removeprefix("python main.py ").removeprefix("lift-lightning ").split()[0]
                assert command in cli.USAGE.split(), f"{page.relative_to(ROOT)}: {code}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(name: str):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


# ---------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize(
    ("language", "body", "message"),
    [
        ("shell", "rm -rf everything", "neither run nor listed"),
        ("shell", "make nothing", "no 'nothing'"),
        ("shell", "python main.py fit --config configs/math10k.yaml --lift.rang 4", "^2$"),
        ("yaml", "lift: {rang: 4}", "^2$"),
        ("json", "{", "Expecting"),
        ("text", "python main.py fit", "a command in a block of output"),
        ("rust", "", "none of the languages"),
    ],
)
def test_what_is_wrong_on_a_page_is_found(language, body, message, things, tmp_path, capsys):
    block = Block(ROOT / "README.md", 1, language, None, body)
    with inside(tmp_path), pytest.raises((Exception, SystemExit, pytest.fail.Exception), match=message):
        check_block(block, {}, things)


# ---------------------------------------------------------------- the site


def test_the_tables_of_options_are_those_of_the_code():
    found = generator()
    by_name = {option.name: option for option in found.section("lift")}
    assert by_name["lift.interval"].default == "200"
    assert by_name["lift.keep"].kind == "`largest`, `smallest`"
    assert by_name["lift.lra_rank"].text.startswith("R, the rank of the approximation.")
    assert by_name["lift.block"].kind == "[integer, integer] or `null`"
    (name, *_) = found.section("model")
    assert (name.name, name.default) == ("model.model_name_or_path", "")
    assert all(option.text for section in ("model", "lift") for option in found.section(section))
    assert all(option.text for kind in found.data_modules().values() for option in found.data_options(kind))
    assert {option.name for option in found.export_options()} >= {"ckpt_path", "output"}
    with pytest.raises(KeyError):
        found.fill_in("<!-- options: nothing -->")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: what is not logged does not count as a warning, and --strict lets a broken link pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@needs_mkdocs
def test_the_site_builds_and_has_every_page_and_option(site: Path):
    for page in PAGES[2:]:
        built = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (built.with_stem("index") if page.stem == "README" else built).is_file()
    text = (site / "reference/configuration.html").read_text(encoding="utf-8")
    for option in ("model.accumulate_grad_batches", "lift.lra_rank", "data.allow_leaked", "trainer.precision"):
        assert option in text
    assert "<!-- options" not in text
    assert 'id="lift_lightning.callbacks.MaskRefreshCallback"' in (site / "reference/python.html").read_text(
        encoding="utf-8"
    )
    assert not list(site.rglob("*.py"))


@needs_mkdocs
def test_the_site_loads_nothing_from_elsewhere(site: Path):
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]*\ssrc="(https?:)?//|<link[^>]*rel="stylesheet"[^>]*"https?://'
    )
    assert [str(page) for page in site.rglob("*.html") if loads.search(page.read_text(encoding="utf-8"))] == []
    styles = [
        page for page in site.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", page.read_text(encoding="utf-8"))
    ]
    assert styles == []
