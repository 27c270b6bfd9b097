"""Memory of a training step: what is counted on cases whose bytes are known, and what a real process takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_llama_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, LlamaConfig

from lift_lightning.analysis.memory import LABELS, Footprint, LiveStorages, Setting, findings, footprint

ROOT = Path(__file__).parents[1]
MODEL = os.environ.get("LIFT_SMOLLM2_DIR")
RANK, SHORT = 2, {"rank": 2, "batch": 2, "length": 16}
# (M, N) of the matrices of a block of the tiny LLaMA.
ATTENTION = [(32, 32), (16, 32), (16, 32), (32, 32)]
MLP = [(48, 32), (48, 32), (32, 48)]
BLOCKS = 2
PARAMETERS = 259 * 32 + BLOCKS * (2 * 32 + sum(m * n for m, n in ATTENTION + MLP)) + 32
FREQUENCIES = 2 * 4 * 4  # bytes of the rotary embedding's buffers, which stay in float32
BUDGET = {
    "lift": BLOCKS * sum(RANK * (m + n) for m, n in ATTENTION + MLP),
    "lift-mlp": BLOCKS * sum(RANK * (m + n) for m, n in MLP),
}


def tiny_footprint(method: str, dtype: torch.dtype = torch.float32, *, checkpointing: bool = False, **other):
    return footprint(
        tiny_llama_config(), Setting(method, dtype=dtype, checkpointing=checkpointing, **{**SHORT, **other})
    )


# ------------------------------------------------------------------ storages


@pytest.mark.parametrize("fake", [False, True])
def test_storages_are_counted_once_until_they_are_dropped(fake: bool):
    if fake:
        with FakeTensorMode():
            known = torch.zeros(1000)
            count_by_hand(known)
    else:
        count_by_hand(torch.zeros(1000))


def count_by_hand(known: torch.Tensor) -> None:
    live = LiveStorages([known, known[5:], known.view(10, 100)])
    assert (live.now, live.peak) == (4000, 4000)
    with live:
        a = torch.zeros(100)
        assert (live.now, live.peak) == (4400, 4400)
        views = [a.view(10, 10), a[3:], a.t(), *a.split(30), known.view(10, 100), known[2:]]
        assert live.now == 4400
        a.add_(1)
        known.mul_(2)
        assert live.now == 4400
        b = torch.ones(50, dtype=torch.float64)
        assert (live.now, live.peak) == (4800, 4800)
        del a
        assert live.now == 4800  # the views hold it
        views.clear()
        assert (live.now, live.peak) == (4400, 4800)
        values, indices = torch.topk(known, 5)  # several results, 4 and 8 bytes an entry
        assert live.now == 4400 + 20 + 40
        del b, values
        assert (live.now, live.peak) == (4040, 4800)
        c = torch.empty(300)
        assert (live.now, live.peak) == (5240, 5240)
        del c, indices
    assert (live.now, live.peak) == (4000, 5240)


@pytest.mark.parametrize("context", [nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_storages_in_the_place_of_dropped_ones_are_counted(context):
    """The memory of what was known from the beginning is given to others, under the same address."""
    with context():
        known = [torch.zeros(10) for _ in range(30)]
        live = LiveStorages(known)
        assert live.now == 30 * 40
        with live:
            known.clear()
            assert live.now == 0
            kept = [torch.empty(1000) for _ in range(100)]
        assert live.now == len(kept) * 4000


def test_what_autograd_keeps_is_counted_until_the_graph_is_dropped():
    x = torch.zeros(1000, requires_grad=True)
    live = LiveStorages([x])
    with live:
        y = x.exp().exp().sum()  # each exp keeps what it returns
        assert live.now == 3 * 4000 + 4
        y.backward()
        assert live.now == 2 * 4000 + 4  # the leaf, its gradient and the sum
        assert live.peak >= 4 * 4000
        x.grad = None
        del y
    assert live.now == 4000


def test_what_is_dropped_after_counting_has_ended_is_dropped_too():
    live = LiveStorages([])
    with live:
        a = torch.zeros(10)
    b = torch.zeros(1000)  # not counted
    assert live.now == 40
    del a
    assert (live.now, live.peak, b.nbytes) == (0, 40, 4000)


# ------------------------------------------------------------------ parts by arithmetic


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lift", "lift-mlp"])
def test_parts_of_lift_are_those_of_the_selected_entries(method: str, dtype: torch.dtype, checkpointing: bool):
    found, k = tiny_footprint(method, dtype, checkpointing=checkpointing), BUDGET[method]
    assert found.trained == k
    assert found.weights == PARAMETERS * dtype.itemsize + FREQUENCIES
    assert found.moments == 2 * 4 * k
    assert found.indices == 4 * k
    assert found.masters == (4 * k if dtype == torch.bfloat16 else 0)
    assert found.gradients == 4 * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_full_fine_tuning_are_those_of_all_parameters(dtype: torch.dtype):
    found = tiny_footprint("full", dtype)
    assert found.trained == PARAMETERS
    assert found.weights == PARAMETERS * dtype.itemsize + FREQUENCIES
    assert found.moments == 2 * found.gradients == 2 * PARAMETERS * dtype.itemsize
    assert (found.indices, found.masters) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_lora_are_those_of_the_adapters_in_float32(dtype: torch.dtype):
    found, k = tiny_footprint("lora", dtype), BUDGET["lift"]  # r (M + N) too
    assert found.trained == k
    assert found.weights == PARAMETERS * dtype.itemsize + FREQUENCIES + 4 * k
    assert (found.moments, found.gradients) == (2 * 4 * k, 4 * k)
    assert (found.indices, found.masters) == (0, 0)


def test_a_budget_beyond_the_matrix_is_the_matrix():
    found = tiny_footprint("lift", rank=1000)
    assert found.trained == BLOCKS * sum(m * n for m, n in ATTENTION + MLP)


def test_an_untied_head_is_of_the_weights():
    config = tiny_llama_config(tie_word_embeddings=False)
    found = footprint(config, Setting("lift", dtype=torch.float32, **SHORT))
    assert found.weights == (PARAMETERS + 259 * 32) * 4 + FREQUENCIES


# ------------------------------------------------------------------ activations and the peak


@pytest.mark.parametrize("method", ["lift", "full"])
def test_activations_are_what_autograd_keeps_of_a_real_forward_pass(method: str):
    """Of one with padding: without values it cannot be seen that there is none, and attention takes the mask along."""
    model, seen = tiny_llama().train(), {}
    if method == "lift":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_proj" in name)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    ids, mask = torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long)
    mask[1, -1] = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=mask, use_cache=False)
    seen[output.logits.untyped_storage().data_ptr()] = output.logits.nbytes
    # Beside them there are a counter and, unless autograd keeps them, the token ids.
    found, expected = tiny_footprint(method).activations, sum(seen.values())
    assert expected <= found <= expected + ids.nbytes + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", LABELS)
def test_checkpointing_lowers_activations_and_the_peak_and_nothing_that_is_kept(method: str, dtype: torch.dtype):
    plain = tiny_footprint(method, dtype)
    lower = tiny_footprint(method, dtype, checkpointing=True)
    logits = 2 * 16 * 259 * dtype.itemsize
    assert lower.activations < 0.5 * plain.activations
    assert lower.peak < plain.peak
    assert logits < plain.activations
    for part in ("weights", "moments", "indices", "masters", "gradients", "trained"):
        assert getattr(lower, part) == getattr(plain, part)


@pytest.mark.parametrize("method", LABELS)
def test_the_peak_is_above_what_is_kept_and_not_above_the_sum_of_the_parts(method: str):
    found = tiny_footprint(method)
    kept = found.weights + found.moments + found.indices + found.masters
    assert kept + found.activations <= found.peak
    parts = kept + found.gradients + found.activations + found.temporary
    # Counters, such as the steps of each dense parameter, are in none of the parts.
    assert found.peak <= parts + 1024
    # The loss is taken in float32: at least one copy of the logits beside them.
    assert found.peak - kept - found.activations >= 2 * 15 * 259 * 4


@pytest.mark.parametrize("method", LABELS)
def test_the_same_setting_takes_the_same_every_time(method: str):
    first, again = (tiny_footprint(method, torch.bfloat16, checkpointing=True) for _ in range(2))
    assert first == again


def test_longer_and_more_sequences_take_more():
    one, twice, four = (tiny_footprint("lift", length=64, batch=batch) for batch in (1, 2, 4))
    assert one.activations < 0.6 * twice.activations
    assert twice.activations < 0.6 * four.activations
    assert one.peak < twice.peak < four.peak
    assert one.weights == four.weights
    assert tiny_footprint("lift", length=128).activations > 3 * tiny_footprint("lift", length=32).activations


def test_lift_takes_less_than_full_fine_tuning_by_its_moments_and_gradients():
    lift, full = (tiny_footprint(method, checkpointing=True) for method in ("lift", "full"))
    saved = full.moments + full.gradients - lift.moments - lift.gradients - lift.indices
    assert 0.5 * saved < full.peak - lift.peak < 1.2 * saved


def test_nothing_of_a_large_model_is_ever_in_memory():
    """Two blocks of LLaMA-2-70B: 9 GiB of weights in float32, and twice as much for the moments."""
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=2)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = footprint(config, Setting("full", dtype=torch.float32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert time.perf_counter() - started < 30
    parameters = 2 * 32000 * 8192 + 2 * (4 * 8192**2 + 3 * 8192 * 28672 + 2 * 8192) + 8192
    assert found.weights == pytest.approx(4 * parameters, rel=1e-6)
    assert found.moments == 8 * parameters
    assert found.peak > 16 * parameters


@pytest.mark.parametrize("method", LABELS)
def test_a_block_of_llama_2_7b_takes_what_its_shapes_say(method: str):
    config = LlamaConfig(num_hidden_layers=2)  # of which the defaults are LLaMA-2-7B's
    found = footprint(config, Setting(method, rank=128, batch=1, length=2048))
    mlp, attention = 2 * 3 * 128 * (4096 + 11008), 2 * 4 * 128 * (4096 + 4096)
    parameters = 2 * 32000 * 4096 + 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    k = {"lift": mlp + attention, "lift-mlp": mlp, "lora": mlp + attention, "full": parameters}[method]
    assert found.trained == k
    assert found.weights == pytest.approx(2 * parameters + (4 * k if method == "lora" else 0), rel=1e-6)
    assert found.moments == (2 * 2 * k if method == "full" else 2 * 4 * k)
    assert found.masters == (4 * k if "lift" in method else 0)


# ------------------------------------------------------------------ table and figure


def test_the_table_is_in_gib_and_the_bars_are_stacked():
    gib = 2**30
    one = Footprint(gib, 2 * gib, 0, gib // 2, gib, gib, gib, 6 * gib, 1_234_567)
    other = Footprint(4 * gib, 0, 0, 0, 0, gib, gib, 5 * gib, 10)
    found = findings({"LIFT": one, "LoRA": other}, "a title")
    assert found.name == "memory"
    assert [row["method"] for row in found.rows] == ["LIFT", "LoRA"]
    assert found.rows[0]["peak"] == 6 * gib
    columns = {column.header: list(column.cells) for column in found.table.columns}
    assert columns["weights"] == ["1.000", "4.000"]
    assert columns["masters"] == ["0.500", "0.000"]
    assert columns["peak"] == ["6.000", "5.000"]
    assert columns["trained"] == ["1,234,567", "10"]
    (axes,) = found.figure.axes
    tops = [max(bar.get_y() + bar.get_height() for part in axes.containers for bar in (part[i],)) for i in range(2)]
    assert tops == [6.5, 6.0]
    (peaks,) = axes.lines
    assert peaks.get_ydata().tolist() == [6, 5]


# ------------------------------------------------------------------ a real process

MEASURE = """
import sys
import torch
from transformers import AutoModelForCausalLM
from lift_lightning.adapters import adapter_targets, put_on
from lift_lightning.analysis.memory import STEPS, Setting, set_up, training_step
from resident_memory import peak_above

torch.set_num_threads(1)
folder, method = sys.argv[1:]
setting = Setting(method, rank=32, batch=4, length=128, dtype=torch.float32, checkpointing=False)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0)  # into memory, which a mapped file is not yet
torch.randn(64, 64) @ torch.randn(64, 64)


def run():
    adapter = None
    if method == "lora":
        adapter = put_on(model, "lora", 32, targets=adapter_targets(model, "lora", "all-linear", ()))
    optimizer = set_up(model, setting, adapter, lambda parameter, count: torch.arange(count))
    token_ids = torch.randint(0, 40000, (4, 128))
    for _ in range(STEPS):
        training_step(model, optimizer, token_ids)


print("bytes", peak_above(run))
"""


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif(not MODEL, reason="LIFT_SMOLLM2_DIR is not set")
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("method", LABELS)
def test_a_real_step_takes_within_a_tenth_of_what_is_predicted(method: str):
    config = AutoConfig.from_pretrained(MODEL)
    setting = Setting(method, rank=32, batch=4, length=128, dtype=torch.float32, checkpointing=False)
    found = footprint(config, setting)
    base = footprint(config, Setting("full", batch=1, length=8, dtype=torch.float32)).weights
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        # Blocks above this go back to the system when they are freed, and are not in the peak as holes.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, MODEL, method],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    measured = int(ran.stdout.split("bytes")[1])
    assert found.peak - base == pytest.approx(measured, rel=0.1)
