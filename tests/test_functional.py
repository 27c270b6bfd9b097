"""One AdamW update on vectors, against a line of arithmetic and against torch.

Guards: the fused kernel wants moments in the values' dtype; narrower ones are widened for the update and must be
rounded back, and `found_inf` must leave every tensor alone, the counter included.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lift_lightning.functional import adamw_update

HYPER = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}


def tensors(dtype: torch.dtype = torch.float32, moments: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """values, grads, exp_avgs, exp_avg_sqs, steps of two vectors, as they are after nine steps."""
    rng = torch.Generator().manual_seed(0)
    sizes = (5, 3)
    values, grads = ([torch.randn(n, generator=rng).to(dtype) for n in sizes] for _ in range(2))
    first = [torch.randn(n, generator=rng).to(moments) for n in sizes]
    second = [torch.rand(n, generator=rng).to(moments) for n in sizes]
    return [values, grads, first, second, [torch.tensor(9.0), torch.tensor(9.0)]]


def test_first_step_by_hand():
    """m = 0.1 * 2, v = 0.05 * 4; corrected 2 and 4; update 2 / sqrt(4) = 1; decay 1 - 0.1 * 0.5 = 0.95."""
    value, exp_avg, exp_avg_sq = torch.tensor([3.0], dtype=torch.float64), *torch.zeros(2, 1, dtype=torch.float64)
    step = torch.tensor(0.0)
    adamw_update([value], [torch.full_like(value, 2.0)], [exp_avg], [exp_avg_sq], [step], **HYPER)
    assert value.item() == pytest.approx(3.0 * 0.95 - 0.1, abs=1e-8)
    assert exp_avg.item() == pytest.approx(0.2)
    assert exp_avg_sq.item() == pytest.approx(0.2)
    assert step.item() == 1.0


def test_tenth_step_by_hand():
    values, grads, exp_avgs, exp_avg_sqs, steps = tensors(torch.float64, torch.float64)
    expected = []
    for w, g, m, v in zip(*(group[0].tolist() for group in (values, grads, exp_avgs, exp_avg_sqs)), strict=True):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        expected.append(w * 0.95 - 0.1 * (m / (1 - 0.9**10)) / (math.sqrt(v / (1 - 0.95**10)) + 1e-8))
    adamw_update(values, grads, exp_avgs, exp_avg_sqs, steps, **HYPER)
    assert values[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert [step.item() for step in steps] == [10.0, 10.0]


def test_narrow_moments_are_widened_and_rounded_back():
    narrow, wide = tensors(moments=torch.bfloat16), tensors(moments=torch.bfloat16)
    wide[2:4] = [[m.float() for m in moments] for moments in wide[2:4]]
    adamw_update(*narrow, **HYPER)
    adamw_update(*wide, **HYPER)
    for mine, theirs in zip(narrow[0], wide[0], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip([*narrow[2], *narrow[3]], [*wide[2], *wide[3]], strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs.bfloat16())


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_decides(found: float, moments: torch.dtype):
    given, expected = tensors(moments=moments), tensors(moments=moments)
    adamw_update(*given, **HYPER, found_inf=torch.tensor(found))
    if not found:
        adamw_update(*expected, **HYPER)
    for mine, theirs in zip(given, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_lr_may_be_a_tensor():
    given, expected = tensors(), tensors()
    adamw_update(*given, **{**HYPER, "lr": torch.tensor(0.1)})
    adamw_update(*expected, **HYPER)
    for mine, theirs in zip(given[0], expected[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_update_of_nothing():
    adamw_update([], [], [], [], [], **HYPER)


def test_a_leaf_that_requires_grad_is_updated_in_place():
    value = torch.nn.Parameter(torch.ones(2))
    adamw_update([value], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], [torch.tensor(0.0)], **HYPER)
    torch.testing.assert_close(value.detach(), torch.full((2,), 0.85))  # 0.95 - 0.1
    assert value.is_leaf
