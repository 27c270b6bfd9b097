"""How well a model has the three skills of the quickstart: its answers to held-out questions, scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.collate import collate_test
from lift_lightning.evaluation.generation import GenerationSettings, generate
from lift_lightning.evaluation.scoring import score
from lift_lightning.evaluation.tasks import get_task
from lift_lightning.prompts import choose_pad_id, encode_prompt, render_prompt
from lift_lightning.quickstart.problems import Split
from lift_lightning.quickstart.text import Question, Skill, questions

SKILLS: tuple[Skill, ...] = get_args(Skill)
SETTINGS = GenerationSettings(num_beams=1, max_new_tokens=40)  # the longest worked solution takes 29 tokens


def task_name(skill: Skill) -> str:
    """The name by which `evaluation.tasks` knows it."""
    return f"quickstart-{skill}"


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question], batch_size: int = 100
) -> list[str]:
    """The model's greedy answers, in order."""
    prompts = [encode_prompt(tokenizer, render_prompt(question.instruction, question.input)) for question in asked]
    texts: list[str] = []
    for i in range(0, len(prompts), batch_size):
        rows = [{"input_ids": ids, "row": {}} for ids in prompts[i : i + batch_size]]
        batch = collate_test(rows, pad_token_id=choose_pad_id(tokenizer))
        ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        texts += generate(model, tokenizer, ids, mask, SETTINGS)
    return texts


def accuracies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    skills: Sequence[Skill] = SKILLS,
    split: Split = "heldout",
) -> dict[Skill, float]:
    """Share of right answers, by the strict rule, to `count` questions of each skill, the same ones at each call.

    The strict rule reads the number that a text states as its answer; of `source` the whole text must be right.
    """
    found: dict[Skill, float] = {}
    for skill in skills:
        asked, task = questions(skill, count, split=split), get_task(task_name(skill))
        texts = answers(model, tokenizer, asked)
        found[skill] = sum(score(task, text, q.answer)["strict"] for text, q in zip(texts, asked, strict=True)) / count
    return found
