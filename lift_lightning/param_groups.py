"""Which parameters of a model are trained sparsely, which densely, and which are frozen.

`build_param_groups` finds the weight matrices of linear layers (`nn.Linear`, transformers' `Conv1D`, fused 3-D expert
weights), matches their names against the targets, and returns parameter groups for `SparseAdamW`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lift_lightning.errors import ConfigError
from lift_lightning.sharding import note_flattened, owned

# Where the gate and the up matrix that share one parameter lie in it, along its last two axes.
Halves = Literal["rows", "columns", "interleaved_rows", "interleaved_columns"]

# Presets are regular expressions too, over names such as model.layers.0.self_attn.q_proj.weight. The alternatives of a
# single projection are its names in LLaMA and its kin, DeBERTa/BERT/RoBERTa, DistilBERT, GPT-2, OPT and GPT-J.
_ATTENTION_PARENT = r"(self_attn|self_attention|attention|attn)"
_END = r"(\.|$)"
_SINGLE = {
    "q_proj": rf"\.(q_proj|query_proj|query|q_lin){_END}",
    "k_proj": rf"\.(k_proj|key_proj|key|k_lin){_END}",
    "v_proj": rf"\.(v_proj|value_proj|value|v_lin){_END}",
    "o_proj": rf"\.{_ATTENTION_PARENT}\.(o_proj|out_proj|c_proj|output\.dense|dense|out_lin){_END}",
    # A gate and an up matrix that share one parameter are taken by either name.
    "gate_proj": rf"\.(gate_proj|gate_up_proj|w1){_END}",
    "up_proj": rf"\.(up_proj|gate_up_proj|w3|c_fc|fc_in|fc1|lin1|intermediate\.dense){_END}",
    "down_proj": rf"(\.(down_proj|w2|fc_out|fc2|lin2|mlp\.c_proj)|(?<!attention)\.output\.dense){_END}",
}
PRESETS: dict[str, str] = {
    "all-linear": r"",
    "attention": rf"\.{_ATTENTION_PARENT}\.",
    "mlp": rf"(\.(mlp|feed_forward|ffn|block_sparse_moe|experts)\.|{_SINGLE['up_proj']}|{_SINGLE['down_proj']})",
    **_SINGLE,
}

# Whole components only: a layer that the model itself calls `submodule` keeps its name.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
# Heads map to the vocabulary or to classes; a router decides, it does not know.
_NEVER_BY_DEFAULT = re.compile(
    r"(^|\.)(lm_head|embed_out|output_embeddings|(pre_)?classifier|score|qa_outputs|cls|pooler|router|"
    r"(shared_expert_)?gate)(\.|$)"
)


@dataclass(frozen=True)
class Target:
    """One parameter that holds one or more weight matrices.

    Attributes:
        name: cleaned name of the parameter.
        parameter: (M, N), or (E, M, N) for fused experts; a vector of this rank's entries under FSDP1.
        halves: how two matrices share it, None where it is one matrix (per expert).
        transposed: whether its matrices are (inputs, outputs), as those of `Conv1D` are; else (outputs, inputs).
    """

    name: str
    parameter: nn.Parameter
    halves: Halves | None
    transposed: bool = False

    def matrices(self, tensor: Tensor | None = None) -> list[Tensor]:
        """Views of its matrices as (outputs, inputs), or of those of another tensor of its shape."""
        views = matrix_views(self.parameter if tensor is None else tensor, self.halves)
        return [view.T for view in views] if self.transposed else views


def clean_name(name: str) -> str:
    """The parameter's name without what FSDP, checkpoint wrappers, torch.compile and DDP put into it."""
    return _WRAPPERS.sub("", name)


def find_targets(model: nn.Module) -> list[Target]:
    """Every weight matrix of the model that can be trained sparsely, tied ones once, in the model's order."""
    note_flattened(model)
    found: dict[int, Target] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter, halves, transposed in _matrices_of(module_name, module):
            full = clean_name(f"{module_name}.{name}" if module_name else name)
            found.setdefault(id(parameter), Target(full, parameter, halves, transposed))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [target for key, target in found.items() if key not in embeddings]


def _matrices_of(module_name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Halves | None, bool]]:
    if isinstance(module, nn.Linear | Conv1D):
        # A quantised layer keeps its weight packed in integers: there is nothing to train in it.
        weight = module.weight
        if isinstance(weight, nn.Parameter) and weight.is_floating_point() and len(owned(weight).shape) == 2:
            yield "weight", weight, "rows" if module_name.endswith("gate_up_proj") else None, isinstance(module, Conv1D)
    elif "Experts" in type(module).__name__ or hasattr(module, "num_experts"):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and len(owned(parameter).shape) == 3:
                transposed = _is_transposed(module, name, parameter)
                yield name, parameter, _expert_halves(module, name, transposed), transposed


def _is_transposed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """transformers 5 stores gate and up as (E, 2I, H), or transposed as (E, H, 2I); down the other way about."""
    hidden = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    axis = 1 if name.startswith("down") else 2
    return bool(getattr(module, "is_transposed", hidden is not None and owned(parameter).shape[axis] != hidden))


def _expert_halves(module: nn.Module, name: str, transposed: bool) -> Halves | None:
    """Gate and up are concatenated or interleaved."""
    if "gate_up" not in name or not getattr(module, "has_gate", True):
        return None
    axis: Literal["rows", "columns"] = "columns" if transposed else "rows"
    if getattr(module, "is_concatenated", True):
        return axis
    return "interleaved_columns" if transposed else "interleaved_rows"


def matrix_views(parameter: Tensor, halves: Halves | None = None) -> list[Tensor]:
    """The matrices that a contiguous parameter is made of, as (M, N) views of its memory."""
    data = parameter.detach()
    matrices = [data] if data.ndim == 2 else list(data)
    if halves is None:
        return matrices
    axis = 0 if halves.endswith("rows") else 1
    if halves.startswith("interleaved"):
        return [m[half::2] if axis == 0 else m[:, half::2] for m in matrices for half in (0, 1)]
    return [half for m in matrices for half in m.chunk(2, dim=axis)]


def match_targets(model: nn.Module, target_modules: str | Sequence[str] = "all-linear") -> list[Target]:
    """The weight matrices that a pattern means, in the model's order; nothing is frozen.

    Args:
        model: any module.
        target_modules: as for `build_param_groups`.

    Raises:
        ConfigError: if a pattern matches nothing, or is no valid expression.
    """
    targets = find_targets(model)
    names = [target.name for target in targets]
    matched = _match_all(_as_list(target_modules), names, names, "target_modules")
    return [target for target in targets if target.name in matched]


def build_param_groups(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_train: str | Sequence[str] = (),
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `SparseAdamW`; every other parameter of the model is frozen.

    Args:
        model: any module; transformers' models and plain ones alike.
        target_modules: what is trained sparsely: a preset (`all-linear`, `attention`, `mlp`, `q_proj`, `k_proj`,
            `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`), a regular expression, or a list of either,
            matched with `re.search` on the cleaned parameter name. Presets leave out output heads, poolers and
            routers; a regular expression takes those too, where they are linear layers.
        modules_to_train: what is trained densely, in the same notation: presets stand for matrices, expressions are
            matched with the names of all parameters. It wins over `target_modules`.
        weight_decay: of the groups; None leaves the optimizer's value in force.

    Returns:
        Groups with `params` as (name, parameter) pairs, `sparse` (True or False), and `halves`: how two matrices share
        each parameter of the group, None where each is one.

    Raises:
        ConfigError: if a pattern matches nothing, with a list of what there is, or is no valid expression.
    """
    targets = find_targets(model)
    # A tied parameter goes by each of its names: `lm_head` means the embedding that it shares.
    parameters = {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    matrices = [target.name for target in targets]
    patterns = _as_list(target_modules)
    dense_names = _match_all(_as_list(modules_to_train), list(parameters), matrices, "modules_to_train")
    matched = _match_all(patterns, matrices, matrices, "target_modules")
    dense = {id(parameters[name]) for name in dense_names}
    sparse = [t for t in targets if t.name in matched and id(t.parameter) not in dense]
    if patterns and not sparse:
        raise ConfigError(f"target_modules={target_modules!r} is trained densely already, by {modules_to_train!r}")
    trained = {id(t.parameter) for t in sparse} | dense
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = []
    for halves in dict.fromkeys(t.halves for t in sparse):
        members = [(t.name, t.parameter) for t in sparse if t.halves == halves]
        groups.append({"params": members, "sparse": True, "halves": halves, **decay})
    if dense_names:
        by_id: dict[int, tuple[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            if id(p) in dense:
                by_id.setdefault(id(p), (name, p))  # its first name, as in named_parameters
        members = list(by_id.values())
        groups.append({"params": members, "sparse": False, "halves": None, **decay})
    return groups


def _as_list(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _match_all(patterns: Iterable[str], names: list[str], matrices: list[str], argument: str) -> set[str]:
    """The names that any of the patterns matches; presets stand for weight matrices only."""
    matched: set[str] = set()
    for pattern in patterns:
        preset = PRESETS.get(pattern)
        try:
            expression = re.compile(pattern if preset is None else preset)
        except re.error as error:
            raise ConfigError(f"{argument}: {pattern!r} is no valid regular expression: {error}") from error
        if preset is None:
            hits = {name for name in names if expression.search(name)}
        else:
            hits = {name for name in matrices if _matches_preset(expression, name)}
        if not hits:
            raise ConfigError(
                f"{argument}: {pattern!r} matched none of the {len(names)} names; there are:\n{_menu(names)}"
            )
        matched |= hits
    return matched


def _matches_preset(expression: re.Pattern[str], name: str) -> bool:
    # Presets are written with a leading dot; the name gets one, so that a model's own top-level layers match too.
    return bool(expression.search(f".{name}")) and not _NEVER_BY_DEFAULT.search(name)


def _menu(names: list[str]) -> str:
    """The names with their numbers starred, one line for each kind, in order."""
    return "\n".join(f"  {kind}" for kind in dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
