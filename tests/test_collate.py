import math

import pytest
import torch

from lift_lightning.collate import collate_sentences, collate_test, pad_batch, pad_prompts

EXAMPLES = [
    {"input_ids": [5, 6, 2], "labels": [-100, 6, 2], "truncated": False},
    {"input_ids": [7, 8, 9, 4, 2], "labels": [-100, -100, 9, 4, 2], "truncated": True},
]


def test_right_padding():
    batch = pad_batch(EXAMPLES, pad_token_id=0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 2, 0, 0], [7, 8, 9, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, -100], [-100, -100, 9, 4, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_mask_when_pad_is_eos():
    # The mask `ids != pad` of the released code hid the real EOS here.
    batch = pad_batch(EXAMPLES, pad_token_id=2)
    assert batch["input_ids"].tolist()[0] == [5, 6, 2, 2, 2]
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0]
    assert batch["labels"].tolist()[0] == [-100, 6, 2, -100, -100]


def test_left_padding():
    batch = pad_prompts([[5, 6], [7, 8, 9]], pad_token_id=2)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[2, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert pad_batch(EXAMPLES, 0, side="left")["labels"].tolist()[0] == [-100, -100, -100, 6, 2]


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (4, 8), (5, 5), (8, 8)])
def test_pad_to_multiple(multiple, width):
    batch = pad_batch(EXAMPLES, 0, pad_to_multiple_of=multiple)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, width)}


def test_test_batch_keeps_its_rows():
    rows = [{"index": 0, "answer": "1"}, {"index": 1, "answer": "2"}]
    examples = [{"input_ids": [5], "row": rows[0]}, {"input_ids": [6, 7], "row": rows[1]}]
    batch = collate_test(examples, pad_token_id=0)
    assert batch["rows"] == rows
    assert batch["input_ids"].tolist() == [[0, 5], [6, 7]]


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "empty batch"),
        (EXAMPLES, {"side": "up"}, "got 'up'"),
        (EXAMPLES, {"pad_to_multiple_of": 0}, "at least 1, got 0"),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, "example 0 of the batch has 2 ids and 1 labels"),
    ],
)
def test_raises(examples, options, message):
    with pytest.raises(ValueError, match=message):
        pad_batch(examples, 0, **options)


def test_sentences_have_one_label_each():
    rows = [
        {"input_ids": [5, 6, 2], "token_type_ids": [0, 0, 1], "label": 1.0},
        {"input_ids": [7], "token_type_ids": [0], "label": None},
    ]
    batch = collate_sentences(rows, pad_token_id=9, pad_to_multiple_of=4)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 2, 9], [7, 9, 9, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "token_type_ids": [[0, 0, 1, 0], [0, 0, 0, 0]],
        "labels": [1, -100],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    batch = collate_sentences([{**row, "token_type_ids": []} for row in rows], pad_token_id=9, regression=True)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"][0] == 1.0
    assert math.isnan(batch["labels"][1])
