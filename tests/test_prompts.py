import os

import pytest
from tiny import byte_tokenizer
from transformers import AutoTokenizer

from lift_lightning.prompts import (
    adds_bos,
    choose_pad_id,
    encode_example,
    encode_prompt,
    render_prompt,
    tokenizer_hash,
)

# Ids of the byte tokenizer: 0 <pad>, 1 <s>, 2 </s>, then printable ASCII from "!" = 3: H 42, i 75, O 49, K 45.
HI, OK = [42, 75], [49, 45]


def pad_is_eos():
    tokenizer = byte_tokenizer(bos=False, pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_prompt_text():
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert render_prompt("Add 1 and 2.") == f"{preamble}\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    # The released code put a non-empty input in the instruction's place: both belong in the prompt.
    assert render_prompt("Add.", "1, 2") == (
        f"{preamble}\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert render_prompt("Add.", " \n") == render_prompt("Add.")


@pytest.mark.parametrize(
    ("tokenizer", "bos"),
    [(byte_tokenizer(), [1]), (byte_tokenizer(bos=False), []), (pad_is_eos(), [])],
    ids=["bos", "no-bos", "pad-is-eos"],
)
def test_ids_of_three_kinds_of_tokenizer(tokenizer, bos):
    assert adds_bos(tokenizer) == bool(bos)
    assert encode_prompt(tokenizer, "Hi") == bos + HI
    example = encode_example(tokenizer, "Hi", "OK", max_length=16)
    assert example.input_ids == bos + HI + OK + [2]
    # The EOS is a label even where it is the pad token too.
    assert example.labels == [-100] * (len(bos) + 2) + OK + [2]
    assert (example.truncated, example.prompt_length, example.full_length) == (False, len(bos) + 2, len(bos) + 5)


def test_bos_token_without_a_post_processor_is_not_added():
    # SmolLM2 and Qwen name a BOS, or have one in the vocabulary, and never put it in front of a text.
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert tokenizer.bos_token_id == 1
    assert encode_prompt(tokenizer, "Hi") == HI


def test_bos_written_in_the_text_is_not_doubled():
    assert encode_prompt(byte_tokenizer(), "<s>Hi") == [1, *HI]


def test_training_prompt_is_a_prefix_of_the_example():
    # A tokenizer that would merge across the boundary cannot: the two texts are tokenised apart.
    tokenizer = byte_tokenizer()
    prompt = render_prompt("Ünïcode?", "x")
    ids = encode_prompt(tokenizer, prompt)
    example = encode_example(tokenizer, prompt, "\nyes", max_length=4096)
    assert example.input_ids[: len(ids)] == ids
    assert set(example.labels[: len(ids)]) == {-100}
    assert tokenizer.decode(example.input_ids[len(ids) : -1]) == "\nyes"


@pytest.mark.parametrize(
    ("max_length", "ids", "labels", "truncated"),
    [
        (6, [1, *HI, *OK, 2], [-100, -100, -100, *OK, 2], False),
        (5, [1, *HI, *OK], [-100, -100, -100, *OK], True),  # no EOS after a cut
        (4, [1, *HI, OK[0]], [-100, -100, -100, OK[0]], True),
        (3, [1, *HI], [-100, -100, -100], True),  # no label left
        (1, [1], [-100], True),
    ],
)
def test_the_tail_of_the_target_is_cut(max_length, ids, labels, truncated):
    example = encode_example(byte_tokenizer(), "Hi", "OK", max_length)
    assert (example.input_ids, example.labels, example.truncated) == (ids, labels, truncated)
    assert (example.prompt_length, example.full_length) == (3, 6)


def test_encode_example_raises():
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encode_example(byte_tokenizer(), "Hi", "OK", 0)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        encode_example(tokenizer, "Hi", "OK", 8)


def test_pad_id():
    assert choose_pad_id(byte_tokenizer()) == 0
    assert choose_pad_id(byte_tokenizer(pad=False)) == 2
    tokenizer = byte_tokenizer(pad=False)
    assert choose_pad_id(tokenizer, "<pad>") == 0
    assert tokenizer.pad_token is None
    with pytest.raises(ValueError, match=r"no token '<nope>'.*--data.pad_token"):
        choose_pad_id(tokenizer, "<nope>")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"neither a pad token nor an EOS: set --data.pad_token"):
        choose_pad_id(tokenizer)


def test_tokenizer_hash_is_of_the_content():
    assert tokenizer_hash(byte_tokenizer()) == tokenizer_hash(byte_tokenizer())
    assert tokenizer_hash(byte_tokenizer()) != tokenizer_hash(byte_tokenizer(bos=False))
    tokenizer = byte_tokenizer()
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    assert tokenizer_hash(tokenizer) == tokenizer_hash(byte_tokenizer())
    tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tokenizer) != tokenizer_hash(byte_tokenizer())


def test_tokenizer_hash_without_a_backend():
    class Slow:
        bos_token_id, eos_token_id = None, 2

        def __init__(self, vocab):
            self.vocab = vocab

        def get_vocab(self):
            return self.vocab

        def __call__(self, text, **kwargs):
            return type("Encoding", (), {"input_ids": [self.vocab.get(c, 0) for c in text]})

    assert tokenizer_hash(Slow({"a": 1})) == tokenizer_hash(Slow({"a": 1}))
    assert tokenizer_hash(Slow({"a": 1})) != tokenizer_hash(Slow({"b": 1}))


@pytest.mark.realdata
@pytest.mark.skipif("LIFT_SMOLLM2_DIR" not in os.environ, reason="LIFT_SMOLLM2_DIR is not set")
def test_ids_of_smollm2():
    tokenizer = AutoTokenizer.from_pretrained(os.environ["LIFT_SMOLLM2_DIR"])
    example = encode_example(tokenizer, "### Response:\n", "The answer is 20.", 64)
    assert example.input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.decode(example.input_ids) == "### Response:\nThe answer is 20." + tokenizer.eos_token
    assert example.labels[-8:] == [504, 2988, 314, 216, 34, 32, 30, 2]
