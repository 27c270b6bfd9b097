"""Test a model that is there, in Python: no Trainer, no configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lift_lightning.datamodules import SFTDataModule
from lift_lightning.evaluation.answering import Answering
from lift_lightning.evaluation.predictions import Summary
from lift_lightning.evaluation.tasks import GenericKind


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] | Mapping[str, str] | None,
    folder: str | Path,
    *,
    num_beams: int = 4,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 43,
    batch_size: int = 16,
    suite: str | Sequence[str] | None = None,
    limit: int | None = None,
    unknown_tasks: GenericKind | None = None,
    run: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Summary]:
    """Answer the questions of test files, and score the answers by both rules.

    Args:
        model: a causal language model, on any device.
        tokenizer: its own.
        tasks: test files: one, several, or a mapping of task names to files. A file `<name>/test.json` is the task
            `<name>`, any other one that of its name. With a suite, the folder that has its test sets, or None.
        folder: where predictions and `results.json` go. An earlier call that broke off there, with the same settings,
            is taken up where it was.
        num_beams: width of the beam search; 1 is greedy.
        max_new_tokens: of an answer; None for each task's own limit.
        temperature: of answers that are drawn from the model's distribution; None for the likeliest answer that the
            beams find.
        seed: of drawing, and of the order of choices where a task has none of its own.
        batch_size: prompts that are answered together, halved when they do not fit into the memory.
        suite: published test sets: `arithmetic`, `commonsense`, the name of a task, or several of these; downloaded
            unless `tasks` says where they are.
        limit: of the rows of each file, from its start.
        unknown_tasks: how files that are no known task are scored, by their `number` or their `exact` text.
        run: what else is written to the results, such as the name of the model.
        progress: show a bar, with samples per second.

    Returns:
        A summary of each task.

    Raises:
        DataError: if a file is not there or has rows without question or answer.
        ConfigError: if the folder has unfinished predictions of another run.
    """
    files = dict(tasks) if isinstance(tasks, Mapping) else tasks if isinstance(tasks, str | None) else list(tasks)
    data = SFTDataModule(
        None,
        tokenizer,
        test_path=files,
        test_suite=suite if isinstance(suite, str | None) else list(suite),
        eval_batch_size=batch_size,
        test_limit=limit,
        seed=seed,
    )
    data.setup("test")
    settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "temperature": temperature}
    about = {**settings, "seed": seed, "limit": limit, **(run or {})}
    answering = Answering(
        tokenizer,
        num_beams,
        max_new_tokens,
        Path(folder),
        about,
        unknown_tasks,
        temperature=temperature,
        seed=seed,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"))
    with Progress(*columns, TaskProgressColumn(show_speed=True), TimeRemainingColumn(), disable=not progress) as bar:
        for task, loader in zip(data.test_tasks, data.test_dataloader(), strict=True):
            shown = bar.add_task(task, total=len(cast(Sized, loader.dataset)))
            for batch in loader:
                on_device = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
                answering.answer(model, {**batch, **on_device})
                bar.advance(shown, len(batch["rows"]))
    return answering.finish()
