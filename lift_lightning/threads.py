"""Threads: matrices copied to another device ahead of their use, and small ones worked on several at once."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_device(tensors: Iterable[Tensor], device: torch.device | str | None) -> Iterator[Tensor]:
    """Every tensor on `device`, in order; two copies exist at one time at most. None leaves them where they are.

    Copies to a CUDA device go through pinned memory on a stream of their own, so that they do not queue behind the
    computation.
    """
    if device is None:
        yield from tensors
        return
    target = torch.device(device)
    stream = torch.cuda.Stream(target) if target.type == "cuda" else None

    def load(tensor: Tensor) -> Tensor:
        if stream is None or tensor.device == target:
            return tensor.to(target)
        with torch.cuda.stream(stream):
            copy = tensor.contiguous().pin_memory().to(target, non_blocking=True)
            stream.synchronize()  # of this thread only
        return copy

    for copy in _ahead(load, tensors, workers=1):
        if stream is not None:
            # Made on the other stream: its memory must not be given out again while this one still reads it.
            copy.record_stream(torch.cuda.current_stream(target))
        yield copy
        del copy  # or it would live on while the one after the next is copied


def one_thread_each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, as many at once as torch has threads on the CPU, each with one thread.

    Small decompositions do not scale over threads; beside each other they do. And the bits of a result do not depend on
    how many threads there are. Grad mode and autocast are a thread's own, so `function` starts from their defaults.
    """
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)  # threads of this one that wait for more work would take the cores from the others
    # Calls into torch are so short that a thread takes the interpreter's lock back before one that waits for it has
    # woken up, which then has to wait the whole interval. With the usual 5 ms a sixth of the time went by in waiting.
    sys.setswitchinterval(1e-4)
    try:
        yield from _ahead(function, items, workers=threads, initializer=lambda: torch.set_num_threads(1))
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)


@contextmanager
def one_thread(alone: bool = True) -> Iterator[None]:
    """torch computes on one thread, if `alone`, as under `one_thread_each`: the bits of a result depend on it."""
    threads = torch.get_num_threads()
    if alone:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(function: Callable[[Item], object], items: Sequence[Item], *, at_once: bool = True) -> None:
    """Call `function` on every item, as many at once as torch has threads on the CPU, each with one thread.

    torch reads and writes single entries of a vector on one thread only; several vectors can be worked on at once.

    Args:
        function: starts from the defaults of grad mode and autocast, which are a thread's own.
        items: independent of each other.
        at_once: False goes through them one after the other.
    """
    threads = torch.get_num_threads()
    if not at_once or threads == 1 or len(items) < 2:
        for item in items:
            function(item)
        return
    torch.set_num_threads(1)
    try:
        # One list for each thread: handing over every item by itself would cost as much as some items do.
        done = _pool(threads).map(lambda first: [function(item) for item in items[first::threads]], range(threads))
        for _ in done:
            pass
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="side-by-side", initializer=lambda: torch.set_num_threads(1))


def _ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Results in the order of the items, with `workers` of them under way while one is used."""
    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="lift", initializer=initializer) as pool:
        pending: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(remaining, workers))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
                del result
        finally:
            for future in pending:
                future.cancel()
