"""What is made ahead of its use comes in order, no further ahead than promised, and leaves no thread behind.

Guards: a copy too many does not fit on a device that was sized for two; an exception in whoever uses the copies must
not leave a thread that holds them; and a number of threads that is not set back slows all that follows.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from lift_lightning import threads
from lift_lightning.threads import on_device, one_thread_each


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((2, 3), float(i)) for i in range(count)]


def threads_of_ours() -> int:
    return sum(thread.name.startswith("lift") for thread in threading.enumerate())


def wait_for(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_of_them_in_order(count: int, device):
    given = tensors(count)
    found = list(on_device(given, device))
    assert all(ours is theirs for ours, theirs in zip(found, given, strict=True))  # already where they should be


def test_copies_are_on_the_device():
    found = list(on_device(iter(tensors(3)), "meta"))
    assert [copy.device.type for copy in found] == ["meta"] * 3
    assert [copy.shape for copy in found] == [(2, 3)] * 3


def test_views_keep_their_look():
    storage = torch.arange(12.0).view(3, 4)
    (found,) = on_device([storage.T], "cpu")
    assert torch.equal(found, storage.T)


def test_nothing_happens_before_the_first_is_asked_for():
    asked = []
    copies = on_device((asked.append(i) or t for i, t in enumerate(tensors(3))), "meta")
    assert asked == []
    assert threads_of_ours() == 0
    next(copies)
    assert asked == [0, 1]  # the one in use and the one that follows
    next(copies)
    assert asked == [0, 1, 2]
    copies.close()
    assert threads_of_ours() == 0


def test_two_copies_exist_at_most(monkeypatch: pytest.MonkeyPatch):
    """Counted when a further copy is about to be made, while whoever asks for it has dropped the last one."""
    alive: list[weakref.ref] = []
    most = []

    class Source:
        device = torch.device("cpu")

        def to(self, device: torch.device) -> torch.Tensor:
            time.sleep(0.002)  # what is dropped meanwhile is gone
            most.append(sum(ref() is not None for ref in alive) + 1)
            copy = torch.zeros(4, device=device)
            alive.append(weakref.ref(copy))
            return copy

    copies = on_device([Source() for _ in range(8)], "cpu")
    while True:
        copy = next(copies, None)
        if copy is None:
            break
        wait_for(lambda: len(alive) == len(most))
        del copy
    assert len(most) == 8
    assert max(most) <= 2


def test_an_exception_in_the_user_ends_the_thread():
    def use() -> None:
        for i, _ in enumerate(on_device(tensors(5), "meta")):
            if i == 1:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        use()
    del caught  # its traceback holds the frame that holds the copies
    gc.collect()
    assert wait_for(lambda: threads_of_ours() == 0)


def test_an_exception_in_the_copy_reaches_the_user():
    class Broken:
        def to(self, device: torch.device) -> torch.Tensor:
            raise RuntimeError("no space on the device")

    copies = on_device([torch.zeros(1), Broken(), torch.zeros(1)], "meta")
    assert next(copies).shape == (1,)
    with pytest.raises(RuntimeError, match="no space on the device"):
        next(copies)
    assert threads_of_ours() == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_come_in_the_order_of_the_items(count: int, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = []

        def square(item: int) -> int:
            time.sleep(0.002 * (item % 3))  # later ones are done first
            seen.append(torch.get_num_threads())
            return item * item

        assert list(one_thread_each(square, range(count))) == [i * i for i in range(count)]
        assert seen == [1] * count
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert threads_of_ours() == 0


@pytest.mark.parametrize("where", ["function", "user", "closed"])
def test_the_number_of_threads_is_put_back(where: str):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        def work(item: int) -> int:
            if where == "function" and item == 3:
                raise RuntimeError("stop")
            return item

        def use() -> None:
            for item in one_thread_each(work, range(20)):
                if where == "user" and item == 3:
                    raise RuntimeError("stop")

        if where == "closed":
            results = one_thread_each(work, range(20))
            next(results)
            results.close()
        else:
            with pytest.raises(RuntimeError, match="stop") as caught:
                use()
            del caught
            gc.collect()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads_of_ours() == 0


def test_what_is_not_begun_is_not_begun_after_an_exception(monkeypatch: pytest.MonkeyPatch):
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise RuntimeError("stop")
        return item

    with pytest.raises(RuntimeError, match="stop"):
        list(threads._ahead(work, range(100), workers=2))
    assert len(begun) <= 5
