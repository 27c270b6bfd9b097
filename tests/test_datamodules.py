import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import byte_tokenizer
from transformers import AutoTokenizer

import lift_lightning.datamodules.base as base
import lift_lightning.datamodules.math10k as math10k
import lift_lightning.datamodules.tokenise as tokenise
from lift_lightning.datamodules import Math10KDataModule, SFTDataModule
from lift_lightning.datamodules.rows import DataError, question_key
from lift_lightning.prompts import encode_prompt, render_prompt


def row(i, output=None):
    return {"instruction": f"Q{i}?", "input": "", "output": f"{i}!" if output is None else output, "answer": i}


@pytest.fixture
def make(tmp_path):
    """Write rows to a file and make a datamodule on it."""

    def make(rows=12, *, cls=Math10KDataModule, tokenizer=None, name="train.json", **options):
        path = tmp_path / name
        path.write_text(json.dumps(rows if isinstance(rows, list) else [row(i) for i in range(rows)]))
        options = {"val_size": 2, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
        return cls(str(path), tokenizer or byte_tokenizer(), **options)

    return make


@pytest.fixture
def test_file(tmp_path):
    def write(rows, task="AddSub"):
        (tmp_path / task).mkdir(exist_ok=True)
        path = tmp_path / task / "test.json"
        path.write_text(json.dumps(rows))
        return str(path)

    return write


def raises(*parts):
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts))


def targets(dataset):
    """Row numbers of examples whose target is `<i>!` and EOS (id 2)."""
    tokenizer = byte_tokenizer()
    return [int(tokenizer.decode([t for t in labels if t not in (-100, 2)])[:-1]) for labels in dataset["labels"]]


def test_the_bare_name_is_refused():
    # `import datamodules` from the repository root would load a second copy of every class.
    root = Path(math10k.__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", "import datamodules"], cwd=root, capture_output=True, text=True)
    assert "import lift_lightning.datamodules" in run.stderr


def test_batches_and_split(make):
    data = make()
    data.setup("fit")
    train, val = targets(data.train_dataset), targets(data.val_dataset)
    assert sorted(train + val) == list(range(12))
    assert len(val) == 2
    batch = next(iter(data.train_dataloader()))
    assert {name: (tensor.shape[0], tensor.dtype) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (4, torch.int64)
    )
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader())] == [3, 1]
    again = make(batch_size=3, max_length=200, tokenizer=byte_tokenizer(bos=False))
    again.setup("fit")
    assert targets(again.val_dataset) == val  # the same rows whatever the model and the batch


def test_ids_of_an_example(make):
    tokenizer = byte_tokenizer()
    data = make([row(0), row(1)], val_size=0)
    data.setup("fit")
    prompt = encode_prompt(tokenizer, render_prompt("Q0?"))
    assert prompt[0] == 1
    target = [18, 3, 2]  # "0" is 48 - 33 + 3, "!" is 3, EOS is 2
    assert data.train_dataset[0]["input_ids"] == prompt + target
    assert data.train_dataset[0]["labels"] == [-100] * len(prompt) + target


def test_max_samples_and_seed(make):
    whole, few, other = make(), make(max_samples=3), make(seed=44)
    for data in (whole, few, other):
        data.setup("fit")
    assert targets(few.val_dataset) == targets(whole.val_dataset) != targets(other.val_dataset)
    assert len(few.train_dataset) == 3
    assert set(targets(few.train_dataset)) < set(targets(whole.train_dataset))


def test_no_validation(make):
    data = make(val_size=0)
    data.setup("fit")
    assert len(data.train_dataset) == 12
    assert data.val_dataloader() == []


def test_to_example_can_be_overridden(make):
    class Loud(SFTDataModule):
        def to_example(self, row):
            return row["instruction"].upper(), row["output"]

    data = make(cls=Loud)
    data.setup("fit")
    assert byte_tokenizer().decode(data.train_dataset[0]["input_ids"]).startswith("<s>Q0?0!")


def test_tokenises_once(make, monkeypatch):
    calls = []
    encode = base.encode_example

    def counted(*args):
        calls.append(args)
        return encode(*args)

    monkeypatch.setattr(base, "encode_example", counted)

    def tokenised(*args, **options):
        calls.clear()
        data = make(*args, **options)
        data.setup("fit")
        data.setup("fit")
        return len(calls), data.report

    count, report = tokenised()
    assert count == 12
    # Another process with the same content, and a split that uses the same rows: from the cache, with the same report.
    assert tokenised() == (0, report)
    assert tokenised(name="copy.json", seed=5, batch_size=1, num_workers=1)[0] == 0
    assert tokenised(max_length=300)[0] == 12
    assert tokenised(tokenizer=byte_tokenizer(bos=False))[0] == 12
    assert tokenised([*map(row, range(11)), row(11, "new")])[0] == 12
    monkeypatch.setattr(tokenise, "PROMPT_VERSION", -1)
    assert tokenised()[0] == 12


def test_default_cache(make, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    make(cache_dir=None).setup("fit")
    assert [path.suffix for path in (tmp_path / "hf/lift_lightning").iterdir()] == [".arrow"]


def test_report(make, caplog):
    prompt = len(encode_prompt(byte_tokenizer(), render_prompt("Q0?")))
    long = {**row(3), "instruction": "Q" * 200}
    rows = [row(0), row(1, "x" * 50), row(2, " "), long]
    data = make(rows, val_size=0, max_length=prompt + 5, skip_empty=True)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        data.setup("fit")
    # Row 0 takes prompt + 3, row 1 is cut at prompt + 5, row 2 is empty, row 3 has no room for a label.
    report = data.report
    assert (report.rows, report.train, report.val) == (3, 2, 0)
    assert (report.truncated, report.dropped, report.empty) == (1, 1, 1)
    assert report.longest == (prompt - 3 + 200) + 3
    assert (report.tokens, report.label_tokens) == (2 * prompt + 8, 8)
    said = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(said) == 1
    assert "1 rows dropped with no label left, 1 empty rows skipped" in said[0]


def test_pad_token(make, caplog):
    with caplog.at_level(logging.INFO):
        data = make(tokenizer=byte_tokenizer(pad=False))
        data.setup("fit")
    assert data.pad_token_id == 2
    assert "no pad token: padding with its EOS '</s>'" in caplog.text
    data = make(tokenizer=byte_tokenizer(pad=False), pad_token="<pad>")
    data.setup("fit")
    assert data.pad_token_id == 0
    batch = next(iter(make_ready(make(pad_to_multiple_of=64)).train_dataloader()))
    assert batch["input_ids"].shape[1] % 64 == 0


def make_ready(data, stage="fit"):
    data.setup(stage)
    return data


def test_tokenizer_by_name(make, monkeypatch, tiny_model_dir):
    models = pytest.importorskip("lift_lightning.models")
    asked = []
    load = models.load_tokenizer
    monkeypatch.setattr(models, "load_tokenizer", lambda name, revision: asked.append((name, revision)) or load(name))
    data = make_ready(make(tokenizer=str(tiny_model_dir)))
    assert asked == [(str(tiny_model_dir), None)]
    assert next(iter(data.train_dataloader()))["input_ids"][0, 0] == 1


def test_test_batches(make, test_file):
    rows = [{"instruction": f"T{i}?", "input": "x" * i, "answer": i, "output": ""} for i in range(3)]
    paths = [test_file(rows), test_file(rows[:1], "SVAMP")]
    data = make(test_path=paths, eval_batch_size=2, max_length=8)  # max_length is no limit for test prompts
    data.setup("test")
    assert data.train_dataset is None  # a test needs no training data
    assert data.test_tasks == ["AddSub", "SVAMP"]
    loaders = data.test_dataloader()
    assert [len(loader) for loader in loaders] == [2, 1]
    batch = next(iter(loaders[0]))
    assert batch["rows"] == [
        {"index": i, "task": "AddSub", "instruction": f"T{i}?", "input": "x" * i, "answer": str(i)} for i in (2, 1)
    ]  # the longest first
    tokenizer = byte_tokenizer()
    ids = encode_prompt(tokenizer, render_prompt("T1?", "x"))
    padding = batch["input_ids"].shape[1] - len(ids)
    assert padding > 0
    assert batch["input_ids"][1].tolist() == [0] * padding + ids
    assert batch["attention_mask"][1].tolist() == [0] * padding + [1] * len(ids)
    assert make_ready(make(test_path={"mine": paths[0]}, test_limit=1), "test").test_tasks == ["mine"]
    limited = make_ready(make(test_path=paths[0], test_limit=1), "test")
    assert [b["rows"][0]["index"] for b in limited.test_dataloader()[0]] == [0]


def test_overlap_with_a_test_set_is_a_warning(make, test_file):
    rows = [{"instruction": question, "answer": 1} for question in (" q0 ?", "Q1?", "new?")]
    with pytest.warns(UserWarning, match=r"leak: 2 of the 3 questions of the test set AddSub .* \(2 rows\)"):
        make(val_size=0, test_path=test_file(rows)).setup("fit")


def test_leaked_file_by_name(make):
    with raises("math_data.json", "80%", "--data.allow_leaked true"):
        make(name="math_data.json").setup("fit")
    make_ready(make(name="math_data.json", allow_leaked=True))


def test_leaked_file_by_content(make, monkeypatch):
    keys = {math10k.hashlib.sha256(question_key(f"Q{i}?").encode()).hexdigest()[:16] for i in range(3)}
    monkeypatch.setattr(math10k, "LEAKED_QUESTIONS", keys)
    with raises("train.json holds 3 of 3 known test questions", "--data.allow_leaked true"):
        make().setup("fit")
    make_ready(make(allow_leaked=True))
    make_ready(make([row(i) for i in (0, 1, 8, 9)]))  # two are below the limit


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"val_size": 12}, ["val_size 12 leaves nothing of 12 rows", "--data.val_size below 12"]),
        ({"max_length": 20}, ["max_length 20 cuts every target away", "--data.max_length to at least"]),
        ({"rows": [row(0, "")]}, ["train.json, row 1, column 'output' is empty"]),
        ({"pad_token": "<nope>"}, ["no token '<nope>'", "--data.pad_token"]),
        ({"test_path": "no/test.json"}, ["no/test.json", "does not exist", "--data.test_path"]),
    ],
)
def test_setup_raises(make, options, parts):
    with raises(*parts):
        make(**options).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0: set --data.batch_size"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"val_size": -1}, "val_size must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range(make, options, message):
    with raises(message):
        make(**options)


def test_the_length_named_in_the_error_is_enough(make):
    with pytest.raises(DataError) as caught:
        make(max_length=20).setup("fit")
    needed = int(re.search(r"at least (\d+)", str(caught.value))[1])
    make_ready(make(max_length=needed))


def test_tokenizer_errors(make, tmp_path):
    with raises("there is no tokenizer", "--data.tokenizer"):
        Math10KDataModule(str(tmp_path / "x.json")).setup("fit")
    tokenizer = byte_tokenizer(pad=False)
    tokenizer.eos_token = None
    with raises("neither a pad token nor an EOS: set --data.pad_token"):
        make(tokenizer=tokenizer).setup("fit")
    with raises("no EOS token"):
        make(tokenizer=tokenizer, pad_token="<pad>").setup("fit")


def test_use_before_setup(make, test_file):
    data = make(test_path=test_file([{"instruction": "T", "answer": 1}]))
    for use in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
        with pytest.raises(RuntimeError, match="call setup"):
            use()
    with raises("nothing to test on: set --data.test_suite"):
        make().test_dataloader()


def test_the_global_generator_is_left_alone(make, test_file):
    # Dropout draws from it: a datamodule that did too would make a resumed run differ.
    before = torch.get_rng_state()
    data = make_ready(make(test_path=test_file([{"instruction": "T", "answer": 1}])))
    for loader in (data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []
        self.tested = []

    def training_step(self, batch, batch_idx):
        text = byte_tokenizer().batch_decode(batch["input_ids"].tolist(), skip_special_tokens=True)
        self.seen.append([one.split("\n")[-1] for one in text])
        return self.layer(batch["labels"][:, :1].float()).mean()

    def validation_step(self, batch, batch_idx):
        return self.layer(batch["labels"][:, :1].float()).mean()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.tested += [(dataloader_idx, one["task"], one["index"]) for one in batch["rows"]]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def trainer(folder, **options):
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", callbacks=[checkpoint], **quiet, **options)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_the_whole_run_saw(make, tmp_path, workers):
    def fit(folder, ckpt_path=None, **options):
        module = Recorder()
        trainer(folder, max_epochs=3).fit(module, datamodule=make(num_workers=workers, **options), ckpt_path=ckpt_path)
        return module.seen

    whole = fit(tmp_path / "a")
    assert len(whole) == 9  # 10 rows in batches of 4, three epochs
    for step in (1, 3, 4) if workers else range(1, 9):
        assert fit(tmp_path / f"b{step}", tmp_path / f"a/step={step}.ckpt") == whole[step:], f"after step {step}"
    # Stopped at the last batch of the first epoch, and again in the middle of the second.
    assert fit(tmp_path / "c", tmp_path / "b3/step=5.ckpt") == whole[5:]
    with pytest.raises(ValueError, match="samples_per_global_batch was 4, is 5"):
        fit(tmp_path / "d", tmp_path / "a/step=1.ckpt", batch_size=5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trainer_test(make, test_file, tmp_path):
    rows = [{"instruction": f"T{i}", "answer": i} for i in range(3)]
    module = Recorder()
    trainer(tmp_path).test(module, make(test_path=[test_file(rows), test_file(rows[:1], "SVAMP")]), verbose=False)
    assert module.tested == [(0, "AddSub", 0), (0, "AddSub", 1), (0, "AddSub", 2), (1, "SVAMP", 0)]


DATA_DIR = Path(os.environ.get("LIFT_DATA_DIR", ""))
needs_data = pytest.mark.skipif("LIFT_DATA_DIR" not in os.environ, reason="LIFT_DATA_DIR is not set")
needs_model = pytest.mark.skipif("LIFT_SMOLLM2_DIR" not in os.environ, reason="LIFT_SMOLLM2_DIR is not set")


@pytest.mark.realdata
@needs_data
def test_real_leaked_file(make, tmp_path):
    leaked = json.loads((DATA_DIR / "llm_adapters/math_data.json").read_text())
    for rows in (leaked, leaked[::3]):  # under another name, and only a third of it
        with raises("train.json holds", "known test questions of GSM8K and AQuA"):
            make(rows).setup("fit")
    with raises("math_data.json has the name"):
        Math10KDataModule(str(DATA_DIR / "llm_adapters/math_data.json"), byte_tokenizer()).setup("fit")


@pytest.mark.realdata
@needs_data
@needs_model
def test_real_rows_and_tokenizer(tmp_path):
    data = Math10KDataModule(
        str(DATA_DIR / "math_gsm8k_train.json"),
        AutoTokenizer.from_pretrained(os.environ["LIFT_SMOLLM2_DIR"]),
        test_path=str(DATA_DIR / "llm_adapters/AddSub/test.json"),
        cache_dir=str(tmp_path),
    )
    data.setup()
    assert (data.report.train, data.report.val, data.report.truncated, data.report.dropped) == (7373, 100, 0, 0)
    assert data.report.longest == 496
    assert data.test_tasks == ["AddSub"]
    assert sum(len(batch["rows"]) for batch in data.test_dataloader()[0]) == 395
