"""What only a CUDA device can show: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same_choice, low_rank
from tiny import tiny_llama

from lift_lightning import SelectionConfig, SparseAdamW, build_param_groups, refresh_masks, select_indices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_on_the_device_are_those_of_the_float64_svd(dtype):
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = SelectionConfig(density=0.05, lra_rank=16)
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
