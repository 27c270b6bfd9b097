"""The `predict` command: completions for a file of instructions."""

from __future__ import annotations

import json
from pathlib import Path

from rich.progress import track

from lift_lightning.collate import pad_prompts
from lift_lightning.datamodules.rows import Columns, DataError, check_rows
from lift_lightning.datamodules.sources import read_rows
from lift_lightning.evaluation.generation import GenerationSettings, generate_within_memory
from lift_lightning.inference import load_for_inference
from lift_lightning.prompts import choose_pad_id, encode_prompt, render_prompt


def predict(
    model_name_or_path: str,
    path: str,
    output: str,
    num_beams: int = 1,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    device: str | None = None,
    dtype: str = "auto",
) -> Path:
    """Write what a model answers to each instruction of a file, as JSON lines in the file's order.

    A run that breaks off leaves `<output>.partial`; the same command goes on from there.

    Args:
        model_name_or_path: a folder, such as `export` writes, or a hub id.
        path: the instructions: .json, .jsonl or .parquet with a column `instruction` and perhaps `input`.
        output: the file to write.
        num_beams: width of the beam search; 1 is greedy.
        max_new_tokens: where a completion ends that has not ended by itself.
        batch_size: prompts that are completed together, halved when they do not fit into the memory.
        device: such as `cuda:0`; an accelerator if there is one, else the CPU, if null.
        dtype: of the weights, such as `bfloat16`; `auto` is bfloat16 on an accelerator and float32 on the CPU.

    Returns:
        The file, as an absolute path.

    Raises:
        DataError: if the file is not there, or has rows without an instruction.
        FileExistsError: if the output is there already.
        ModelUnavailableError: if the model or its tokenizer cannot be loaded.
    """
    target = Path(output).expanduser().resolve()
    if target.exists():
        raise FileExistsError(f"{target} is there already; choose another file, or remove it")
    settings = GenerationSettings(num_beams, max_new_tokens)
    columns = Columns(text=("instruction",), optional=("input",), answer=None)
    rows = check_rows(read_rows(path, option="--path"), columns).rows
    partial = target.with_name(target.name + ".partial")
    done = _done(partial, rows)
    model, tokenizer = load_for_inference(model_name_or_path, device, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as file:
        for first in track(range(done, len(rows), batch_size), "Completing"):
            batch = rows[first : first + batch_size]
            prompts = [encode_prompt(tokenizer, render_prompt(row["instruction"], row["input"])) for row in batch]
            padded = pad_prompts(prompts, choose_pad_id(tokenizer))
            ids, mask = (padded[key].to(model.device) for key in ("input_ids", "attention_mask"))
            for row, completion in zip(
                batch, generate_within_memory(model, tokenizer, ids, mask, settings), strict=True
            ):
                file.write(json.dumps({**row, "completion": completion}, ensure_ascii=False) + "\n")
            file.flush()
    partial.replace(target)
    return target


def _done(partial: Path, rows: list[dict[str, str]]) -> int:
    """How many of the rows an earlier run has completed; half a line that it left is cut away."""
    if not partial.is_file():
        return 0
    content = partial.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    before = [json.loads(line) for line in content.decode("utf-8").split("\n") if line]
    if [{key: row[key] for key in ("instruction", "input")} for row in before] != rows[: len(before)]:
        raise DataError(f"{partial} has completions of other instructions: remove it, or choose another output")
    partial.write_bytes(content)
    return len(before)
