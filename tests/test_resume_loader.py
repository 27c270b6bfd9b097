"""A plain DataLoader that resumes in the middle of an epoch reads its first rows again. This one goes on."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lift_lightning.datamodules.resume import EpochSampler, ResumableDataLoader, mended_epoch
from lift_lightning.datamodules.rows import DataError

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
# Lightning advises on the number of workers and on missing loggers; nothing here is about that.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def loader(samples=10, batch_size=2, seed=1, **options):
    return ResumableDataLoader(list(range(samples)), batch_size, seed=seed, **options)


def ids(iterator, n=None):
    taken = list(iterator) if n is None else [next(iterator) for _ in range(n)]
    return [batch.tolist() for batch in taken]


def test_order_is_a_function_of_seed_and_epoch():
    one = loader()
    first, second = ids(one), ids(one)
    assert sorted(sum(first, [])) == list(range(10))
    assert first != second
    other = loader()
    other.sampler.set_epoch(1)
    assert ids(other) == second
    assert ids(loader(seed=2)) not in (first, second)
    assert ids(loader(shuffle=False)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_the_last_batch_is_kept():
    assert len(loader(samples=5)) == 3
    assert [len(batch) for batch in ids(loader(samples=5))] == [2, 2, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_goes_on_with_the_next_batch(workers, taken):
    # Two workers have fetched up to 4 batches ahead of the one handed out; those do not count.
    whole = loader()
    expected = ids(whole) + ids(whole)
    saved = loader(num_workers=workers)
    iterator = iter(saved)
    assert ids(iterator, taken) == expected[:taken]
    state = saved.state_dict()
    assert (state["epoch"], state["batches"]) == (0, taken)
    resumed = loader(num_workers=workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # before its first batch too
    assert len(resumed) == 5
    assert ids(resumed) == expected[taken:5]
    assert ids(resumed) == expected[5:]


def test_state_between_epochs():
    one = loader()
    list(one)
    assert one.state_dict()["epoch"] == 1
    assert one.state_dict()["batches"] == 0
    # Lightning tells the epoch, and may save, before the first batch of it is drawn: the five batches were of epoch 0.
    one = loader()
    iterator = iter(one)
    ids(iterator, 5)
    assert (one.state_dict()["epoch"], one.state_dict()["batches"]) == (0, 5)
    one.sampler.set_epoch(1)
    assert (one.state_dict()["epoch"], one.state_dict()["batches"]) == (1, 0)


def test_a_restored_position_counts_in_its_own_epoch_only():
    one = loader()
    expected = [ids(one), ids(one)]
    state = {**loader().state_dict(), "epoch": 0, "batches": 3}
    resumed = loader()
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(1)
    assert ids(resumed) == expected[1]


def test_leaving_an_epoch_early_starts_it_again():
    one = loader()
    expected = ids(loader())
    for _ in one:
        break
    assert ids(one) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(workers):
    before = torch.get_rng_state()
    one = loader(num_workers=workers)
    list(one)
    iter(one)
    one.load_state_dict({**one.state_dict(), "batches": 1})
    list(one)
    assert torch.equal(torch.get_rng_state(), before)


def test_persistent_workers():
    one = loader(num_workers=1, persistent_workers=True)
    plain = loader()
    assert [ids(one), ids(one)] == [ids(plain), ids(plain)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 9}, "samples was 10, is 9"),
        ({"batch_size": 5}, "samples_per_global_batch was 2, is 5"),
        ({"seed": 7}, "seed was 1, is 7"),
        ({"shuffle": False}, "shuffle was 1, is 0"),
    ],
)
def test_another_order_cannot_be_resumed(options, message):
    state = {**loader().state_dict(), "batches": 3}
    with pytest.raises(ValueError, match=f"cannot resume after batch 3 of epoch 0: {message}.*Set it back"):
        loader(**options).load_state_dict(state)
    loader(**options).load_state_dict({**state, "batches": 0})  # nothing seen yet: any order will do


def test_unsupported_options():
    for options in ({"drop_last": True}, {"batch_sampler": [[0]]}):
        with pytest.raises(ValueError, match="neither batch_sampler nor drop_last"):
            loader(**options)


def test_ranks_share_an_epoch():
    ranks = [loader(batch_size=2, num_replicas=2, rank=rank) for rank in range(2)]
    shards = [ids(rank) for rank in ranks]
    # 10 samples, 5 per rank: 3 batches of 2, 2, 1. Nothing is dropped, nothing is seen twice.
    assert sorted(sum(shards[0] + shards[1], [])) == list(range(10))
    # Together they see the batches that one rank of twice the size sees.
    single = ids(loader(batch_size=4))
    assert [sorted(a + b) for a, b in zip(*shards, strict=True)] == [sorted(batch) for batch in single]
    assert ranks[0].state_dict() == loader(batch_size=4).state_dict() | {"epoch": 1}
    # 3 samples on 2 ranks: torch's rule, one is repeated so that the ranks take as many steps.
    assert [len(EpochSampler(range(3), num_replicas=2, rank=rank)) for rank in range(2)] == [2, 2]
    assert {i for rank in range(2) for i in EpochSampler(range(3), num_replicas=2, rank=rank)} == {0, 1, 2}


LENGTHS = [(7 * i) % 101 for i in range(1007)]


def grouped(**options):
    return loader(samples=1007, batch_size=4, lengths=LENGTHS, **options)


def test_batches_of_like_lengths():
    one = grouped()
    first, second = ids(one), ids(one)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(1007))
    assert [len(batch) for batch in first] == [4] * 251 + [3]  # what fills no batch comes last
    assert first != second

    def spread(batches):
        lengths = [[LENGTHS[i] for i in batch] for batch in batches[:-1]]
        return sum(max(batch) - min(batch) for batch in lengths) / len(lengths)

    assert spread(first) < 5 < 50 < spread(ids(loader(samples=1007, batch_size=4)))
    longest = [max(LENGTHS[i] for i in batch) for batch in first[:-1]]
    assert longest != sorted(longest)  # the batches themselves come in any order


def test_batches_of_like_lengths_go_on_and_are_shared_by_ranks():
    whole = ids(grouped())
    saved = grouped()
    iterator = iter(saved)
    ids(iterator, 100)
    again = grouped()
    again.load_state_dict(saved.state_dict())
    assert ids(again) == whole[100:]
    with pytest.raises(DataError, match="group_by_length was 1, is 0"):
        loader(samples=1007, batch_size=4).load_state_dict(saved.state_dict())
    ranks = [loader(samples=1007, batch_size=2, lengths=LENGTHS, num_replicas=2, rank=rank) for rank in range(2)]
    two = [ids(iter(rank), 251) for rank in ranks]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in whole[:251]]


def test_lightning_leaves_the_sampler_alone_on_several_devices():
    # It wraps every sampler that is not a DistributedSampler, and the order and the position would be lost.
    assert isinstance(loader().sampler, DistributedSampler)
    trainer = Trainer(**QUIET, devices=2, strategy="ddp")
    assert not trainer._data_connector._requires_distributed_sampler(loader())
    assert trainer._data_connector._requires_distributed_sampler(DataLoader(range(4)))


class Recorder(LightningModule):
    """Keeps (epoch, sample ids) of every batch it is trained on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.tolist()))
        return self.layer(batch[:, None].float()).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 0.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(folder, *, ckpt_path=None, workers=0, validate=True, every=None, samples=10, **trainer_options):
    """Train on 5 batches per epoch and keep every checkpoint; returns what was seen."""
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **(every or {"every_n_train_steps": 1}))
    limit = None if validate else 0
    trainer = Trainer(**QUIET, callbacks=[checkpoint], limit_val_batches=limit, **trainer_options)
    module = Recorder()
    train = loader(samples, num_workers=workers, current_epoch=partial(mended_epoch, trainer))
    trainer.fit(module, train, DataLoader(range(2)) if validate else None, ckpt_path=ckpt_path)
    return module.seen


LIMITS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 15},
    "limited-epochs": {"max_epochs": 4, "limit_train_batches": 3},
    "limited-steps": {"max_steps": 12, "limit_train_batches": 3},
    "stop-mid-epoch": {"max_steps": 13},
    "validation-mid-epoch": {"max_epochs": 3, "val_check_interval": 2},
}


@pytest.mark.parametrize("validate", [True, False], ids=["val", "no-val"])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_resume_at_every_step(tmp_path, limits, validate):
    whole = fit(tmp_path / "a", validate=validate, **limits)
    per_epoch = limits.get("limit_train_batches", 5)
    assert [epoch for epoch, _ in whole] == [step // per_epoch for step in range(len(whole))]
    assert len({str(batch) for _, batch in whole[:per_epoch]}) == per_epoch
    for step in range(1, len(whole)):  # within epochs, at their last batch, at the first of the next
        resumed = fit(tmp_path / f"b{step}", ckpt_path=tmp_path / f"a/step={step}.ckpt", validate=validate, **limits)
        assert resumed == whole[step:], f"resumed after step {step}"


@pytest.mark.parametrize("step", [1, 4, 5, 6])
def test_resume_with_workers(tmp_path, step):
    limits = {"max_epochs": 2}
    whole = fit(tmp_path / "a", **limits)
    assert fit(tmp_path / "w", workers=2, **limits) == whole
    assert fit(tmp_path / "b", workers=2, ckpt_path=tmp_path / f"w/step={step}.ckpt", **limits) == whole[step:]


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 15}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "every",
    [{"every_n_epochs": 1, "save_on_train_epoch_end": end} for end in (True, False)],
    ids=["train-epoch-end", "validation-end"],
)
def test_resume_from_the_end_of_an_epoch(tmp_path, every, limits):
    # With max_steps, Lightning 2.6 skipped an epoch after a checkpoint of on_train_epoch_end (see mended_epoch).
    whole = fit(tmp_path / "a", every=every, **limits)
    for first in (5, 10):
        ckpt_path = tmp_path / f"a/step={first}.ckpt"
        assert fit(tmp_path / f"b{first}", ckpt_path=ckpt_path, every=every, **limits) == whole[first:]
        fit(tmp_path / f"c{first}", ckpt_path=ckpt_path, **limits)
        for second in range(first + 1, len(whole)):
            ckpt_path = tmp_path / f"c{first}/step={second}.ckpt"
            resumed = fit(tmp_path / f"d{first}-{second}", ckpt_path=ckpt_path, **limits)
            assert resumed == whole[second:], f"resumed after steps {first} and {second}"


@pytest.mark.parametrize("validate", [True, False], ids=["val", "no-val"])
@pytest.mark.parametrize("limits", [LIMITS["epochs"], LIMITS["steps"], LIMITS["limited-steps"]])
def test_resume_twice(tmp_path, limits, validate):
    # Killed at the last batch of an epoch, resumed, killed again: Lightning 2.6 then started the second epoch from its
    # beginning or read the order of the wrong epoch, because its counters were one behind (see mended_epoch).
    whole = fit(tmp_path / "a", validate=validate, **limits)
    last = limits.get("limit_train_batches", 5)
    for first in (last - 1, last, 2 * last):
        once = tmp_path / f"b{first}"
        fit(once, ckpt_path=tmp_path / f"a/step={first}.ckpt", validate=validate, **limits)
        for second in {first + 1, first + 2, first + last} - {len(whole)}:
            folder = tmp_path / f"c{first}-{second}"
            resumed = fit(folder, ckpt_path=once / f"step={second}.ckpt", validate=validate, **limits)
            assert resumed == whole[second:], f"resumed after steps {first} and {second}"


def test_epoch_counters_after_two_resumes(tmp_path):
    # Through validation-end and last-batch checkpoints alike, an epoch is never run twice nor left out.
    ends = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    fit(tmp_path / "a", every=ends, max_steps=15)
    fit(tmp_path / "b", ckpt_path=tmp_path / "a/step=5.ckpt", every=ends, max_steps=15)
    state = torch.load(tmp_path / "b/step=15.ckpt", weights_only=False)
    assert state["epoch"] == torch.load(tmp_path / "a/step=15.ckpt", weights_only=False)["epoch"]
    progress = state["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert progress == {"ready": 3, "started": 3, "processed": 3, "completed": 2}


def test_overfit_batches(tmp_path):
    # Lightning rebuilds the loader with a sequential sampler; it stays ours, in order, and resumable.
    whole = fit(tmp_path / "a", max_epochs=2, overfit_batches=3)
    assert whole == [(epoch, [2 * i, 2 * i + 1]) for epoch in range(2) for i in range(3)]
    resumed = fit(tmp_path / "b", max_epochs=2, overfit_batches=3, ckpt_path=tmp_path / "a/step=2.ckpt")
    assert resumed == whole[2:]
