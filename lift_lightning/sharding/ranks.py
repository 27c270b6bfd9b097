"""The processes that train one model, and all that they tell each other.

Collectives are called by every rank in the same order; an error on one of them is raised on all.

Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lift_lightning.errors import ConfigError
from lift_lightning.sharding.owned import owned

T = TypeVar("T")


class Ranks:
    """The processes that train one model, as far as they talk to each other.

    Args:
        group: torch's process group of theirs.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_sum_(self, tensor: Tensor) -> dist.Work:
        """The same without waiting, for gradients."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Give each rank its vector, and get one from each.

        Args:
            parts: W vectors of one dtype and device, the i-th for rank i.
            sizes: of what comes from each rank, where it is known; else it is asked for first.
        """
        device, dtype = parts[0].device, parts[0].dtype
        if sizes is None:
            mine = torch.tensor([part.numel() for part in parts], device=device)
            theirs = torch.empty_like(mine)
            dist.all_to_all_single(theirs, mine, group=self.group)
            sizes = theirs.tolist()
        # As bytes: not every backend knows every dtype.
        sent = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
        received = torch.empty(sum(sizes) * dtype.itemsize, dtype=torch.uint8, device=device)
        dist.all_to_all_single(
            received,
            sent,
            [size * dtype.itemsize for size in sizes],
            [part.numel() * dtype.itemsize for part in parts],
            group=self.group,
        )
        return list(received.view(dtype).split(list(sizes)))

    def gather(self, part: Tensor) -> Tensor | None:
        """On rank 0 the vectors of all ranks, one after the other; None elsewhere."""
        nothing = part.new_empty(0)
        parts = self.exchange([part if rank == 0 else nothing for rank in range(self.size)])
        return torch.cat(parts) if self.rank == 0 else None

    def objects(self, value: Any) -> list[Any]:
        """What every rank has, small and picklable."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank what one of them met, so that none waits for ever.

        Raises:
            Exception: the rank's own error, or one of the same type with another rank's message.
        """
        for rank, met in enumerate(self.objects(None if error is None else (type(error), str(error)))):
            if met is not None:
                if error is not None:
                    raise error
                kind, message = met
                raise kind(f"rank {rank}: {message}")

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on all; what it raises there is raised on all.

        Args:
            work: rank 0 alone calls it; its result must be picklable.
        """
        result, met = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:  # any: the other ranks must not wait for this one
                met = error
        self.raise_together(met)
        found: T = self.objects(result)[0]
        return found

    def broadcast_(self, module: nn.Module) -> None:
        """Parameters and buffers of rank 0, on all."""
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), group_src=0, group=self.group)


def all_ranks() -> Ranks | None:
    """Those of the default group; None in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    assert dist.group.WORLD is not None
    return Ranks(dist.group.WORLD)


def ranks_of(parameters: Sequence[Tensor]) -> Ranks | None:
    """The ranks that parameters are split over; if they are not split, all that there are; None in a single process.

    Raises:
        ConfigError: if they are split over different ranks.
    """
    groups = {shard.group for shard in map(owned, parameters) if shard.group is not None}
    if len(groups) > 1:
        raise ConfigError("the sparse parameters are split over different groups of ranks: shard them over one mesh")
    if groups:
        group = groups.pop()
        return Ranks(group) if dist.get_world_size(group) > 1 else None
    return all_ranks()


def total_norm(whole: list[Tensor], split: list[Tensor], ranks: Ranks | None, device: torch.device) -> Tensor:
    """0-dim 2-norm over tensors of which each rank has all, and others of which each has a part.

    Args:
        whole: the same on every rank.
        split: this rank's parts, over `ranks`.
        ranks: None where nothing is split.
        device: of the result.
    """
    if ranks is None:
        return torch.nn.utils.get_total_norm([*whole, *split])
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if split:
        squares += torch.nn.utils.get_total_norm(split).double().square()
    ranks.sum_(squares)
    if whole:
        squares += torch.nn.utils.get_total_norm(whole).double().square()
    return squares.sqrt()


class VectorSum:
    """Sums vectors over ranks, in a few flat buckets that start as soon as all vectors of theirs are ready.

    All ranks start the buckets in the same order, whatever the order in which their vectors become ready.

    Args:
        ranks: that sum.
        nbytes: of each vector, in the order in which they are expected to become ready.
        bucket_bytes: at most so many in a bucket, if it holds more than one vector.
    """

    def __init__(self, ranks: Ranks, nbytes: dict[Any, int], bucket_bytes: int = 25 * 2**20) -> None:
        self.ranks = ranks
        self._buckets: list[list[Any]] = []
        room = 0
        for key, size in nbytes.items():
            if not self._buckets or size > room:
                self._buckets.append([])
                room = bucket_bytes
            self._buckets[-1].append(key)
            room -= size
        self._vectors: dict[Any, Tensor] = {}
        self._started: list[tuple[Tensor, dist.Work]] = []
        self.nbytes = sum(nbytes.values())

    def missing(self) -> list[Any]:
        """Vectors that are not ready yet."""
        return [key for bucket in self._buckets for key in bucket if key not in self._vectors]

    def ready(self, key: Any, vector: Tensor) -> None:
        """A vector is complete on this rank."""
        self._vectors[key] = vector
        for bucket in self._buckets[len(self._started) :]:
            if not all(other in self._vectors for other in bucket):
                break
            flat = torch.cat([self._vectors[other] for other in bucket])
            self._started.append((flat, self.ranks.start_sum_(flat)))

    def finish(self) -> dict[Any, Tensor]:
        """Wait for the sums; every vector must have become ready."""
        assert not self.missing()
        found: dict[Any, Tensor] = {}
        for bucket, (flat, work) in zip(self._buckets, self._started, strict=True):
            work.wait()
            found.update(zip(bucket, flat.split([self._vectors[key].numel() for key in bucket]), strict=True))
        return found
