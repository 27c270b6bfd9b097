"""GLUE: the columns of every task, training and validation by them, and rows and measures that must not change."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from tiny import byte_tokenizer, tiny_llama_config
from tokenizers import processors
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from lift_lightning import LiftLightningModule, cli
from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.datamodules import GLUEDataModule
from lift_lightning.datamodules.glue import EncodedSentences, encode_sentences
from lift_lightning.datamodules.rows import DataError
from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.glue import GLUE
from lift_lightning.models import load_model

ROOT = Path(__file__).parents[1]
# Columns of the hub; folder, header and a row of the original TSV with label 1 (STS-B: 3.8), texts A and B.
TASKS = {
    "cola": (["sentence"], "CoLA", None, "gj04\t1\t\tA"),
    "sst2": (["sentence"], "SST-2", "sentence\tlabel", "A\t1"),
    "mrpc": (["sentence1", "sentence2"], "MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tA\tB"),
    "stsb": (
        ["sentence1", "sentence2"],
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t1\tnone\tnone\tA\tB\t3.800",
    ),
    "qqp": (
        ["question1", "question2"],
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\tA\tB\t1",
    ),
    "mnli": (
        ["premise", "hypothesis"],
        "MNLI",
        "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tf\t( A )\t( B )\tA\tB\tentailment\tneutral",
    ),
    "qnli": (["question", "sentence"], "QNLI", "index\tquestion\tsentence\tlabel", "0\tA\tB\tnot_entailment"),
    "rte": (["sentence1", "sentence2"], "RTE", "index\tsentence1\tsentence2\tlabel", "0\tA\tB\tnot_entailment"),
}
EACH = pytest.mark.parametrize("task", TASKS)


def dev_sets(task):
    return ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]


def write_tsv(root, task, lines=None):
    """The original files of a task, every one with the same rows."""
    _, folder, header, row = TASKS[task]
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split in ["train", *dev_sets(task)]:
        text = "\n".join(([header] if header else []) + (lines or [row])) + "\n"
        (root / folder / f"{split}.tsv").write_text(text, encoding="utf-8")
    return root / folder


def hub_rows(task, count):
    """Rows in the columns of the hub, labels in turn."""
    labels = GLUE[task].num_labels
    texts = TASKS[task][0]
    return [
        {**{name: f"{name} {i}" for name in texts}, "label": i % 11 / 2 if labels == 1 else i % labels, "idx": i}
        for i in range(count)
    ]


def write_hub(folder, task, train=8, val=5):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ["train", *(name.replace("dev", "validation") for name in dev_sets(task))]:
        rows = hub_rows(task, train if split == "train" else val)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def make(tmp_path):
    def make(task, path, **options):
        options = {"batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
        return GLUEDataModule(task, str(path), **{"tokenizer": byte_tokenizer(), **options})

    return make


def ready(data, stage="fit"):
    data.setup(stage)
    return data


def raises(*parts):
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def read_ids(ids):
    return byte_tokenizer().decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------- rows


@EACH
def test_original_files(task, make, tmp_path):
    write_tsv(tmp_path, task)
    texts = dict(zip(TASKS[task][0], "AB", strict=False))
    expected = {**texts, "label": 3.8 if task == "stsb" else 1}
    for path in (tmp_path, tmp_path / TASKS[task][1]):  # all of GLUE, and the task alone
        data = make(task, path)
        assert [data.read(split).rows for split in ["train", *data.splits]] == [[expected]] * (1 + len(data.splits))


@EACH
def test_columns_of_the_hub(task, make, tmp_path, monkeypatch):
    data = make(task, write_hub(tmp_path / task, task))
    rows = [{name: value for name, value in row.items() if name != "idx"} for row in hub_rows(task, 8)]
    assert data.read("train").rows == rows
    assert data.read(data.splits[-1]).rows == rows[:5]
    assert make(task, tmp_path).read("train").rows == rows  # a folder with one of the task in it
    asked = []

    def load_dataset(path, *, name, split, revision):
        asked.append((path, name, split, revision))
        return hub_rows(task, 8)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert make(task, "nyu-mll/glue", revision="abc").read("train").rows == rows
    assert asked == [("nyu-mll/glue", task, "train", "abc")]


def test_parquet_of_the_hub(make, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        table = pyarrow.Table.from_pylist(hub_rows("rte", 3))
        pyarrow.parquet.write_table(table, tmp_path / f"rte/{split}-00000-of-00001.parquet")
    assert [row["label"] for row in make("rte", tmp_path).read("validation").rows] == [0, 1, 0]


def test_quotes_are_text(make, tmp_path):
    """csv's own rules joined rows from one lone quote to the next: STS-B lost 38."""
    lines = ['"So it begins\t0', 'a "b" c\t1', 'it ends"\t0']
    rows = make("sst2", write_tsv(tmp_path, "sst2", lines)).read("train").rows
    assert [row["sentence"] for row in rows] == ['"So it begins', 'a "b" c', 'it ends"']


def test_broken_lines_of_qqp_are_left_out_and_counted(make, tmp_path, caplog):
    lines = ["1\t2\t3\tA\tB\t1", "4\t5\t6\tbroken by", "a line end\tC\t0", "7\t8\t9\tD\t\t0"]
    with caplog.at_level(logging.INFO):
        rows = make("qqp", write_tsv(tmp_path, "qqp", lines)).read("train").rows
    assert [row["question1"] for row in rows] == ["A", "D"]
    assert "2 lines left out" in caplog.text


def test_labels_may_be_names_in_any_file(make, tmp_path):
    row = {"premise": "A", "hypothesis": "B", "label": "contradiction"}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    assert make("mnli", tmp_path).read("train").rows[0]["label"] == 2


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("sst2", ["A\t-1"], "train.tsv, line 2, column 'label' is text ('-1'); it must be one of 0, 1 (test sets"),
        ("sst2", ["A\t0.5"], "it must be one of 0, 1"),
        ("rte", ["0\tA\tB\tperhaps"], "it must be one of 0, 1 or entailment, not_entailment"),
        ("stsb", ["0\tg\tf\t2012\t1\tn\tn\tA\tB\t5.1"], "it must be a number from 0 to 5"),
        ("stsb", ["0\tg\tf\t2012\t1\tn\tn\tA\tB\tnan"], "it must be a number from 0 to 5"),
        ("sst2", ["A\t1", "no label"], "train.tsv, line 3 has no column 'sentence': it must have those of sst2"),
        ("cola", ["gj04\t1\t"], "train.tsv, line 1 has no column 3"),
        ("cola", ["gj04\t1\t\t "], "train.tsv, line 1 has no text"),
    ],
)
def test_rows_that_are_wrong(task, lines, message, make, tmp_path):
    with raises(message):
        make(task, write_tsv(tmp_path, task, lines)).read("train")


def test_what_is_not_there(make, tmp_path):
    with raises("nowhere/at/all does not exist: set --data.path"):
        make("rte", "nowhere/at/all").read("train")
    folder = write_tsv(tmp_path, "rte")
    with raises("train.tsv is a file"):
        make("rte", folder / "train.tsv").read("train")
    (folder / "dev.tsv").unlink()
    # The reader of other data would take the only file that there is, which is the training set.
    with raises("has neither dev.tsv nor validation.parquet, .jsonl or .json, but train.tsv"):
        make("rte", folder).setup("validate")
    (folder / "train.tsv").write_text(TASKS["rte"][2] + "\n")
    with raises("train.tsv has no rows"):
        make("rte", folder).read("train")
    with raises("task must be one of cola, sst2", "got 'wnli': set --data.task"):
        make("wnli", folder)
    with raises("batch_size must be at least 1, got 0"):
        make("rte", folder, batch_size=0)
    for use in (lambda: make("rte", folder).test_dataloader(), lambda: make("rte", folder).test_tasks):
        with raises("test sets are not public", "use validate"):
            use()


# ---------------------------------------------------------------- ids


def separating_tokenizer():
    """As BERT's: <s> A </s> B </s>."""
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    tokenizer.add_special_tokens({"sep_token": "</s>"})
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_a_pair_with_and_without_a_separator():
    a, b = (byte_tokenizer(bos=False)(text).input_ids for text in "AB")
    found = encode_sentences(separating_tokenizer(), ["A", "B"], 1.0, 99)
    assert found == EncodedSentences([1, *a, 2, *b, 2], [0, 0, 0, 1, 1], 5, 1.0)
    found = encode_sentences(byte_tokenizer(), ["A", "B"], 0.0, 99)
    assert read_ids(found.input_ids) == "A\nB"
    assert found.input_ids.count(1) == 1  # BOS


def test_what_is_too_long_is_cut_and_counted(make, tmp_path, caplog):
    found = encode_sentences(separating_tokenizer(), ["A" * 10, "BB"], 0.0, 9)
    assert (len(found.input_ids), found.full_length) == (9, 15)
    assert found.input_ids[-3:] == [*separating_tokenizer()("BB").input_ids[1:3], 2]  # of the longer one
    lines = ["A\t1", "A" * 30 + "\t0"]
    with caplog.at_level(logging.INFO):
        ready(make("sst2", write_tsv(tmp_path, "sst2", lines), max_length=20))
    assert "sst2, train: 2 rows, longest 31 tokens, 1 cut at max_length 20" in caplog.text


def test_batches(make, tmp_path):
    data = ready(make("rte", write_hub(tmp_path, "rte"), max_samples=6, eval_batch_size=5))
    batch = next(iter(data.train_dataloader()))
    assert {name: (len(value), value.dtype) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (4, torch.int64)
    )
    assert len(data.train_dataset) == 6
    (val,) = data.val_dataloader()
    assert next(iter(val))["labels"].tolist() == [0, 1, 0, 1, 0]  # in the order of the file
    with pytest.raises(RuntimeError, match="call setup"):
        make("rte", tmp_path).val_dataloader()


def test_a_validation_reads_no_training_rows(make, tmp_path):
    folder = write_hub(tmp_path, "rte")
    (folder / "train.jsonl").unlink()
    assert ready(make("rte", folder), "validate").train_dataset is None


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def module(folder, **options):
    return LiftLightningModule(str(folder), **{"task": "sequence_classification", "lr": 1e-2, **options})


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = bool(callbacks)
    refresh = MaskRefreshCallback(interval=2, rank=2, lra_rank=3)
    return Trainer(callbacks=[refresh, *callbacks], **{"max_epochs": 1, **quiet, **options})


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("cola", {"val_matthews"}),
        ("sst2", {"val_accuracy"}),
        ("mrpc", {"val_accuracy", "val_f1"}),
        ("stsb", {"val_pearson", "val_spearman"}),
        ("qqp", {"val_accuracy", "val_f1"}),
        ("mnli", {"val_matched_accuracy", "val_mismatched_accuracy"}),
        ("qnli", {"val_accuracy"}),
        ("rte", {"val_accuracy"}),
    ],
)
def test_fit_logs_the_metrics_of_the_task(task, names, make, model_dir, tmp_path):
    found, run = module(model_dir), trainer()
    run.fit(found, datamodule=make(task, write_hub(tmp_path, task, val=8)))
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val_")}
    assert logged.keys() == names | {"val_loss"}
    assert found.hf_model.score.out_features == GLUE[task].num_labels == found.hparams.num_labels
    assert [len(group["params"]) for group in run.optimizers[0].param_groups if not group["sparse"]] == [1]  # the head
    # By hand, from the model's own answers; both dev sets of MNLI are the same rows here.
    data = run.datamodule
    batches = [batch for batch in data.val_dataloader()[0]]
    found.eval()
    with torch.no_grad():
        inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
        logits = torch.cat([found(**one).logits for one in inputs])
    if task not in ("cola", "stsb"):
        labels = torch.cat([batch["labels"] for batch in batches])
        right = float((logits.argmax(1) == labels).float().mean())
        assert all(value == pytest.approx(right) for name, value in logged.items() if name.endswith("accuracy"))
    elif task == "stsb":
        labels = torch.tensor([label for batch in batches for label in batch["labels"]])
        assert logged["val_pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([logits[:, 0], labels]))[0, 1]))
        assert logged["val_loss"] == pytest.approx(float((logits[:, 0] - labels).square().mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.* densely trained entries are in bf16-true")
def test_targets_of_a_regression_are_not_rounded_by_bf16_true(make, model_dir, tmp_path, monkeypatch):
    seen = []
    add = module(model_dir)._predictions.__class__.add
    monkeypatch.setattr(
        "lift_lightning.module.Predictions.add", lambda self, *args: seen.append(args[1]) or add(self, *args)
    )
    rows = [{"sentence1": f"a{i}", "sentence2": "b", "label": 3.801 + i / 100} for i in range(3)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    trainer(precision="bf16-true").validate(module(model_dir), make("stsb", tmp_path), verbose=False)
    assert torch.equal(torch.cat(seen), torch.tensor([3.801, 3.811, 3.821]))


def test_metrics_can_be_chosen(make, model_dir, tmp_path):
    data = make("sst2", write_hub(tmp_path, "sst2"))
    (logged,) = trainer().validate(module(model_dir, metrics=["f1", "matthews"]), data, verbose=False)
    assert logged.keys() == {"val_loss", "val_f1", "val_matthews"}
    with pytest.raises(ConfigError, match="metrics of 2 labels .* got 'pearson'"):
        trainer().fit(module(model_dir, metrics=["pearson"]), datamodule=data)
    with pytest.raises(ConfigError, match="metrics are of sequence_classification only"):
        module(model_dir, task="causal_lm", metrics=["f1"])


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"num_labels": 2}, {}, "num_labels is 2, and the rows of GLUEDataModule ask for 3"),
        ({"task": "causal_lm"}, {}, "set --model.task sequence_classification"),
        ({}, {"pad_token": "</s>"}, "padded with token 2 and the model takes token 0 .* --data.pad_token '<pad>'"),
    ],
)
def test_contradictions_stop_before_the_training(settings, options, message, make, model_dir, tmp_path):
    data = make("mnli", write_hub(tmp_path, "mnli"), **options)
    with pytest.raises(ConfigError, match=message):
        trainer().fit(module(model_dir, **settings), datamodule=data)


def test_a_resume_within_an_epoch_is_bit_equal(make, model_dir, tmp_path):
    folder = write_hub(tmp_path / "data", "rte", train=14)

    def fit(name, ckpt_path=None):
        torch.manual_seed(1)
        found = module(model_dir)
        saved = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer(saved, max_epochs=2).fit(found, datamodule=make("rte", folder), ckpt_path=ckpt_path)
        return found.state_dict()

    whole = fit("a")
    resumed = fit("b", tmp_path / "a/step=6.ckpt")  # of 4 steps to an epoch
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_an_exported_checkpoint_has_the_labels_of_the_task(make, model_dir, tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    trainer(saved).fit(module(model_dir), datamodule=make("mnli", write_hub(tmp_path / "data", "mnli")))
    cli.export(str(tmp_path / "last.ckpt"), str(tmp_path / "exported"))
    loaded = load_model(tmp_path / "exported", task="sequence_classification")
    assert (loaded.model.config.num_labels, loaded.new_parameters) == (3, [])


def test_deberta(make, tmp_path):
    """The paper's model: its layers are found, pooler and head are new, pairs are told apart."""
    config = DebertaV2Config(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        pooler_hidden_size=32,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=0,
    )
    whole = DebertaV2ForSequenceClassification(config)
    whole.deberta.save_pretrained(tmp_path / "model")
    tokenizer = separating_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    found, run = module(tmp_path / "model"), trainer()
    run.fit(found, datamodule=make("mrpc", write_hub(tmp_path / "data", "mrpc"), tokenizer=tokenizer))
    groups = run.optimizers[0].param_groups
    assert [(group["sparse"], len(group["params"])) for group in groups] == [(True, 2 * 6), (False, 4)]
    assert {name.split(".")[0] for name in found.new_parameters} == {"pooler", "classifier"}


# ---------------------------------------------------------------- several devices, and the command line


@pytest.mark.slow
def test_each_row_counts_once_on_several_ranks(model_dir, tmp_path):
    """Of 5 rows three ranks have two each, one of which must not count."""
    for task in ("mnli", "stsb"):
        write_hub(tmp_path / task, task)
        # With its head, which every process would draw for itself otherwise.
        labels = GLUE[task].num_labels
        torch.manual_seed(3)
        head = load_model(model_dir, task="sequence_classification", num_labels=labels).model
        head.save_pretrained(tmp_path / f"model {labels}")
    expected = validate_with_heads(0, 1, tmp_path)
    for found in run_ranks(validate_with_heads, 3, tmp_path / "ranks", tmp_path):
        for task, metrics in expected.items():
            assert found[task] == pytest.approx(metrics, abs=1e-6), task


def validate_with_heads(rank, ranks, folder):
    found = {}
    for task in ("mnli", "stsb"):
        model = folder / f"model {GLUE[task].num_labels}"
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        run = Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", **quiet)
        options = {"eval_batch_size": 2, "cache_dir": str(folder / f"cache {rank} {ranks}")}
        data = GLUEDataModule(task, str(folder / task), byte_tokenizer(), **options)
        run.validate(module(model), data, verbose=False)
        found[task] = {name: float(value) for name, value in run.callback_metrics.items()}
    return found


@pytest.fixture
def arguments(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_hub(tmp_path / "data", "rte")
    sizes = ["--lift.rank", "2", "--lift.lra_rank", "3", "--trainer.max_steps", "2", "--data.cache_dir", "cache"]
    config = ["--config", str(ROOT / "configs/glue.yaml"), "--data.task", "rte", "--data.path", "data"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return [*config, *sizes, *quiet, "--model.model_name_or_path", str(model_dir)]


def test_the_command_line(arguments, capsys, tmp_path):
    cli.main(["fit", *arguments])
    (checkpoint,) = tmp_path.glob("runs/glue/logs/*/checkpoints/last.ckpt")
    cli.main(["validate", *arguments, "--ckpt_path", str(checkpoint)])
    assert "val_accuracy" in capsys.readouterr().out
    for command, mistake, message in [
        ("test", [], "use validate"),
        ("run", ["--model.task", "causal_lm"], "test sets are not public"),
        ("fit", ["--model.num_labels", "3"], "it follows the data"),
    ]:
        with pytest.raises(SystemExit):
            cli.main([command, *arguments, *mistake])
        assert message in capsys.readouterr().err


def test_data_without_a_class_are_instructions():
    found = cli.lightning_cli(
        ["--model.model_name_or_path", "x", "--data.path", "y", "--trainer.accelerator", "cpu"], run=False
    )
    assert type(found.datamodule).__name__ == "SFTDataModule"


# ---------------------------------------------------------------- real data

DATA_DIR = Path(os.environ.get("LIFT_DATA_DIR", ""))


@pytest.mark.realdata
@pytest.mark.skipif("LIFT_DATA_DIR" not in os.environ, reason="LIFT_DATA_DIR is not set")
@pytest.mark.parametrize(("task", "train", "dev"), [("cola", 8551, 1043), ("sst2", 67349, 872), ("stsb", 5749, 1500)])
def test_real_rows(task, train, dev, make):
    data = make(task, DATA_DIR / "glue")
    assert (len(data.read("train")), len(data.read("validation"))) == (train, dev)
