"""What only a CUDA device can show: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from distributed_runs import SAVED, fit, work
from oracles import assert_same_choice, low_rank, stable_top_k
from ranks import run_ranks
from tiny import save_tiny_llama, tiny_llama, write_sums
from torch import nn

from lift_lightning import (
    DecompositionError,
    SelectionConfig,
    SparseAdamW,
    build_param_groups,
    refresh_masks,
    select,
    select_indices,
)
from lift_lightning.indices import top_k_indices, top_k_of_parts
from lift_lightning.lowrank import low_rank_factors
from lift_lightning.threads import on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_on_the_device_are_those_of_the_float64_svd(dtype):
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = SelectionConfig(density=0.05, lra_rank=16, solver="exact")
    ours = select_indices(weight.cuda(), config)
    assert ours.is_cuda
    assert_same_choice(ours.cpu(), low_rank(weight, 16).abs(), 7500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_never_waits_for_the_device(dtype):
    model = tiny_llama().to("cuda", dtype)
    optimizer = SparseAdamW(build_param_groups(model, modules_to_train=r"\.norm\.weight"))
    refresh_masks(optimizer, SelectionConfig(rank=2))
    tokens = torch.randint(0, 259, (2, 16), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            model(input_ids=tokens).logits.float().square().mean().backward()
            optimizer.scale_grads_(1.0 / torch.full((), 7, device="cuda"))
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(optimizer.skipped_steps) == 0


def test_decompositions_run_on_another_device_than_the_weights():
    model = tiny_llama()
    optimizer = SparseAdamW(build_param_groups(model))
    refresh_masks(optimizer, SelectionConfig(rank=2), device="cuda")
    assert all(not optimizer.indices(p).is_cuda for _, p, _ in optimizer.sparse_parameters())
    on_cpu = [optimizer.indices(p).clone() for _, p, _ in optimizer.sparse_parameters()]
    assert refresh_masks(optimizer, SelectionConfig(rank=2)).overlap > 0.999
    assert len(on_cpu) == 14


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tf32():
    """Products of float32 in TF32, as many set it for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


SUBSPACE = SelectionConfig(density=0.05, lra_rank=16, solver="subspace")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(600, 1000), (1000, 600)], ids=["wide", "tall"])
def test_the_subspace_mask_is_the_cpus_and_nearly_the_exact_one(shape: tuple[int, int], dtype: torch.dtype):
    weight = gaussian(*shape).to(dtype)
    cpu, cuda = select(weight, SUBSPACE), select(weight.cuda(), SUBSPACE)
    assert cuda.indices.is_cuda
    assert cuda.basis.is_cuda
    assert cuda.solved[0].solver == "subspace"
    k = cpu.indices.numel()
    assert int(torch.isin(cuda.indices.cpu(), cpu.indices).sum()) >= 0.999 * k
    exact = stable_top_k(low_rank(weight, 16).abs(), k)
    assert int(torch.isin(cuda.indices.cpu(), exact).sum()) >= (1 - 2 * SUBSPACE.tolerance) * k
    warm = select(weight.cuda(), SUBSPACE, basis=cpu.basis)  # a basis from elsewhere
    assert int(torch.isin(warm.indices.cpu(), exact).sum()) >= (1 - 2 * SUBSPACE.tolerance) * k


@pytest.mark.parametrize("solver", ["exact", "subspace"])
def test_tf32_and_autocast_do_not_reach_the_mask(solver: str, tf32: None):
    weight = gaussian(600, 1000).cuda()
    config = SelectionConfig(density=0.05, lra_rank=16, solver=solver)
    with torch.autocast("cuda", torch.bfloat16):
        found = select_indices(weight, config)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_tf32
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, select_indices(weight, config))


@pytest.mark.parametrize("solver", ["exact", "subspace"])
def test_the_same_bits_twice(solver: str):
    weight = gaussian(600, 1000).cuda()
    first, second = (low_rank_factors(weight, 16, solver=solver) for _ in range(2))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_masks_are_made_where_only_deterministic_algorithms_are_allowed():
    weight = gaussian(600, 1000).cuda()
    expected = select_indices(weight, SUBSPACE)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(select_indices(weight, SUBSPACE), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_spectrum_without_a_gap_is_told():
    orthogonal = torch.linalg.qr(gaussian(320, 320)).Q.cuda()
    with pytest.raises(DecompositionError, match="take solver auto or exact"):
        low_rank_factors(orthogonal, 16, solver="subspace")
    assert low_rank_factors(orthogonal, 16).solver == "exact after subspace"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "rows of any magnitude", "one column"])
def test_the_same_scores_give_the_same_indices_as_on_the_cpu(kind: str, dtype: torch.dtype):
    scores = gaussian(1500, 400).abs()  # more than four samples
    if kind == "ties":
        scores = (scores * 8).round()
    elif kind == "rows of any magnitude":
        scores *= 10 ** (6 * torch.rand(1500, 1, generator=torch.Generator().manual_seed(1)))
    elif kind == "one column":
        scores[:, 1:] = 0
    scores = scores.to(dtype)
    there = scores.cuda()
    for k in (1, 1000, 30_000, 300_000, 599_999):
        for largest in (True, False):
            expected = top_k_indices(scores, k, largest=largest)
            found = top_k_indices(there, k, largest=largest)
            assert found.is_cuda
            assert torch.equal(found.cpu(), expected)
            by_rows = top_k_of_parts(there.__getitem__, (1500, 400), k, there.device, largest=largest)
            assert torch.equal(by_rows.cpu(), expected)


def test_bases_wait_in_pinned_memory_of_the_cpu():
    model = nn.Linear(400, 300, bias=False)
    with torch.no_grad():
        model.weight.copy_(gaussian(300, 400))
    optimizer = SparseAdamW(build_param_groups(model))
    config = SelectionConfig(density=0.05, lra_rank=8)
    first = refresh_masks(optimizer, config, device="cuda", basis_device="cpu")
    assert first.solvers == {"subspace": 1}
    (basis,) = first.bases["weight"]
    assert (basis.device.type, basis.dtype, basis.is_pinned()) == ("cpu", torch.float16, True)
    second = refresh_masks(optimizer, config, device="cuda", basis_device="cpu", bases=first.bases)
    assert second.overlap > 0.99
    (there,) = refresh_masks(optimizer, config, device="cuda", bases=first.bases).bases["weight"]
    assert there.is_cuda


def test_copies_come_in_order_and_whole():
    given = [gaussian(300, 400, seed) for seed in range(6)] + [gaussian(400, 300).T, gaussian(3, 3).cuda()]
    count = 0
    for i, copy in enumerate(on_device(given, "cuda")):
        assert copy.is_cuda
        junk = [torch.full((300, 400), float("nan"), device="cuda") for _ in range(3)]  # may take over freed memory
        assert torch.equal(copy.cpu(), given[i].cpu())
        del junk
        count += 1
    assert count == 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp plain", "fsdp2"])
def test_two_devices_train_as_one(name, tmp_path):
    """Weights and a resume, in float32 with nccl; the comparisons to 1e-9 are in test_distributed.py."""
    inputs = {"model": save_tiny_llama(tmp_path / "model"), "rows": write_sums(tmp_path / "rows.json", rows=101)}
    call = {**inputs, "dtype": torch.float32, "accelerator": "gpu"}
    one = fit("single", 1, folder=None, **call)
    saved = tmp_path / "saved"
    (two, *_) = run_ranks(work, 2, tmp_path / "two", [{**call, "name": name, "folder": saved}])
    file = saved / f"step={SAVED}.ckpt"
    (again, *_) = run_ranks(work, 2, tmp_path / "again", [{**call, "name": name, "folder": None, "resume": file}])
    for parameter, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][parameter].cpu(), weight.cpu(), rtol=0, atol=1e-3)
        assert torch.equal(again[0]["weights"][parameter], two[0]["weights"][parameter])
