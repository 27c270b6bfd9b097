"""What all data have in common: a tokenizer, a resumable loader to train on, loaders to evaluate on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lift_lightning.datamodules.resume import ResumableDataLoader, mended_epoch
from lift_lightning.datamodules.rows import DataError
from lift_lightning.datamodules.shards import EvaluationShard
from lift_lightning.evaluation.classification import Classification
from lift_lightning.prompts import choose_pad_id

if TYPE_CHECKING:
    import datasets


DEFAULT_SEED = 43  # of the released code


class FineTuningDataModule(LightningDataModule, ABC):
    """Tokenised rows to train on, in an order that a resume goes on with, and rows to evaluate on.

    What the rows are is up to the classes on top: `setup` makes `train_dataset`, with the columns that
    `collate_training` takes and `full_length`.

    Args:
        path: Rows: local files or a Hugging Face hub id; null where there is nothing to train on.
        tokenizer: A tokenizer, or the folder or hub id of one; on the command line model.model_name_or_path if not
            given.
        batch_size: Examples per batch and device.
        max_length: Most tokens per training example; what is longer is cut, counted and reported.
        eval_batch_size: Examples per batch in validation and test; default: batch_size.
        num_workers: Worker processes per loader.
        seed: Seed of the rows that are drawn and of the order of training; on the command line seed_everything if not
            given, else 43.
        revision: Branch, tag or commit of a hub dataset.
        tokenizer_revision: Branch, tag or commit of a hub tokenizer; on the command line model.revision with the
            model's tokenizer.
        pad_token: Token to pad with; default: the tokenizer's, else its EOS.
        cache_dir: Folder for tokenised data; default: a folder in the cache of Hugging Face datasets.
        max_samples: Train on at most so many rows, drawn by the seed; rows to evaluate on do not depend on it.
        pad_to_multiple_of: Round the length of every training batch up to a multiple of this.
        group_by_length: Put rows of about the same length into a batch, so that little of it is padding.
    """

    classification: Classification | None = None  # what the labels of the rows are; None for text

    def __init__(
        self,
        path: str | None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        max_length: int = 2048,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        pad_token: str | None = None,
        cache_dir: str | None = None,
        max_samples: int | None = None,
        pad_to_multiple_of: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        super().__init__()
        at_least_one(batch_size=batch_size, max_length=max_length, eval_batch_size=eval_batch_size)
        at_least_one(max_samples=max_samples, pad_to_multiple_of=pad_to_multiple_of)
        self.path = path
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = DEFAULT_SEED if seed is None else seed
        self.revision = revision
        self.tokenizer_revision = tokenizer_revision
        self.pad_token = pad_token
        self.cache_dir = cache_dir
        self.max_samples = max_samples
        self.pad_to_multiple_of = pad_to_multiple_of
        self.group_by_length = group_by_length
        self.train_dataset: datasets.Dataset | None = None
        self._pad_token_id: int | None = None
        self._train_loader: ResumableDataLoader | None = None
        self._loader_state: dict[str, int] | None = None

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenise what the stage needs, once."""

    @abstractmethod
    def collate_training(self) -> Callable[..., Any]:
        """What makes a batch of examples of `train_dataset`."""

    @property
    @abstractmethod
    def test_tasks(self) -> list[str]:
        """Task names in the order of the test loaders."""

    def prepare_data(self) -> None:
        """On one process per node: download and tokenise, so that the other ranks find it in the cache."""
        if self.trainer is not None and self.trainer.state.fn in ("fit", "validate"):
            self.setup(self.trainer.state.fn)

    def train_dataloader(self) -> ResumableDataLoader:
        trainer, dataset = self.trainer, self._ready(self.train_dataset, "fit")
        lengths = [min(n, self.max_length) for n in dataset["full_length"]] if self.group_by_length else None
        self._train_loader = ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            num_workers=self.num_workers,
            collate_fn=self.collate_training(),
            lengths=lengths,
            current_epoch=partial(mended_epoch, trainer) if trainer is not None else None,
        )
        state, self._loader_state = self._loader_state, None  # a state that is refused must not be met again
        if state is not None:
            self._train_loader.load_state_dict(state)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Position in the training rows.

        Lightning saves it with its loop as well, but restores that too late where `configure_optimizers` has asked for
        the number of batches, which makes the loaders before the loop's state is there.
        """
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the next unseen row; a checkpoint that is only tested moves nothing."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        state = state_dict.get("train_loader")
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self._loader_state = state
        elif state is not None and self._train_loader is not None:
            # FSDP2 reads a checkpoint when optimizers, and with them the loader whose length they ask for, are there.
            self._train_loader.load_state_dict(state)

    @property
    def pad_token_id(self) -> int:
        """Id that fills batches; known after `setup`."""
        return self._ready(self._pad_token_id, "fit")

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens and all."""
        return str(self._ready_tokenizer().decode(ids))

    def _ready_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DataError("there is no tokenizer: pass tokenizer=..., or set --data.tokenizer to a folder or hub id")
        if isinstance(self.tokenizer, (str, Path)):
            from lift_lightning.models import load_tokenizer

            self.tokenizer = load_tokenizer(str(self.tokenizer), self.tokenizer_revision)
        if self._pad_token_id is None:
            self._pad_token_id = self._choose_pad_token(self.tokenizer)
        return self.tokenizer

    def _choose_pad_token(self, tokenizer: PreTrainedTokenizerBase) -> int:
        try:
            token_id = choose_pad_id(tokenizer, self.pad_token)
        except ValueError as err:
            raise DataError(str(err)) from None
        if self.pad_token is None and tokenizer.pad_token_id is None:
            rank_zero_info(f"the tokenizer has no pad token: padding with its EOS {tokenizer.eos_token!r}")
        return token_id

    def _eval_loader(self, dataset: Any, collate: Callable[..., Any], blank: Callable[..., Any]) -> DataLoader:
        """In file order. On several devices the ranks take turns; `blank` makes rows that fill up the last turn."""
        if self.trainer is not None and self.trainer.world_size > 1:
            dataset = EvaluationShard(dataset, self.trainer.world_size, self.trainer.global_rank, blank)
        # A generator of its own: without one, every iterator draws its workers' seed from the global one.
        generator = torch.Generator().manual_seed(self.seed)
        # Of one rank, whatever there are: Lightning would replace any other sampler by one that repeats rows.
        order: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(
            dataset,
            self.eval_batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=generator,
        )

    @staticmethod
    def _ready(value: Any, stage: str) -> Any:
        if value is None:
            raise RuntimeError(f"call setup({stage!r}) first; the Trainer does it by itself")
        return value


def at_least_one(**sizes: int | None) -> None:
    """Check arguments that may be left out, but not 0.

    Raises:
        DataError: naming the argument.
    """
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, got {value}: set --data.{name}")
