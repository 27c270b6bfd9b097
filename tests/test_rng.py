"""Random states go through a checkpoint: tensors and primitives only, and every generator goes on where it was."""

import io
import random

import torch

from lift_lightning.rng import rng_state, set_rng_state


def test_generators_continue_where_the_state_was_taken():
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = (random.random(), random.gauss(0, 1), torch.rand(3))
    random.seed(1)
    torch.manual_seed(1)
    buffer.seek(0)
    set_rng_state(torch.load(buffer, weights_only=True))
    found = (random.random(), random.gauss(0, 1), torch.rand(3))
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])
