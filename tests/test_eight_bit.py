"""Moments in 8 bits: rounding, resume, refresh, skipped steps, sizes, and a training beside float32 moments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_same_bits, loss_of, network, optimizer_of, random_indices, saved_and_loaded, snapshot, train

from lift_lightning import SparseAdamW
from lift_lightning.cli import LiftCLI, lightning_cli
from lift_lightning.eight_bit import BlockwiseVector, _book
from lift_lightning.errors import ConfigError


@given(st.integers(1, 700), st.integers(-12, 3), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_what_was_rounded_once_keeps_its_codes(size: int, exponent: int, signed: bool, seed: int):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    values = values if signed else values.square()
    vector = BlockwiseVector(values, signed=signed)
    codes, scales, rounded = vector.codes.clone(), vector.scales.clone(), vector.to(torch.float32)
    vector.copy_(rounded)
    assert torch.equal(vector.codes, codes)
    assert torch.equal(vector.scales, scales)
    assert torch.equal(vector.to(torch.float32), rounded)
    for block, whole in zip(rounded.split(256), values.split(256), strict=True):
        assert float((block - whole).abs().max()) <= 0.015 * float(whole.abs().max())


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_value_is_what_bucketize_finds(signed: bool):
    book = _book(signed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(200_000, generator=generator) * 10.0 ** -(torch.rand(200_000, generator=generator) * 9)
    limits = book.above[:-1]
    beside = [torch.nextafter(limits, torch.tensor(end)) for end in (-2.0, 2.0)]
    numbers = torch.cat([random.clamp(-1, 1), limits, *beside, book.values, torch.tensor([0.0, -0.0, 1e-45])])
    numbers = numbers if signed else numbers.abs()
    assert torch.equal(book.nearest(numbers).long(), torch.bucketize(numbers, limits))


def eight_bit(seed: int = 0, **others) -> tuple[torch.nn.Module, SparseAdamW]:
    model = network(seed=seed)
    optimizer = optimizer_of(model, state_dtype="8bit", **others)
    for i, (_, parameter, _) in enumerate(optimizer.sparse_parameters()):
        optimizer.set_indices(parameter, random_indices(parameter.numel(), parameter.numel() // 2, seed=i))
    return model, optimizer


def codes_of(optimizer: SparseAdamW) -> list[torch.Tensor]:
    states = [optimizer._sparse[p] for _, p, _ in optimizer.sparse_parameters()]
    moments = [m for s in states for m in (s.exp_avg, s.exp_avg_sq)]
    return [t.clone() for m in moments for t in (m.codes, m.scales)]


def test_resume_is_bit_equal_from_a_checkpoint_in_float32():
    model, optimizer = eight_bit()
    train(model, optimizer, range(4))
    saved = saved_and_loaded(optimizer.state_dict())
    assert all(
        tensors[key].dtype == torch.float32
        for tensors in saved["sparse"]["parameters"].values()
        for key in ("exp_avg", "exp_avg_sq")
    )
    other, resumed = eight_bit()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for a, b in zip(codes_of(optimizer), codes_of(resumed), strict=True):
        assert torch.equal(a, b)
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert_same_bits(snapshot(model), snapshot(other))


def test_a_skipped_step_leaves_every_code():
    model, optimizer = eight_bit()
    train(model, optimizer, range(3))
    before, weights = codes_of(optimizer), snapshot(model)
    loss_of(model, 4).mul(float("inf")).backward()
    optimizer.step()
    assert float(optimizer.skipped_steps) == 1
    assert_same_bits(weights, snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(before, codes_of(optimizer), strict=True))


def test_a_refresh_carries_the_moments_of_what_stays():
    model, optimizer = eight_bit()
    train(model, optimizer, range(3))
    _, parameter, _ = next(iter(optimizer.sparse_parameters()))
    old = optimizer.indices(parameter).clone()
    values = dict(zip(old.tolist(), optimizer._sparse[parameter].exp_avg.to(torch.float32).tolist(), strict=True))
    new = (
        torch.cat([old[::2], torch.tensor([i for i in range(parameter.numel()) if i not in values][:5])]).sort().values
    )
    optimizer.set_indices(parameter, new)
    carried = optimizer._sparse[parameter].exp_avg.to(torch.float32)
    expected = torch.tensor([values.get(i, 0.0) for i in new.tolist()])
    torch.testing.assert_close(carried, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    assert all(carried[i] == 0 for i, place in enumerate(new.tolist()) if place not in values)


def test_dense_moments_in_eight_bits_resume_and_take_a_quarter():
    def dense(seed: int = 0, **others):
        model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.ReLU(), torch.nn.Linear(80, 3))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        return model, SparseAdamW(model.named_parameters(), lr=1e-2, **others)

    def steps(model, optimizer, numbers):
        for number in numbers:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(number))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = dense(state_dtype="8bit")
    plain, reference = dense()
    steps(model, optimizer, range(5))
    steps(plain, reference, range(5))
    big = 64 * 80 * 2 * 4
    small = (80 + 240 + 3) * 2 * 4  # fewer than 4096 entries keep their precision
    assert reference.state_bytes() == big + small
    assert optimizer.state_bytes() == big // 4 + 2 * 20 * 4 + small
    assert "exp_avg" not in optimizer.state[model[0].weight]
    saved = saved_and_loaded(optimizer.state_dict())
    other, resumed = dense(seed=1, state_dtype="8bit")
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    steps(model, optimizer, range(5, 9))
    steps(other, resumed, range(5, 9))
    assert_same_bits(snapshot(model), snapshot(other))
    _, wide = dense()
    with pytest.raises(ConfigError, match="1 dense parameters with moments in 8 bits, this optimizer 0"):
        wide.load_state_dict(saved)


def test_no_second_moment_is_rounded_to_zero():
    """An entry of an embedding whose token was in one batch only: its first moment would be divided by eps alone."""
    parameter = torch.nn.Parameter(torch.zeros(64, 80))
    optimizer = SparseAdamW([parameter], lr=1.0, state_dtype="8bit")
    parameter.grad = torch.ones(64, 80)
    parameter.grad[0, 0] = 1e-4  # its square is 1e-8 of the block's largest, and the lowest value of the map 3e-7
    optimizer.step()
    parameter.grad = torch.zeros(64, 80)
    before = parameter.detach().clone()
    optimizer.step()
    assert float((parameter.detach() - before)[0, 0].abs()) < 1.0


def test_unknown_dtypes_are_refused():
    with pytest.raises(ConfigError, match="state_dtype must be a floating dtype or '8bit', got 4bit"):
        optimizer_of(network(), state_dtype="4bit")


def test_loss_after_a_hundred_steps_is_that_of_float32_moments(tmp_path: Path):
    """Within 1%, as validated on held-out rows, at 0.55 of the bytes of indices and moments or less."""
    losses, sizes = {}, {}
    for dtype in ("float32", "8bit"):
        cli = quickstart(dtype, tmp_path / dtype)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        (found,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        losses[dtype] = found["val_loss"]
        optimizer = cli.trainer.optimizers[0]
        gradients = sum(4 * optimizer.indices(p).numel() for _, p, _ in optimizer.sparse_parameters())
        sizes[dtype] = optimizer.state_bytes() - gradients
    assert losses["8bit"] == pytest.approx(losses["float32"], rel=0.01)
    assert sizes["8bit"] <= 0.55 * sizes["float32"]


def quickstart(dtype: str, folder: Path) -> LiftCLI:
    options = {
        "config": "configs/quickstart.yaml",
        "model.state_dtype": dtype,
        "trainer.max_steps": "100",
        "data.batch_size": "8",
        "trainer.logger": "false",
        "trainer.callbacks": "[]",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": str(folder),
    }
    return lightning_cli([part for name, value in options.items() for part in (f"--{name}", value)], run=False)
