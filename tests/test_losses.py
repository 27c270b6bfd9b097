"""Sums and counts of the losses: the mean over any split into micro-batches is that of the whole.

Guards: a mean of micro-batch means weighs a short answer's tokens more than a long one's.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_llama

from lift_lightning.losses import causal_lm_loss, classification_loss
from lift_lightning.prompts import IGNORE_INDEX


def test_causal_loss_literally():
    """Uniform logits over 4 tokens: log 4 for each label but the first position's, which nothing predicts."""
    labels = torch.tensor([[1, IGNORE_INDEX, 2, 3], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 0]])
    total, count = causal_lm_loss(torch.zeros(2, 4, 4), labels)
    assert count.item() == 3  # of the first row 2 and 3, its 1 stands first; of the second row 0
    assert count.dtype == torch.int64
    assert total.item() == pytest.approx(3 * math.log(4))


def test_position_t_predicts_token_t_plus_1():
    labels = torch.tensor([[0, 2, 1]])
    logits = torch.full((1, 3, 3), -100.0)
    logits[0, 0, 2] = logits[0, 1, 1] = 100.0
    assert causal_lm_loss(logits, labels).total.item() == 0.0
    assert causal_lm_loss(logits.roll(1, dims=1), labels).total.item() > 100


def test_causal_loss_is_that_of_transformers():
    model = tiny_llama()
    ids = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :12] = labels[1, 15:] = IGNORE_INDEX
    output = model(input_ids=ids, labels=labels)
    total, count = causal_lm_loss(output.logits, labels)
    torch.testing.assert_close(total / count, output.loss)
    assert count.item() == 8 + 14 + 19


def test_another_split_changes_nothing_but_rounding():
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 9, 7, generator=rng), torch.randint(7, (4, 9), generator=rng)
    labels[0, :8] = IGNORE_INDEX  # one label token against eight in each of the other rows
    total, count = causal_lm_loss(logits, labels)
    parts = [causal_lm_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(4)]
    assert sum(p.weight for p in parts) == count == 1 + 3 * 8
    torch.testing.assert_close(sum(p.total for p in parts), total)
    means = sum(p.total / p.weight for p in parts) / 4
    assert abs(means - total / count) > 1e-3  # so that the two can be told apart


def test_no_label_gives_zero_and_no_nan():
    logits = torch.randn(1, 5, 7, requires_grad=True)
    total, count = causal_lm_loss(logits, torch.full((1, 5), IGNORE_INDEX))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.zeros(1, 1001, 4, dtype=torch.bfloat16)
    total, count = causal_lm_loss(logits, torch.zeros(1, 1001, dtype=torch.int64))
    assert total.dtype == torch.float32
    assert count.item() == 1000
    assert total.item() == pytest.approx(1000 * math.log(4), rel=1e-5)


def test_classification_loss():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])  # probabilities 1/2, 1/2 and 1/4, 3/4
    total, count = classification_loss(logits, torch.tensor([0, 1]))
    assert count.item() == 2
    assert total.item() == pytest.approx(math.log(2) + math.log(4 / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regression_loss(dtype: torch.dtype):
    total, count = classification_loss(torch.tensor([[1.0], [2.0]], dtype=dtype), torch.tensor([3.0, 2.5]))
    assert count.item() == 2
    assert total.item() == 4.25  # 2^2 + 0.5^2
    assert total.dtype == torch.float32


def test_rows_without_a_label_add_nothing():
    logits = torch.tensor([[0.0, 0.0], [1.0, 5.0]], requires_grad=True)
    total, count = classification_loss(logits, torch.tensor([0, IGNORE_INDEX]))
    total.backward()
    assert (total.item(), count.item()) == (pytest.approx(math.log(2)), 1)
    assert logits.grad[1].tolist() == [0, 0]
    scores = torch.tensor([[1.0], [2.0]], requires_grad=True)
    total, count = classification_loss(scores, torch.tensor([3.0, math.nan]))
    total.backward()
    assert (total.item(), count.item()) == (4.0, 1)
    assert scores.grad.tolist() == [[-4.0], [0.0]]
