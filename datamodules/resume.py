"""A training loader that goes on at the next unseen sample after a resume.

Lightning saves and restores every training loader that has `state_dict` and `load_state_dict`. Three habits of its
loops shape this file (Lightning 2.6, `fit_loop.py` and `training_epoch_loop.py`):

- `iter(loader)` is called in `setup_data`, before the sampler is told its epoch. So nothing is drawn before the first
  `next`.
- An epoch is never run to `StopIteration` when the loader has a length: Lightning stops after `len(loader)` or
  `limit_train_batches` batches, then calls `sampler.set_epoch`. So a changed epoch, not exhaustion, is what starts
  again at 0.
- A checkpoint of the last batch names that epoch and that batch; the epoch given to `set_epoch` on resume is the next
  one. So a restored position counts only in the epoch it was saved in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from lift_lightning.datamodules.rows import DataError

# Batches of like lengths are drawn from pools of so many: more pad less, fewer leave more to chance.
_POOL_BATCHES = 50


def mended_epoch(trainer: Any) -> int:
    """The epoch whose first batch is about to be drawn; puts Lightning's counters right where a resume left them wrong.

    While epoch e runs they should read: ready and started e + 1, processed and completed e. Lightning 2.6 leaves two
    gaps:

    - Resumed from the last batch of an epoch, the next one is not counted as ready and started. Checkpoints of it look
      as if they lay between two epochs, so the next resume starts it again or goes on in the wrong one.
    - Resumed with `max_steps` from a checkpoint of `on_train_epoch_end`, that epoch ends a second time: it is
      processed twice, and `set_epoch` skips one.
    """
    loop = trainer.fit_loop
    progress = loop.epoch_progress
    for counts in (progress.total, progress.current):
        if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
            counts.ready = max(counts.ready, counts.completed + 1)
            counts.started = max(counts.started, counts.completed + 1)
        # Only at the start of an epoch: at its end it is rightly processed before it is completed.
        if loop.epoch_loop.batch_progress.current.ready == 0:
            counts.processed = min(counts.processed, counts.completed)
    return trainer.current_epoch


class EpochSampler(DistributedSampler):
    """Sample order as a pure function of (seed, epoch), sharded by rank, that can start in the middle.

    It is a `DistributedSampler` so that Lightning, which replaces every other sampler on several devices (and with it
    the order and the position), leaves it alone. Rank and world size are given, so no process group is needed. Nothing
    is
    dropped: with several ranks the shorter ones repeat the first samples of the epoch, as torch's own sampler does.

    Args:
        dataset: Anything with a length.
        shuffle: Permute the samples anew in every epoch.
        seed: Seed of all permutations.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        lengths: Of the samples; where they are given, samples of one batch are of about the same length.
        together: Samples of a batch, over all ranks.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
        together: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.start = 0
        self.lengths = lengths
        self.together = together

    def __iter__(self) -> Iterator[int]:
        """This rank's sample numbers, from `start` on. `len()` stays that of the whole epoch: Lightning counts "
        "against it."""
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            # A generator of its own: the global one belongs to the model (dropout), and drawing here would shift it on
            # resume. Seeds and epochs are mixed, else epoch 1 of seed 43 would be epoch 0 of seed 44.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(size, generator=generator).tolist()
            if self.lengths is not None:
                order = self._grouped(order, generator)
        else:
            order = list(range(size))
        while len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        return iter(order[self.rank : self.total_size : self.num_replicas][self.start :])

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Batches of like lengths from pools of the permutation, in any order; what fills no batch comes last."""
        assert self.lengths is not None
        pool = _POOL_BATCHES * self.together
        whole = len(order) - len(order) % self.together
        batches: list[list[int]] = []
        for first in range(0, whole, pool):
            by_length = sorted(order[first : min(first + pool, whole)], key=self.lengths.__getitem__)
            batches += [by_length[i : i + self.together] for i in range(0, len(by_length), self.together)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [sample for batch in shuffled for sample in batches[batch]] + order[whole:]


class ResumableDataLoader(DataLoader):
    """`DataLoader` whose state is the number of batches handed to the consumer in this epoch.

    Batches that workers have prefetched are not counted. A loop of one's own needs no `set_epoch`: an epoch run to its
    end moves to the next one; one that is left early starts again from its beginning.

    Args:
        dataset: A map-style dataset.
        batch_size: Samples per batch and rank.
        shuffle: Permute the samples anew in every epoch.
        seed: Seed of all permutations.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        sampler: Not for users. Lightning rebuilds loaders with a sampler of its own
            (`Trainer(overfit_batches=...)`) together
            with the `shuffle` it wants; ours obeys `shuffle`, keeps its shard, and stays resumable.
        lengths: Of the samples, to make batches of about the same length; default: batches are drawn at random.
        current_epoch: Tells the epoch when its first batch is drawn; default: as set on the sampler, or counted here.
        **kwargs: As for `DataLoader`: `collate_fn`, `num_workers`, ...
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        sampler: Sampler | None = None,
        lengths: Sequence[int] | None = None,
        current_epoch: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("batch_sampler", None) is not None or kwargs.get("drop_last"):
            raise ValueError(
                "ResumableDataLoader takes neither batch_sampler nor drop_last: it counts batches of batch_size"
            )
        # Lightning reads these attributes when it rebuilds a loader.
        self.shuffle, self.seed, self.num_replicas, self.rank = shuffle, seed, num_replicas, rank
        self.lengths = lengths
        self.current_epoch = current_epoch
        self._position = (0, 0)  # epoch, batches handed out in it
        self._restored = False
        order = EpochSampler(
            dataset,  # type: ignore[arg-type]
            shuffle=shuffle,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            lengths=lengths,
            together=batch_size * num_replicas,
        )
        # Without a generator every iterator would draw the workers' base seed from the global one.
        kwargs["generator"] = torch.Generator().manual_seed(seed % 2**63)
        super().__init__(dataset, batch_size=batch_size, sampler=order, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """A generator: nothing happens, and no worker starts, before the first `next`."""
        order: EpochSampler = self.sampler  # type: ignore[assignment]
        if self.current_epoch is not None:
            order.set_epoch(self.current_epoch())
        epoch = order.epoch
        batches = self._batches_of(epoch) if self._restored else 0
        self._restored = False
        self._position = (epoch, batches)
        order.start = batches * self._samples_per_batch()
        for count, batch in enumerate(super().__iter__(), start=batches + 1):
            self._position = (epoch, count)
            yield batch
        order.set_epoch(epoch + 1)
        self._position = (epoch + 1, 0)

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches handed out in it, with what must not change for them to mean the same samples."""
        epoch = self.sampler.epoch  # type: ignore[attr-defined]
        return {"epoch": epoch, "batches": self._batches_of(epoch), **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batch at which the state was saved, in the epoch it was saved in.

        Raises:
            DataError: The data or the batches are not those of the saved run.
        """
        here = self._identity()
        changed = [
            f"{key} was {state_dict.get(key)}, is {value}"
            for key, value in here.items()
            if state_dict.get(key) != value
        ]
        if changed and state_dict["batches"]:
            raise DataError(
                f"cannot resume after batch {state_dict['batches']} of epoch {state_dict['epoch']}: "
                f"{'; '.join(changed)}, so the next unseen sample is not defined. Set it back, or start a new run "
                "from the weights (no ckpt_path)"
            )
        self._position = (state_dict["epoch"], state_dict["batches"])
        self._restored = True
        self.sampler.set_epoch(state_dict["epoch"])  # type: ignore[attr-defined]

    def _samples_per_batch(self) -> int:
        assert self.batch_size is not None
        return self.batch_size

    def _batches_of(self, epoch: int) -> int:
        """Batches handed out in `epoch`: the sampler may have been told of a new one since the last batch."""
        return self._position[1] if self._position[0] == epoch else 0

    def _identity(self) -> dict[str, int]:
        # Ranks take turns in the order, so two ranks of four samples see the same global batches as one rank of eight.
        return {
            "samples": len(self.sampler.dataset),  # type: ignore[attr-defined]
            "samples_per_global_batch": self._samples_per_batch() * self.num_replicas,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "group_by_length": int(self.lengths is not None),
        }
