"""Conversations, through the tokenizer's chat template; the loss is on what the assistant says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lift_lightning.datamodules.base import SFTDataModule
from lift_lightning.datamodules.rows import Columns, DataError, Row, Rows
from lift_lightning.datamodules.tokenise import encode_cached
from lift_lightning.prompts import encode_turns

if TYPE_CHECKING:
    import datasets

Turn = tuple[str, bool]


class ChatDataModule(SFTDataModule):
    """Rows with a list of messages, each with `role` and `content`, as transformers' chat templates take them.

    Every message of the assistant is trained, with the mark that ends it. Test rows are questions: columns instruction
    and answer.

    Args:
        path: Training rows: a .json, .jsonl or .parquet file, a folder with one, or a Hugging Face hub id.
        tokenizer: A tokenizer with a chat template, or the folder or hub id of one; in the CLI it follows
            model.model_name_or_path.
        messages_column: Where the messages are.
        system_prompt: Put before conversations that begin without one.
        **kwargs: As for `SFTDataModule`.
    """

    columns = Columns(text=(), optional=(), answer=None)

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        messages_column: str = "messages",
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, tokenizer, **kwargs)
        self.messages_column = messages_column
        self.system_prompt = system_prompt

    def check(self, rows: Rows) -> Rows:
        """The rows, if each has messages of which one is the assistant's.

        Raises:
            DataError: naming the row and what is wrong with it.
        """
        for i, row in enumerate(rows.rows):
            if wrong := self._what_is_wrong(row.get(self.messages_column)):
                raise DataError(f"{rows.where(i)}, column {self.messages_column!r} {wrong}")
        return rows

    def encode(self, rows: list[Row]) -> datasets.Dataset:
        """Ids and labels of whole conversations."""
        examples = [(self._turns(row[self.messages_column]),) for row in rows]
        return encode_cached(examples, encode_turns, self._ready_tokenizer(), self.max_length, self.cache_dir)

    def to_example(self, row: Row) -> tuple[str, str]:
        """Of a test row the question as the template puts it, up to where the assistant begins."""
        asked = "\n\n".join(filter(None, [row["instruction"], row["input"]]))
        return self._render([{"role": "user", "content": asked}], begin_answer=True), ""

    def question(self, row: Row) -> str:
        """The first thing that the user says."""
        if "instruction" in row:
            return str(row["instruction"])
        return next((m["content"] for m in row[self.messages_column] if m["role"] == "user"), "")

    def _what_is_wrong(self, messages: Any) -> str | None:
        if not isinstance(messages, list) or not messages:
            return f"is {messages!r:.80}; it must be a list of messages: set --data.messages_column"
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                return f"has at {number} {message!r:.80}; a message must be an object with text for role and content"
        if not any(message["role"] == "assistant" for message in messages):
            return "has no message of the role 'assistant', so there is nothing to learn: remove the row"
        return None

    def _turns(self, messages: list[dict[str, str]]) -> list[Turn]:
        """The conversation as the template renders it, cut where the assistant begins and ends."""
        turns: list[Turn] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            for upto, trained in (
                (self._render(messages[:i], begin_answer=True), False),
                (self._render(messages[: i + 1]), True),
            ):
                if not upto.startswith(done):
                    raise DataError(
                        "the tokenizer's chat template renders earlier turns in another way when later ones follow "
                        "(some drop the thinking): the loss cannot be put on each answer. Split conversations into one "
                        "answer each, or set another chat_template"
                    )
                turns.append((upto[len(done) :], trained))
                done = upto
        return turns

    def _render(self, messages: list[dict[str, str]], *, begin_answer: bool = False) -> str:
        tokenizer = self._ready_tokenizer()
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template: use the tokenizer of a chat model, or set its own")
        if self.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin_answer))
