"""Conversations and s1K: which text goes in, and on which of it the loss is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from lift_lightning.datamodules import ChatDataModule, S1KDataModule
from lift_lightning.datamodules.rows import DataError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: only the last answer keeps its thoughts.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('/')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = TEMPLATE, marks: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")):
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.add_tokens(list(marks), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def made(cls: type, rows: list[dict], tmp_path: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"val_size": 0, "cache_dir": str(tmp_path / "cache"), "batch_size": 2, **options}
    data = cls(str(path), tokenizer or chat_tokenizer(), **options)
    data.setup("fit")
    return data


def parts(data, tokenizer, i: int = 0) -> tuple[str, list[str]]:
    """The whole text, and the pieces of it that have labels."""
    row = data.train_dataset[i]
    pieces: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == -100:
            pieces.append([])
        else:
            assert label == token
            pieces[-1].append(token)
    return tokenizer.decode(row["input_ids"]), [tokenizer.decode(piece) for piece in pieces if piece]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [message("user", "1+1?"), message("assistant", "2."), message("user", "Sure?"), message("assistant", "Yes.")]


def test_the_loss_is_on_every_answer_and_its_end(tmp_path: Path):
    tokenizer = chat_tokenizer()
    data = made(ChatDataModule, [{"messages": [*TALK, message("user", "Thanks")]}], tmp_path, tokenizer)
    text, trained = parts(data, tokenizer)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)  # what nobody answers is left out
    assert trained == ["2.<|im_end|>\n", "Yes.<|im_end|>\n"]
    assert data.report.label_tokens == sum(label != -100 for label in data.train_dataset[0]["labels"])


def test_a_system_prompt_goes_before_conversations_without_one(tmp_path: Path):
    tokenizer = chat_tokenizer()
    own = [message("system", "Own."), *TALK[:2]]
    rows = [{"talk": TALK[:2]}, {"talk": own}]
    data = made(ChatDataModule, rows, tmp_path, tokenizer, messages_column="talk", system_prompt="Be short.")
    assert parts(data, tokenizer, 0)[0].startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n1+1?")
    assert parts(data, tokenizer, 1)[0].startswith("<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\n1+1?")


def test_test_rows_are_asked_by_the_template(tmp_path: Path):
    tests = tmp_path / "mine.json"
    tests.write_text(json.dumps([{"instruction": "2+2?", "answer": 4}]))
    tokenizer = chat_tokenizer()
    data = made(ChatDataModule, [{"messages": TALK}], tmp_path, tokenizer, test_path=str(tests))
    (batch,) = data.test_dataloader()[0]
    assert tokenizer.decode(batch["input_ids"][0]) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert batch["rows"] == [{"index": 0, "task": "mine", "instruction": "2+2?", "input": "", "answer": "4"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, r"line 2, column 'messages' is None; it must be a list of messages: set --data.messages_column"),
        ([{"role": "user"}], "has at 1 .*must be an object with text for role and content"),
        ([message("user", "Hi")], "has no message of the role 'assistant'"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(messages, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        made(ChatDataModule, [{"messages": TALK}, {"messages": messages}], tmp_path)


def test_templates_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        made(ChatDataModule, [{"messages": TALK}], tmp_path, chat_tokenizer(None))
    thinking = [message("user", "a"), message("assistant", "hm/b"), message("user", "c"), message("assistant", "d")]
    with pytest.raises(DataError, match="renders earlier turns in another way"):
        made(ChatDataModule, [{"messages": thinking}], tmp_path, chat_tokenizer(FORGETFUL))


S1K = {
    "question": "1+1?",
    "thinking_trajectories": ["One.", "Two. "],
    "attempt": " It is 2. ",
    "source_type": "sample",
}
OTHER = {
    "question": "2+2?",
    "deepseek_thinking_trajectory": "Hm.",
    "deepseek_attempt": "Answer: 4",
    "gemini_thinking_trajectory": "Well.",
    "gemini_attempt": "4",
    "source_type": "Idavidrein/gpqa",
}
HEAD = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def test_s1k_thinks_and_answers(tmp_path: Path):
    tokenizer = chat_tokenizer(None)
    data = made(S1KDataModule, [S1K, OTHER], tmp_path, tokenizer)
    found = [parts(data, tokenizer, i) for i in range(2)]
    tails = [
        "<|im_start|>think\nOne.\nTwo.\n<|im_start|>answer\nAnswer: It is 2.<|im_end|>\n",
        "<|im_start|>think\nHm.\n<|im_start|>answer\nAnswer: 4<|im_end|>\n",
    ]
    assert found == [(HEAD.format(q) + t, [t]) for q, t in zip(("1+1?", "2+2?"), tails, strict=True)]
    assert data.max_length == 32768
    gemini = made(S1KDataModule, [OTHER], tmp_path, tokenizer, thinker="gemini")
    assert parts(gemini, tokenizer)[1] == ["<|im_start|>think\nWell.\n<|im_start|>answer\nAnswer: 4<|im_end|>\n"]


def test_s1k_leaves_gpqa_out_and_reports_what_is_cut(tmp_path: Path):
    longest = made(S1KDataModule, [S1K], tmp_path).report.longest
    data = made(S1KDataModule, [S1K, OTHER], tmp_path, drop_gpqa=True, max_length=longest - 1)
    assert (data.report.rows, data.report.train, data.report.truncated) == (1, 1, 1)


def test_s1k_needs_the_marks_of_qwen(tmp_path: Path):
    with pytest.raises(DataError, match=r"no token <\|im_end\|>, .*Qwen2.5"):
        made(S1KDataModule, [S1K], tmp_path, chat_tokenizer(marks=("<|im_start|>",)))
    padded = chat_tokenizer(marks=("<|im_start|>", "<|im_end|>", "<|fim_pad|>"))
    assert made(S1KDataModule, [S1K], tmp_path, padded).pad_token_id == padded.get_vocab()["<|fim_pad|>"]
