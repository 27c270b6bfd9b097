"""Real data sets, file by file: every row is read and tokenised, and the page that says so is up to date.

The files and their rows stand in benchmarks/real_data.py.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, write_sums
from transformers import AutoTokenizer

from lift_lightning.datamodules import GSM8KDataModule, Math10KDataModule, SFTDataModule
from lift_lightning.datamodules.rows import DataError
from lift_lightning.datamodules.sources import read_text
from lift_lightning.evaluation.perplexity import perplexity
from lift_lightning.evaluation.tasks import get_task

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_data.py"
DATA, MODEL = os.environ.get("LIFT_DATA_DIR"), os.environ.get("LIFT_SMOLLM2_DIR")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


real_data = load()
PAGE = real_data.PAGE.read_text(encoding="utf-8")
needs_data = pytest.mark.skipif(not DATA, reason="LIFT_DATA_DIR is not set")


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's where it is given, else one token per byte with the marks of a chat, which s1K needs."""
    if MODEL:
        return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    found = byte_tokenizer()
    found.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return found


def count(path: Path) -> int:
    """Rows of a file, counted without any of our readers."""
    if path.suffix == ".json":
        return len(json.loads(path.read_bytes()))
    if path.suffix == ".txt":
        return 1
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    has_header = path.suffix == ".tsv" and path.parent.name != "CoLA"
    return sum(bool(line.strip()) for line in content.split(b"\n")) - has_header


# ---------------------------------------------------------------- the real files


@pytest.mark.realdata
@needs_data
def test_every_file_is_in_the_table():
    there = {str(path.relative_to(DATA)) for path in Path(DATA).rglob("*") if path.is_file()}
    assert {file.path for file in real_data.FILES} == there
    assert len(real_data.FILES) == len(there)


@pytest.mark.realdata
@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("file", real_data.FILES, ids=lambda file: file.path)
def test_a_file_has_the_rows_that_are_stated(file, tokenizer, tmp_path: Path):
    lengths = file.read(f"{DATA}/{file.path}", tokenizer, str(tmp_path))
    assert len(lengths) == file.rows == count(Path(DATA) / file.path)
    # Every row became tokens, but for those whose output is empty, which Math10KDataModule was told to leave out.
    assert lengths.count(0) == (3 if file.path.endswith("math_data.json") else 0)
    if MODEL:
        assert real_data.line(file, lengths) in PAGE, "run `python benchmarks/real_data.py`"


@pytest.mark.realdata
@needs_data
def test_the_leaked_file_is_refused_unless_asked_for(tmp_path: Path):
    path = f"{DATA}/llm_adapters/math_data.json"
    with pytest.raises(DataError, match="allow_leaked"):
        real_data.training_rows(path, byte_tokenizer(), str(tmp_path), cls=Math10KDataModule)
    with pytest.raises(DataError, match=r"row 176, column 'output' is empty.*skip_empty"):
        real_data.training_rows(path, byte_tokenizer(), str(tmp_path), cls=Math10KDataModule, allow_leaked=True)


class Clueless(torch.nn.Module):
    """Every token of the byte tokenizer is as likely as any other."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 259))


@pytest.mark.realdata
@needs_data
# Published are 217,646 and 245,569 tokens, in which the end of each of the 3,760 and 4,358 lines is one.
@pytest.mark.parametrize(("name", "words"), [("valid", 217_646 - 3_760), ("test", 245_569 - 4_358)])
def test_perplexity_takes_the_whole_of_wikitext(name: str, words: int):
    path = Path(f"{DATA}/wikitext2/{name}.txt")
    found = perplexity(Clueless(), byte_tokenizer(), read_text(path), window=16384, stride=8192)
    assert (found.tokens, found.words) == (path.stat().st_size, words)  # a BOS stands before the first byte
    assert found.token == pytest.approx(259)


# ---------------------------------------------------------------- without them


def test_rows_are_those_of_the_tasks():
    assert {name: get_task(name).samples for name in real_data.TESTS} == real_data.TESTS


def test_the_page_has_the_files_of_the_table():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(real_data.FILES)
    for file, row in zip(real_data.FILES, rows, strict=True):
        stated = f"{file.rows:,}" + (" (3 of them empty)" if file.path.endswith("math_data.json") else "")
        assert row.startswith(f"| `{file.path}` | `{file.by}` | {file.used} | {stated} | ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file for each way of reading one."""
    write_sums(tmp_path / "train.json", rows=3)
    for name, answer in (("good", "#### 1,024"), ("bad", "#### four")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "How many?", "answer": f"So.\n{answer}"}))
    (tmp_path / "CoLA").mkdir()
    for name, lines in (("train", "a\t1\t\tGood.\na\t0\t*\tBad is.\n"), ("dev", "a\t1\t\tGood.\n")):
        (tmp_path / f"CoLA/{name}.tsv").write_text(lines)
    problem = {"task_id": "HumanEval/0", "prompt": "def f():\n\n", "test": "", "entry_point": "f"}
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))
    (tmp_path / "t.txt").write_text("Ünder ground\n", encoding="utf-8")
    (tmp_path / "seeds.jsonl").write_text(
        json.dumps({"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}]})
    )
    return tmp_path


def test_the_table_of_a_small_folder(folder: Path):
    files = [
        real_data._training("train.json", 3, SFTDataModule),
        real_data._training("seeds.jsonl", 1, real_data.SeedTasks),
        real_data._test("good.jsonl", 1, "gsm8k", GSM8KDataModule),
        *real_data._glue("CoLA", "cola", 2, 1),
        real_data.File("h.jsonl.gz", 1, "humaneval", real_data.problems, "test"),
        real_data.File("t.txt", 1, "perplexity", real_data.text, "one text"),
    ]
    files[3:5] = [real_data.File(f.path.removeprefix("glue/"), f.rows, f.by, f.read, f.used) for f in files[3:5]]
    head, _, *rows = real_data.table(str(folder), byte_tokenizer(), files).splitlines()
    assert head == "| file | read by | as | rows | tokens | mean | longest |"
    assert rows[0].startswith("| `train.json` | `SFTDataModule` | training | 3 | ")
    # BOS, then one token per byte; the examples to train on end in EOS.
    prompt = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    prompt += "\n\n### Instruction:\n\n\n### Response:\n"
    seed = 1 + len(prompt) + len("Add.") + len("### Input:\n1, 2\n\n") + len("3") + 1
    assert rows[1:] == [
        f"| `seeds.jsonl` | `SeedTasks` | training | 1 | {seed} |  |  |",
        f"| `good.jsonl` | `GSM8KDataModule, task gsm8k` | test | 1 | {1 + len(prompt) + len('How many?')} |  |  |",
        "| `CoLA/train.tsv` | `GLUEDataModule, task cola` | training | 2 | 14 | 7.0 | 8 |",
        "| `CoLA/dev.tsv` | `GLUEDataModule, task cola` | validation | 1 | 6 |  |  |",
        "| `h.jsonl.gz` | `humaneval` | test | 1 | 10 |  |  |",
        "| `t.txt` | `perplexity` | one text | 1 | 15 |  |  |",
    ]


def test_a_row_that_is_left_out_is_shown():
    file = real_data.File("a.json", 3, "SFTDataModule", real_data.text)
    assert real_data.line(file, [3, 4, 0]).endswith("| 3 (1 of them empty) | 7 | 3.5 | 4 |")


def test_an_answer_that_the_task_cannot_have_is_found(folder: Path):
    with pytest.raises(ValueError, match="gold answer must be a number, got 'four'"):
        real_data.test_rows(str(folder / "bad.jsonl"), byte_tokenizer(), str(folder), cls=GSM8KDataModule, task="gsm8k")


def test_it_says_which_variables_to_set(monkeypatch: pytest.MonkeyPatch):
    for name in ("LIFT_DATA_DIR", "LIFT_SMOLLM2_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="set LIFT_DATA_DIR and LIFT_SMOLLM2_DIR"):
        real_data.main()
