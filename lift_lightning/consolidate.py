"""The `consolidate` command: a checkpoint folder that ranks wrote in parts becomes one file."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch

from lift_lightning.sharding import read_parts
from lift_lightning.strategies import META_FILE, check_folder


def consolidate(ckpt_path: str, output: str, overwrite: bool = False) -> Path:
    """Make one file of a checkpoint folder, which every strategy resumes from and `export` reads.

    One process does it, and has the weights in memory once. The folder stays as it is.

    Args:
        ckpt_path: a folder that `FSDP2Strategy` (`save_distributed_checkpoint`) or `FSDP1Strategy` (`state_dict_type:
            sharded`) wrote.
        output: the file to write.
        overwrite: replace a file that is there.

    Returns:
        The file, as an absolute path.

    Raises:
        FileNotFoundError: if there is no such folder.
        CheckpointError: if it was not written to its end.
        FileExistsError: if the file is there and may not be replaced.
    """
    folder, target = Path(ckpt_path).expanduser(), Path(output).expanduser().resolve()
    if target.is_dir() or (target.exists() and not overwrite):
        raise FileExistsError(f"{target} is there already; choose another file, or set overwrite to true")
    check_folder(folder)
    parts = read_parts(folder)
    optimizers = sorted((key for key in parts if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
    checkpoint = {
        **torch.load(folder / META_FILE, map_location="cpu", weights_only=True),
        "state_dict": parts["state_dict"] if "state_dict" in parts else parts["model"],  # of FSDP2, of FSDP1
        "optimizer_states": [parts[key] for key in optimizers],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        torch.save(checkpoint, partial)
        partial.rename(target)  # a file under its final name is whole
    finally:
        partial.unlink(missing_ok=True)
    return target
