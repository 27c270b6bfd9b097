"""Peak resident memory of a piece of code, and the fresh process in which to measure it. Linux only."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

_PROCESS = Path("/proc/self")


def in_fresh_process(function: Callable[..., Result], *arguments: Any, preload: Sequence[str]) -> Result:
    """`function(*arguments)` in a process of its own, which has imported the modules of `preload` and run nothing.

    A server imports them once and forks for each call; it never computes, so the copies start alike.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def give_back() -> None:
    """Return freed memory to the system, where the allocator knows how to."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_above(run: Callable[[], Any]) -> int:
    """Bytes that `run` adds at its peak to the memory that is resident when it begins."""
    if not _PROCESS.is_dir():
        raise SystemExit("resident memory is read from /proc, which this system does not have: run this on Linux")
    give_back()  # what was freed and is still resident would hide as much of the peak
    before = _resident()
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    except OSError:
        return _sampled_peak(run) - before
    run()
    return _high_water_mark() - before


def _resident() -> int:
    return int((_PROCESS / "statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _high_water_mark() -> int:
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _sampled_peak(run: Callable[[], Any]) -> int:
    peak, done = _resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(peak, _resident())
