"""What is read of real data sets, file by file: rows, and tokens of SmolLM2's tokenizer.

    python benchmarks/real_data.py [--check]

Every file under LIFT_DATA_DIR goes through the data module or the task that is meant for it, whole and with nothing
cut. The table is written into docs/results/real-data.md. With --check nothing is written, and the exit status says
whether the page is up to date. The tokenizer is that of the folder which LIFT_SMOLLM2_DIR names.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lift_lightning.datamodules import (
    AlpacaDataModule,
    Commonsense170KDataModule,
    GLUEDataModule,
    GSM8KDataModule,
    InstructionDataModule,
    Math10KDataModule,
    S1KDataModule,
    SFTDataModule,
)
from lift_lightning.datamodules.rows import Rows, converted
from lift_lightning.datamodules.sources import read_text
from lift_lightning.evaluation.humaneval import read_problems
from lift_lightning.evaluation.scoring import parse_gold
from lift_lightning.evaluation.tasks import get_task
from lift_lightning.prompts import encode_prompt

PAGE = Path(__file__).parents[1] / "docs" / "results" / "real-data.md"
BLOCK = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", re.DOTALL)
UNCUT = 10**6  # no example is as long

# Path of a file, tokenizer and folder for a cache to the tokens of each row, 0 of one that is left out for being empty.
Reader = Callable[[str, Any, str], list[int]]


@dataclass(frozen=True)
class File:
    """A file and what is to be found in it.

    Attributes:
        path: under LIFT_DATA_DIR.
        rows: as its publisher states them, or as they were counted where nothing is stated.
        by: what reads it.
        read: how.
        used: what its rows are made into.
    """

    path: str
    rows: int
    by: str
    read: Reader
    used: str = "training"


# ---------------------------------------------------------------- how files are read


def training_rows(path: str, tokenizer: Any, cache: str, *, cls: type[SFTDataModule], **options: Any) -> list[int]:
    """Prompt, target and end of each row, as `fit` would have them."""
    data = cls(path, tokenizer, val_size=0, max_length=UNCUT, cache_dir=cache, **options)
    data.setup("fit")
    assert data.train_dataset is not None
    assert data.report is not None
    return [*data.train_dataset["full_length"], *[0] * data.report.empty]


def test_rows(path: str, tokenizer: Any, cache: str, *, cls: type[SFTDataModule], task: str) -> list[int]:
    """The prompt of each row, as `test` would have it; every right answer must be one that the task can have."""
    data = cls(path, tokenizer, test_path={task: path}, cache_dir=cache)
    data.setup("test")
    (loader,) = data.test_dataloader()
    lengths = []
    for batch in loader:
        for row in batch["rows"]:
            parse_gold(get_task(task), row["answer"])
        lengths += batch["attention_mask"].sum(dim=1).tolist()
    return lengths


def glue_rows(path: str, tokenizer: Any, cache: str, *, task: Any) -> list[int]:
    """The sentence or the pair of each row."""
    file = Path(path)
    data = GLUEDataModule(task, str(file.parent), tokenizer, max_length=UNCUT, cache_dir=cache)
    is_train = file.stem == "train"
    data.setup("fit" if is_train else "validate")
    dataset = data.train_dataset if is_train else (data.val_datasets or [None])[0]
    assert dataset is not None
    return list(dataset["full_length"])


def problems(path: str, tokenizer: Any, cache: str) -> list[int]:
    """The head of each function."""
    return [len(encode_prompt(tokenizer, problem.prompt.rstrip("\n") + "\n")) for problem in read_problems(path)]


def text(path: str, tokenizer: Any, cache: str) -> list[int]:
    """One text, which `perplexity` takes as a whole."""
    return [len(encode_prompt(tokenizer, read_text(Path(path))))]


class SeedTasks(SFTDataModule):
    """The seed tasks of Alpaca, which have input and output in a list: a data module of one's own."""

    def read(self, path: str, split: Any) -> Rows:
        """The first example of each task."""
        return converted(super().read(path, split), lambda row, where: {**row, **row["instances"][0]})


# ---------------------------------------------------------------- the files


def _training(path: str, rows: int, cls: type[SFTDataModule], **options: Any) -> File:
    return File(path, rows, cls.__name__, partial(training_rows, cls=cls, **options))


def _test(path: str, rows: int, task: str, cls: type[SFTDataModule] = SFTDataModule) -> File:
    return File(
        path, rows, f"{cls.__name__}, task {get_task(task).name}", partial(test_rows, cls=cls, task=task), "test"
    )


def _glue(folder: str, task: str, train: int, dev: int) -> list[File]:
    by, read = f"GLUEDataModule, task {task}", partial(glue_rows, task=task)
    return [
        File(f"glue/{folder}/train.tsv", train, by, read),
        File(f"glue/{folder}/dev.tsv", dev, by, read, "validation"),
    ]


TESTS = {"AddSub": 395, "MultiArith": 600, "SingleEq": 508, "gsm8k": 1319, "AQuA": 254}
TESTS |= {"boolq": 3270, "piqa": 1838, "ARC-Easy": 2376, "ARC-Challenge": 1172, "openbookqa": 500}
TRAINING = {"boolq": 9427, "ARC-Easy": 2251, "ARC-Challenge": 1119, "openbookqa": 4957}
MAWPS = {"instruction_column": "original_text", "output_column": "equation", "answer_column": "ans"}

FILES = [
    _training("math_gsm8k_train.json", 7473, Math10KDataModule),
    # Refused unless it is asked for; three outputs are empty.
    _training("llm_adapters/math_data.json", 3260, Math10KDataModule, allow_leaked=True, skip_empty=True),
    _training("llm_adapters/mawps/trainset.json", 1898, InstructionDataModule, **MAWPS),
    *(_training(f"llm_adapters/{name}/train.json", n, Commonsense170KDataModule) for name, n in TRAINING.items()),
    *(_test(f"llm_adapters/{name}/test.json", n, name) for name, n in TESTS.items()),
    _training("gsm8k/train.jsonl", 7473, GSM8KDataModule),
    _test("gsm8k/test.jsonl", 1319, "gsm8k", GSM8KDataModule),
    _training("alpaca_demo/alpaca_en_demo.json", 999, AlpacaDataModule),
    _training("alpaca_demo/seed_tasks.jsonl", 175, SeedTasks),
    _training("s1k_shape_sample.jsonl", 2, S1KDataModule),
    *_glue("CoLA", "cola", 8551, 1043),
    *_glue("SST-2", "sst2", 67349, 872),
    *_glue("STS-B", "stsb", 5749, 1500),
    File("humaneval/HumanEval.jsonl.gz", 164, "humaneval", problems, "test"),
    File("wikitext2/valid.txt", 1, "perplexity", text, "one text"),
    File("wikitext2/test.txt", 1, "perplexity", text, "one text"),
]


# ---------------------------------------------------------------- the table


def line(file: File, lengths: list[int]) -> str:
    """The file's row of the table."""
    used = [length for length in lengths if length]
    left_out = f" ({len(lengths) - len(used)} of them empty)" if len(used) < len(lengths) else ""
    cells = [f"`{file.path}`", f"`{file.by}`", file.used, f"{len(lengths):,}{left_out}", f"{sum(used):,}"]
    cells += ["", ""] if len(used) == 1 else [f"{sum(used) / len(used):.1f}", f"{max(used):,}"]
    return "| " + " | ".join(cells) + " |"


def table(root: str, tokenizer: Any, files: list[File] = FILES) -> str:
    """In Markdown."""
    lines = ["| file | read by | as | rows | tokens | mean | longest |", "|---|---|---|--:|--:|--:|--:|"]
    with tempfile.TemporaryDirectory() as cache:
        lines += [line(file, file.read(f"{root}/{file.path}", tokenizer, cache)) for file in files]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check the page."""
    import datasets
    from transformers import AutoTokenizer

    names = ("LIFT_DATA_DIR", "LIFT_SMOLLM2_DIR")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise SystemExit(
            f"set {' and '.join(missing)}: LIFT_DATA_DIR is a folder with the files, LIFT_SMOLLM2_DIR one "
            "with SmolLM2-135M-Instruct"
        )
    root, model = (os.environ[name] for name in names)
    datasets.disable_progress_bars()
    found = table(root, AutoTokenizer.from_pretrained(model, local_files_only=True))
    before = PAGE.read_text(encoding="utf-8")
    after = BLOCK.sub(lambda _: f"\n{found}\n", before)
    print(found, end="")
    if "--check" in sys.argv[1:]:
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
