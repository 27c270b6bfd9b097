import json
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lift_lightning.datamodules.rows import (
    Columns,
    DataError,
    Rows,
    check_rows,
    drop_empty,
    question_key,
    split_rows,
)
from lift_lightning.datamodules.sources import REVISIONS, looks_local, read_rows
from lift_lightning.datamodules.suites import name_tasks

ROW = {"instruction": "1+1?", "input": "", "output": "2", "answer": 2}
TEST = Columns(text=("instruction",), optional=("input", "output"), needs_answer=True)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def raises(*parts):
    """`pytest.raises` for a message that has all the parts, in this order."""
    return pytest.raises(DataError, match="(?s)" + ".*".join(re.escape(str(part)) for part in parts))


def test_the_three_formats_agree(tmp_path):
    rows = [ROW, {**ROW, "instruction": "2+2 =\u2028 ü?"}]
    read = [
        read_rows(write(tmp_path / "a.json", rows)),
        read_rows(write(tmp_path / "b.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")),
        read_rows(parquet(tmp_path / "c.parquet", rows)),
    ]
    assert [one.rows for one in read] == [rows] * 3
    assert [one.where(1) for one in read] == [
        f"{tmp_path}/a.json, row 2",
        f"{tmp_path}/b.jsonl, line 2",
        f"{tmp_path}/c.parquet, row 2",
    ]


def test_csv_with_line_breaks_and_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffinstruction,output\r\n"a, ""b""\n\u2028c",2\r\n'.encode())
    assert read_rows(str(path)).rows == [{"instruction": 'a, "b"\n\u2028c', "output": "2"}]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of `tmp_path/site` on a server of this process, and a cache of its own."""
    (tmp_path / "site").mkdir()
    handler = partial(QuietHandler, directory=str(tmp_path / "site"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_an_address(served):
    site, address = served
    write(site / "a.json", [ROW])
    rows = read_rows(f"{address}/a.json")
    assert rows.rows == [ROW]
    assert rows.where(0) == f"{address}/a.json, row 1"
    with raises(f"cannot download {address}/b.json: ", "give --data.path the local file"):
        read_rows(f"{address}/b.json")
    with raises("c.txt has the extension '.txt'"):
        read_rows(f"{address}/c.txt")


def test_an_address_without_a_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with raises("cannot download https://example.invalid/a.json", "give --data.path the local file"):
        read_rows("https://example.invalid/a.json")


def test_byte_order_mark_and_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n" + json.dumps(ROW).encode())
    assert [number for _, number in read_rows(str(path)).places] == [1, 3]


def test_answers_become_text(tmp_path):
    answers = ["7", 7, 7.5, True, None, float("nan"), " "]
    rows = read_rows(write(tmp_path / "a.json", [{**ROW, "answer": answer} for answer in answers]))
    assert [row["answer"] for row in check_rows(rows, Columns()).rows] == ["7", "7", "7.5", "true", "", "", ""]


def test_optional_columns(tmp_path):
    rows = read_rows(write(tmp_path / "a.json", [{"instruction": "1+1?", "output": "2", "input": None, "more": 1}]))
    assert check_rows(rows, Columns()).rows == [{"instruction": "1+1?", "output": "2", "input": "", "answer": ""}]
    assert check_rows(rows, Columns(answer=None)).rows == [{"instruction": "1+1?", "output": "2", "input": ""}]


def test_folders(tmp_path):
    write(tmp_path / "other.json", [])
    write(tmp_path / "train.json", [ROW])
    assert len(read_rows(str(tmp_path))) == 1
    write(tmp_path / "train.jsonl", json.dumps(ROW))
    with raises(tmp_path, "must hold exactly one of train.json", "it holds: train.json, train.jsonl", "--data.path"):
        read_rows(str(tmp_path))


def test_folder_with_a_single_file_of_any_name(tmp_path):
    with raises(tmp_path, "it holds: no data file"):
        read_rows(str(tmp_path))
    write(tmp_path / "math_10k.json", [ROW])
    write(tmp_path / "README.md", "")
    assert len(read_rows(str(tmp_path))) == 1
    write(tmp_path / "more.json", [ROW])
    with raises("it holds: math_10k.json, more.json"):
        read_rows(str(tmp_path))


def test_folder_of_shards_as_the_hub_stores_them(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in (1, 0):
        parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet", [{**ROW, "answer": str(shard)}])
    rows = read_rows(str(tmp_path))
    assert [row["answer"] for row in rows.rows] == ["0", "1"]
    assert rows.where(1).endswith("train-00001-of-00002.parquet, row 1")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("lmms-lab/Math10K", False),
        ("squad", False),
        ("/data/x", True),
        ("./x", True),
        ("../x/y", True),
        ("~/x", True),
        ("a/b/c", True),
        ("train.json", True),
        ("owner/train.jsonl", True),
        ("x/rows.csv", True),
    ],
)
def test_what_looks_local(path, local):
    assert looks_local(path) == local


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("lmms-lab/Math10K", revision="abc")
    assert asked == [("lmms-lab/Math10K", {"split": "train", "revision": "abc"})]
    assert rows.rows == [ROW]
    assert rows.where(0) == "lmms-lab/Math10K (train), row 1"


def test_known_sets_are_taken_at_a_commit(monkeypatch, caplog):
    asked = []

    def load_dataset(path, **options):
        asked.append(options["revision"])
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_rows("openai/gsm8k")
    read_rows("openai/gsm8k", revision="main")
    assert asked == [REVISIONS["openai/gsm8k"], "main"]
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in REVISIONS.values())
    caplog.clear()
    with caplog.at_level("INFO"):
        read_rows("owner/rows")
    assert "owner/rows is taken from the hub as it is today" in caplog.text


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(path, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with raises(
        "'lmms-lab/Math10K'", "no such local file", "ConnectionError: no route", "--data.path /path/to/file.json"
    ):
        read_rows("lmms-lab/Math10K")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.json", "", ["a.json is empty"]),
        ("a.json", [], ["a.json has no rows", "--data.path"]),
        ("a.jsonl", "\n \n", ["a.jsonl has no rows"]),
        ("a.json", '[{"a": 1},\n {"a" 2}]', ["a.json is not JSON at line 2, column 7"]),
        ("a.json", '{"a": 1}\n{"a": 2}', ["a.json is not JSON", "rename it to .jsonl"]),
        ("a.json", {"data": []}, ["a.json holds an object", "it must be a list of objects"]),
        ("a.json", [ROW, "x"], ["a.json, row 2 is text ('x')", "must be an object"]),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1', ["a.jsonl, line 3 is not JSON at column", '{"a": 1', "remove the line"]),
        ("a.jsonl", "[1]", ["a.jsonl, line 1 is a list ([1])"]),
        ("a.parquet", "no", ["a.parquet is not a readable parquet file"]),
        ("a.tsv", "x", ["a.tsv has the extension '.tsv'", ".json, .jsonl, .parquet, .csv"]),
        ("a.csv", "instruction,output\n", ["a.csv has no rows"]),
        ("a.csv", "instruction,output\na,b\na\n", ["a.csv, row 2 does not have the 2 fields of the first line"]),
        ("a.csv", "instruction,output\na,b,c\n", ["a.csv, row 1 does not have the 2 fields"]),
        ("a.csv", 'instruction,output\n"a,b\n', ["a.csv is not CSV after line 1", "Write it again"]),
    ],
)
def test_bad_files(tmp_path, name, content, parts):
    path = write(tmp_path / name, content)
    with raises(*parts):
        read_rows(path)


def test_not_utf8(tmp_path):
    (tmp_path / "a.json").write_bytes('["é"]'.encode("latin-1"))
    with raises("a.json is not UTF-8 (byte 2"):
        read_rows(str(tmp_path / "a.json"))


def test_missing_file(tmp_path):
    with raises(tmp_path / "no.json", "looks like a local path and does not exist", "--data.test_path"):
        read_rows(str(tmp_path / "no.json"), option="--data.test_path")


@pytest.mark.parametrize(
    ("change", "columns", "parts"),
    [
        ({"output": ...}, Columns(), ["has no column 'output'", "it has: 'instruction', 'input', 'answer'", "Add"]),
        ({"output": 3}, Columns(), ["column 'output' is a number (3); it must be text"]),
        ({"output": None}, Columns(), ["column 'output' is null"]),
        ({"output": " "}, Columns(), ["column 'output' is empty (' ')", "--data.skip_empty true"]),
        ({"instruction": ["x"]}, Columns(), ["column 'instruction' is a list (['x'])"]),
        ({"input": 1}, Columns(), ["column 'input' is a number (1)", "left out"]),
        ({"answer": {}}, Columns(), ["column 'answer' is an object ({})", "text or a number"]),
        ({"answer": ...}, TEST, ["has no column 'answer'"]),
        ({"answer": None}, TEST, ["column 'answer' is empty (None): a test row needs its answer"]),
    ],
)
def test_bad_rows(tmp_path, change, columns, parts):
    bad = {name: value for name, value in {**ROW, **change}.items() if value is not ...}
    rows = read_rows(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [ROW, bad]))))
    with raises(f"{tmp_path}/a.jsonl, line 2", *parts):
        check_rows(rows, columns)


def test_long_values_are_shortened_in_messages(tmp_path):
    with pytest.raises(DataError) as caught:
        check_rows(Rows("a", [{**ROW, "output": ["x" * 500]}], [("a, row", 1)]), Columns())
    assert len(str(caught.value)) < 200


def test_drop_empty():
    rows = Rows("a", [ROW, {**ROW, "output": ""}, ROW], [("a, row", i) for i in (1, 2, 3)])
    kept = drop_empty(rows, Columns())
    assert [kept.where(i) for i in range(len(kept))] == ["a, row 1", "a, row 3"]
    assert drop_empty(kept, Columns()) is kept


def test_question_key():
    assert question_key(" There are 7 crayons , now ? ") == question_key("there are 7 crayons, now?")
    assert question_key("7 crayons") != question_key("8 crayons")


def test_task_names(tmp_path):
    assert name_tasks(None) == {}
    assert name_tasks("x/AddSub/test.json") == {"AddSub": "x/AddSub/test.json"}
    assert name_tasks(["x/AddSub/test.json", "held_out.jsonl", "x/SVAMP"]) == {
        "AddSub": "x/AddSub/test.json",
        "held_out": "held_out.jsonl",
        "SVAMP": "x/SVAMP",
    }
    assert name_tasks({"mine": "x/test.json"}) == {"mine": "x/test.json"}
    with raises("x/AddSub/test.json and y/AddSub/test.json are both called 'AddSub'", "{name: path, ...}"):
        name_tasks(["x/AddSub/test.json", "y/AddSub/test.json"])


def test_split():
    train, val = split_rows(100, 10, seed=43)
    assert sorted(train + val) == list(range(100))
    assert (train, val) == split_rows(100, 10, seed=43)
    assert val != split_rows(100, 10, seed=44)[1]
    assert val != list(range(10))
    few, same = split_rows(100, 10, seed=43, max_samples=7)
    assert same == val
    assert len(few) == 7
    assert set(few) < set(train)
    assert split_rows(3, 0, seed=0) == ([0, 1, 2], [])
    with raises("val_size 100 leaves nothing of 100 rows", "--data.val_size below 100"):
        split_rows(100, 100, seed=43)
