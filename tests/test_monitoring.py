"""Throughput counts from step to step, and memory is that of the process."""

import pytest
import torch

from lift_lightning import monitoring
from lift_lightning.monitoring import StepMeter, peak_memory

CPU = torch.device("cpu")


def test_tokens_are_counted_between_two_steps(monkeypatch):
    clock = iter([100.0, 102.0, 106.0])
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: next(clock))
    meter = StepMeter()
    meter.count(torch.tensor(1000))
    assert "tokens_per_second" not in meter.rates(CPU)  # there is no step before the first
    meter.count(torch.tensor(30))
    meter.count(torch.tensor(50))
    assert float(meter.rates(CPU)["tokens_per_second"]) == 40.0  # 80 tokens in 2 s
    assert float(meter.rates(CPU)["tokens_per_second"]) == 0.0  # none in 4 s


def test_peak_memory_grows_with_what_the_process_holds():
    before = peak_memory(CPU)
    held = torch.ones(2**26)  # 256 MiB
    assert peak_memory(CPU) >= before
    assert peak_memory(CPU) > held.nbytes
    assert StepMeter().rates(CPU)["peak_memory_gib"] == pytest.approx(peak_memory(CPU) / 2**30, rel=0.1)
