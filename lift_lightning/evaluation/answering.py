"""One test run: the prompts of its batches are answered, on one rank or several, and recorded on the first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.generation import GenerationSettings, generate_within_memory
from lift_lightning.evaluation.predictions import Summary
from lift_lightning.evaluation.recorder import Answered, AnswerRecorder, is_answered
from lift_lightning.evaluation.tasks import GenericKind, get_task
from lift_lightning.rng import seed_of
from lift_lightning.sharding import Ranks


class Answering:
    """Answers and records what an earlier part of the same run has not answered.

    Args:
        tokenizer: the model's own.
        num_beams: width of the beam search; 1 is greedy.
        max_new_tokens: of an answer; None for each task's own limit.
        folder: where predictions and results go.
        run: what is tested, and how, see `AnswerRecorder`.
        generic: how test sets that are no known task are scored.
        ranks: that answer together, each its own rows; all of them have to make the same calls.
        temperature: of drawing from the model's distribution; None takes the likeliest text that is found.
        seed: of drawing. What is drawn depends on it and on the first row of the batch, so that a run that goes on
            with whole batches draws what it would have.
        in_step: the ranks share the model's weights, so that all generate or none.

    Attributes:
        already: how many answers there were.
        rate: samples per second that this rank has answered.

    Raises:
        ConfigError: if the folder has unfinished predictions of another run, or beams are asked to be drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_beams: int,
        max_new_tokens: int | None,
        folder: Path,
        run: Mapping[str, Any],
        generic: GenericKind | None = None,
        ranks: Ranks | None = None,
        *,
        temperature: float | None = None,
        seed: int = 43,
        in_step: bool = False,
    ) -> None:
        if temperature is not None and num_beams != 1:
            raise ConfigError(f"temperature {temperature} draws a text, of which there is one: set num_beams to 1")
        self.tokenizer = tokenizer
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.ranks = ranks
        self.temperature = temperature
        self.seed = seed
        self.in_step = in_step
        self.folder = folder
        self.rate = 0.0
        self._run, self._generic = run, generic
        self._count, self._began = 0, time.perf_counter()
        self._recorder: AnswerRecorder | None = None  # of the first rank
        self._answered = self._begin() if ranks is None else ranks.on_first(self._begin)
        self.already = sum(map(len, self._answered.values()))

    def _begin(self) -> Answered:
        self._recorder = AnswerRecorder(self.folder, self._generic, self._run)
        return self._recorder.answered

    def answer(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        """Generate, score and record.

        Args:
            model: a causal language model.
            batch: left-padded `input_ids` and `attention_mask`, and `rows` of one task; with None for the `index`
                of a row that only fills up.
        """
        try:
            self._answer(model, batch)
        except BaseException:
            if self._recorder is not None:
                self._recorder.leave()  # what is there stays, for a later run to go on
            raise

    def _answer(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        wanted = [
            (place, row)
            for place, row in enumerate(batch["rows"])
            if row["index"] is not None and not is_answered(row, self._answered, self._generic)
        ]
        if not any([bool(wanted)] if self.ranks is None else self.ranks.objects(bool(wanted))):
            return
        # Ranks that share a model generate all or none; what comes of a row that is not wanted is left out.
        texts = self._generate(model, batch, [place for place, _ in wanted] or [0])
        answers = [(row, text) for (_, row), text in zip(wanted, texts, strict=False)]
        self._count += len(answers)
        self.rate = self._count / (time.perf_counter() - self._began)
        if self.ranks is None:
            self._record(answers)
        else:
            found = [answer for theirs in self.ranks.objects(answers) for answer in theirs]
            self.ranks.on_first(lambda: self._record(found))

    def finish(self) -> dict[str, Summary]:
        """Close the files, write the results, and return them on every rank."""
        return self._sum_up() if self.ranks is None else self.ranks.on_first(self._sum_up)

    def _generate(self, model: PreTrainedModel, batch: Mapping[str, Any], places: list[int]) -> list[str]:
        mask = batch["attention_mask"][places]
        longest = int(mask.sum(dim=1).max())
        ids = batch["input_ids"][places][:, -longest:]
        first = batch["rows"][places[0]]
        task = get_task(first["task"], generic=self._generic)
        limit, drawn = self.max_new_tokens or task.max_new_tokens, self.temperature is not None
        settings = GenerationSettings(self.num_beams, limit, do_sample=drawn, temperature=self.temperature or 1.0)
        with torch.random.fork_rng([ids.device] if ids.is_cuda else [], enabled=drawn):
            if drawn:
                torch.manual_seed(seed_of(self.seed, task.name, first["index"]))
            return generate_within_memory(
                model, self.tokenizer, ids, mask[:, -longest:], settings, in_step=self.in_step
            )

    def _record(self, answers: list[tuple[dict[str, Any], str]]) -> None:
        assert self._recorder is not None
        self._recorder.record([row for row, _ in answers], [text for _, text in answers])

    def _sum_up(self) -> dict[str, Summary]:
        assert self._recorder is not None
        return self._recorder.finish()
