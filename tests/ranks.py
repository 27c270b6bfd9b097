"""Several processes on the CPU that train together: started once for each strategy, and reused for all that is asked.

Each process gets the environment that torchrun gives, so that Lightning takes it for one of a group.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _child(rank: int, work: Callable[..., Any], ranks: int, port: int, folder: Path, arguments: tuple) -> None:
    os.environ.update(environment(rank, ranks, port))
    torch.set_num_threads(1)
    try:
        result = work(rank, ranks, *arguments)
    except BaseException:
        # torch's own report is of one rank only, and not always of the one that failed first.
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
        raise
    torch.save(result, folder / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
    # A thread of gloo may still hold a tensor of the last collective. Where it lets go of it while the interpreter
    # shuts down, the process can abort, long after its work is done (pytorch/pytorch#179291): so it just ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(work: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """`work(rank, ranks, *arguments)` in every rank; what each returned."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        mp.start_processes(
            _child, (work, ranks, free_port(), folder, arguments), nprocs=ranks, join=True, start_method="spawn"
        )
    except Exception as error:
        reports = [file.read_text() for file in sorted(folder.glob("*.error"))]
        raise AssertionError("\n\n".join(reports)) from error
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
