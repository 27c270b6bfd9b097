"""Memory of a training step (paper, Fig. 6), found without the model's weights: a step on tensors without values.

The model is made from its configuration under FakeTensorMode, and one real training step is taken by this package's
own optimizer: forward, backward with its hooks, clipping, update. Every storage that comes to life is counted until it
is dropped. That is what tensors need; the libraries' work space, the allocator's rounding and the context of a GPU come
on top, and attention is counted as the CPU's kernel keeps it, which is as flash attention does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lift_lightning.adapters import Adapter, adapter_targets, put_on
from lift_lightning.analysis.plots import COLOURS, LEGEND, canvas
from lift_lightning.analysis.report import Findings
from lift_lightning.losses import causal_lm_loss
from lift_lightning.models import checkpoint_activations
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import build_param_groups, matrix_views
from lift_lightning.selection_config import SelectionConfig
from lift_lightning.sparse_state import SparseState

Method = Literal["lift", "lift-mlp", "lora", "full"]
LABELS: dict[str, str] = {"lift": "LIFT", "lift-mlp": "LIFT_MLP", "lora": "LoRA", "full": "full fine-tuning"}
GIB = 2**30
STEPS = 2  # the second has all that the first one makes


@dataclass(frozen=True)
class Setting:
    """What is trained, and on what.

    Attributes:
        method: `lift`, `lift-mlp` (the layers of the MLPs only), `lora`, or `full` (every parameter).
        rank: budget rank of LIFT, rank of LoRA.
        batch: sequences of a micro-batch.
        length: tokens of each.
        dtype: of the weights. LIFT keeps float32 copies of the selected entries of narrower ones.
        checkpointing: whether activations are computed again in the backward pass.
    """

    method: Method
    rank: int = 128
    batch: int = 1
    length: int = 2048
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = True


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step. The parts need not all stand at one moment, so that `peak` may be below their sum.

    Attributes:
        weights: of the model, the adapters' among them.
        moments: of AdamW.
        indices: of the selection.
        masters: float32 copies of the selected entries.
        gradients: kept until the update: those of the selected entries, of the adapters, or of all parameters.
        activations: what the forward pass leaves for the backward pass, the logits among it.
        temporary: what the peak has beyond all of these: the loss's float32 logits and their gradient, the dense
            gradient of a layer whose selected entries are being picked, layers that are computed again.
        peak: of all that was there at one moment.
        trained: numbers that are trained at a time; not bytes.
    """

    weights: int
    moments: int
    indices: int
    masters: int
    gradients: int
    activations: int
    temporary: int
    peak: int
    trained: int


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages: of some that are there, and of those that come to life while it is on, until they
    are dropped.

    Attributes:
        now: bytes that are there.
        peak: the most that were.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in known:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it returns."""
        found = function(*arguments, **(options or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def set_up(
    model: PreTrainedModel, setting: Setting, adapter: Adapter | None, select: Callable[[Tensor, int], Tensor]
) -> SparseAdamW:
    """Make the model ready for training by a method.

    Args:
        model: with or without values.
        setting: the method and its rank.
        adapter: that LoRA has put on.
        select: (parameter, K) -> (K,) ascending indices, of which the values do not matter for memory.
    """
    if setting.checkpointing:
        checkpoint_activations(model)
    if setting.method == "full":
        return SparseAdamW(build_param_groups(model, [], modules_to_train=[".*"]))
    if adapter is not None:
        return SparseAdamW(adapter.param_groups())
    optimizer = SparseAdamW(build_param_groups(model, "mlp" if setting.method == "lift-mlp" else "all-linear"))
    config = SelectionConfig(rank=setting.rank)
    for _, parameter, group in optimizer.sparse_parameters():
        budgets = [config.budget(*view.shape) for view in matrix_views(parameter, group["halves"])]
        optimizer.set_indices(parameter, select(parameter, sum(budgets)))
    return optimizer


def training_step(
    model: nn.Module, optimizer: SparseAdamW, token_ids: Tensor, after_forward: Callable[[], None] = lambda: None
) -> None:
    """Forward, backward, clipping, update, as `LiftLightningModule` does it."""
    logits = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False).logits
    after_forward()
    loss = causal_lm_loss(logits, token_ids)
    (loss.total / loss.weight).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()


def footprint(config: PretrainedConfig, setting: Setting) -> Footprint:
    """What a training step takes, on tensors without values.

    Args:
        config: of a causal language model.
        setting: what is trained, and on what.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype).train()
        adapter = None
        if setting.method == "lora":
            targets = adapter_targets(model, "lora", "all-linear", ())
            adapter = put_on(model, "lora", setting.rank, targets=targets)
    with FakeTensorMode():
        _to_fake_cpu(model)
        optimizer = set_up(model, setting, adapter, lambda _, count: torch.arange(count))
        token_ids = torch.zeros(setting.batch, setting.length, dtype=torch.long)
        states = [optimizer.state_of(p) for _, p, _ in optimizer.sparse_parameters()]
        dense = optimizer.dense_parameters()
        moments = [moment for s in states for moment in (s.exp_avg, s.exp_avg_sq) if isinstance(moment, Tensor)]
        moments += [optimizer.state[p][key] for p in dense for key in ("exp_avg", "exp_avg_sq")]
        parts = {
            "weights": _bytes([*model.parameters(), *model.buffers()]),
            "moments": _bytes(moments),
            "indices": _bytes(s.indices for s in states),
            "masters": _bytes(s.master for s in states if s.master is not None),
            "gradients": 4 * sum(s.indices.numel() for s in states) + _bytes(dense),
        }
        live = LiveStorages(_tensors(model, optimizer, moments, states))
        del moments  # a master is replaced by another at every step: nothing here may keep the first
        before, forward = live.now, [0]
        with live:
            for _ in range(STEPS):
                training_step(model, optimizer, token_ids, lambda: forward.append(live.now))
    parts["activations"] = forward[-1] - before
    return Footprint(
        **parts,
        temporary=max(0, live.peak - sum(parts.values())),
        peak=live.peak,
        trained=sum(s.indices.numel() for s in states) + sum(p.numel() for p in dense),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _tensors(
    model: nn.Module, optimizer: SparseAdamW, moments: list[Tensor], states: list[SparseState]
) -> Iterator[Tensor]:
    """All that is there before a step."""
    yield from (*model.parameters(), *model.buffers(), *moments, optimizer.skipped_steps)
    for state in states:
        yield state.indices
        if state.master is not None:
            yield state.master
    for parameter in [*optimizer.dense_parameters(), *(p for _, p, _ in optimizer.sparse_parameters())]:
        yield optimizer.state[parameter]["step"]


def _to_fake_cpu(model: nn.Module) -> None:
    """Give parameters and buffers that are on the meta device their fake twins on the CPU, tied ones one."""
    twins: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in twins:
                    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
                tensors[name] = twins[id(tensor)]  # type: ignore[assignment]


PARTS = ("weights", "moments", "indices", "masters", "gradients", "activations", "temporary")


def findings(found: dict[str, Footprint], title: str) -> Findings:
    """Table and figure of the footprints of several methods, by label."""
    rows = [{"method": label, **asdict(footprint)} for label, footprint in found.items()]
    table = Table(title=title, caption="GiB; the parts need not all stand at one moment, the peak is what does")
    table.add_column("method")
    for name in (*PARTS, "peak", "trained"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = (f"{row[name] / GIB:.3f}" for name in (*PARTS, "peak"))
        table.add_row(str(row["method"]), *sizes, f"{row['trained']:,}")
    figure, (axes,) = canvas(width=7.0)
    draw(axes, found, title)
    return Findings("memory", rows, table, figure)


def draw(axes: Any, found: dict[str, Footprint], title: str, *, legend: bool = True) -> None:
    """Stacked bars of the parts, and a mark at the peak."""
    labels: Sequence[str] = list(found)
    base = [0.0] * len(labels)
    colours = (*COLOURS[:-1], "#999999")  # black is the mark's
    for i, part in enumerate(PARTS):
        sizes = [getattr(found[label], part) / GIB for label in labels]
        axes.bar(labels, sizes, bottom=base, label=part, color=colours[i], width=0.6)
        base = [a + b for a, b in zip(base, sizes, strict=True)]
    peaks = [found[label].peak / GIB for label in labels]
    axes.plot(labels, peaks, "_", color="black", markersize=28, markeredgewidth=2, label="peak of a step")
    axes.set(ylabel="GiB", title=title)
    axes.grid(visible=False, axis="x")
    if legend:
        axes.legend(fontsize=8, **LEGEND)
