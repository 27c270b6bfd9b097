"""SparseAdamW: AdamW on the selected entries of weight matrices, with states of length K.

Letters: K selected entries of one parameter. Sparse parameters have a `SparseState` outside `optimizer.state`, because
`Optimizer.load_state_dict` casts state tensors to the parameter's dtype, which would round indices; dense parameters
(a new classifier head) have the state of an ordinary AdamW.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from lift_lightning import indices as layout
from lift_lightning.eight_bit import BlockwiseVector
from lift_lightning.errors import ConfigError
from lift_lightning.functional import adamw_update
from lift_lightning.sharding import Owned, Ranks, is_absent, local, owned, ranks_of, step_shape, total_norm
from lift_lightning.sparse_state import MomentsDtype, SparseState, plain, working_dtype
from lift_lightning.threads import side_by_side

# Entries of a dense parameter from which on its moments are in 8 bits, as in bitsandbytes.
_EIGHT_BIT_FROM = 4096
# Selected entries that are updated together.
_CHUNK_ENTRIES = 2**18

# The hook that releases a parameter's gradient, so that a newer optimizer on the same model can take it over.
_RELEASE_HOOKS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class SparseAdamW(Optimizer):
    """AdamW on K selected entries of each sparse parameter, and on all entries of each dense one.

    Indices come from outside: `set_indices` gives a parameter its selection, before the first step and at every
    refresh. Gradients of sparse parameters are read in a post-accumulate hook, entry by entry, and the dense gradient
    is dropped at once, so that the dense gradients of a whole model never exist together; use the optimizer's own
    `zero_grad`, since the model's does not know of them. Steps whose gradients are
    not finite change nothing and are counted in `skipped_steps`, without a host synchronisation.

    Args:
        params: groups from `build_param_groups`. A group with `sparse=True` is trained at its indices only.
        lr: learning rate.
        betas: decay rates of the moments. Bias correction counts the steps of the parameter, not of the entry (paper,
            Algorithm 1): the first update of an entry that a late refresh adds is (1-beta1)/sqrt(1-beta2) times lr,
            0.45 for beta2 = 0.95 and 3.16 for beta2 = 0.999.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on selected entries only.
        state_dtype: dtype of the moments of sparse parameters (float64 for float64 weights); `8bit` keeps them as
            blockwise codes, by bitsandbytes, and checkpoints as float32. The moments of dense parameters are in their
            own dtype, unless it is `8bit` and they are no fewer than 4096.
        master_weights: keep a float32 copy of the selected entries, so that updates smaller than half a unit of the
            weight's dtype are not lost. None means for bfloat16 and float16 weights only.
        release_gradients: False leaves the dense gradients in place until `step` reads them.

    Attributes:
        split_over: the ranks that the parameters are split over, as by FSDP2; None where each rank has all of them.

    Raises:
        ConfigError: if a hyperparameter is out of range or the dtype is not floating point.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | str = torch.float32,
        master_weights: bool | None = None,
        release_gradients: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ConfigError(f"{name} must be at least 0, got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas must be two numbers of at least 0 and below 1, got {betas}")
        self.state_dtype = _state_dtype(state_dtype)
        self.master_weights = master_weights
        self.release_gradients = release_gradients
        self.thin_state_dict = False
        self.attempted_steps = 0
        self._sparse: dict[nn.Parameter, SparseState] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._owned: dict[nn.Parameter, Owned] = {}
        self._dense_moments: dict[nn.Parameter, tuple[BlockwiseVector, BlockwiseVector]] = {}
        # Called with a sparse parameter when its hook has collected from its gradient (see `reduction`).
        self.on_collected: Callable[[nn.Parameter, Tensor], None] | None = None
        self._hooks: list[RemovableHandle] = []
        self._spent = False  # whether a step has used the gradients that are there
        # What clipping measured, and of which gradients: the step need not look at the same ones again.
        self._norm: tuple[Tensor, list[tuple[int, int]]] | None = None
        weakref.finalize(self, _remove_hooks, self._hooks)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "sparse": False, "halves": None, "fused": True})
        self.skipped_steps = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        split = any(mine.group is not None for mine in self._owned.values())
        self.split_over: Ranks | None = ranks_of(list(self._owned)) if split else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its `step` counters (and moments, where dense) are made at once, the same keys on every rank."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names") or [f"{len(self.param_groups) - 1}.{i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            if name in self._names.values():
                raise ValueError(f"two parameters are called {name!r}: checkpoints go by name, so give each its own")
            self._names[parameter] = name
            self._owned[parameter] = owned(parameter)
            _drop_earlier_hook(parameter)
            if not is_absent(parameter):
                state = self.state[parameter]
                state["step"] = torch.zeros(step_shape(parameter), dtype=torch.float32, device=parameter.device)
                if not group["sparse"] and self._in_eight_bits(parameter):
                    zeros = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                    self._dense_moments[parameter] = (
                        BlockwiseVector(zeros, signed=True),
                        BlockwiseVector(zeros, signed=False),
                    )
                elif not group["sparse"]:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if group["sparse"]:
                layout.flat_view(local(parameter))  # raises where there is none, before anything was changed
                if self.release_gradients:
                    self._hook(parameter)

    def _in_eight_bits(self, parameter: nn.Parameter) -> bool:
        """Whether a dense parameter's moments are; small ones keep their precision, as in bitsandbytes."""
        if self.state_dtype != "8bit" or self._owned[parameter].numel < _EIGHT_BIT_FROM:
            return False
        if self._owned[parameter].group is not None:
            raise ConfigError(
                f"state_dtype='8bit' keeps the moments of {self._names[parameter]!r}, which is trained densely, in "
                "blocks that cannot be split over devices: use DDP or a single device, or another state_dtype"
            )
        layout.flat_view(parameter)  # raises where there is none
        return True

    # ---------------------------------------------------------------- selection

    def sparse_parameters(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """(name, parameter, group) of every sparse parameter, in order."""
        for group in self.param_groups:
            if group["sparse"]:
                for parameter in group["params"]:
                    yield self._names[parameter], parameter, group

    def dense_parameters(self) -> list[nn.Parameter]:
        """Those that are trained whole, in order."""
        return [p for group in self.param_groups if not group["sparse"] for p in group["params"]]

    def is_selected(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter has its selection."""
        return parameter in self._sparse

    def has_selection(self) -> bool:
        """Whether every sparse parameter has its selection."""
        return all(self.is_selected(parameter) for _, parameter, _ in self.sparse_parameters())

    def indices(self, parameter: nn.Parameter) -> Tensor:
        """(K,) ascending flat indices of the entries of `parameter` that are trained, in what this rank has of it.

        Raises:
            RuntimeError: before the first `set_indices`.
        """
        return self.state_of(parameter).indices

    @torch.no_grad()
    def set_indices(self, parameter: nn.Parameter, indices: Tensor) -> int:
        """Give a sparse parameter its selection; to be called between steps.

        Moments (and master weights) of entries that were selected before are kept, entries that are new start at
        zero, dropped ones are forgotten (paper, Algorithm 1). Gradients that were collected so far are dropped.

        Args:
            parameter: one of a sparse group.
            indices: (K,) flat indices into the whole parameter, ascending and without repeats, any integer dtype and
                device. Of a parameter that is split over ranks this one keeps those that it owns.

        Returns:
            How many of the entries were selected before, on this rank.

        Raises:
            ValueError: if the parameter is not sparse here, or the indices are not as described.
        """
        if not any(parameter is p for _, p, _ in self.sparse_parameters()):
            raise ValueError("the parameter is in no sparse group of this optimizer")
        mine = self._owned[parameter]
        layout.check_indices(indices, mine.numel, self._names[parameter])
        if mine.group is not None:
            indices = indices[layout.slice_for_shard(indices, mine.start, mine.stop)] - mine.start
        if parameter in self._sparse:
            self._sparse[parameter], kept = self._sparse[parameter].reselected(parameter, indices)
            return kept
        narrow = parameter.dtype != working_dtype(parameter)
        master = narrow if self.master_weights is None else self.master_weights and narrow
        self._sparse[parameter] = SparseState.first(parameter, indices, self.state_dtype, master)
        return 0

    def state_of(self, parameter: nn.Parameter) -> SparseState:
        """Indices, moments, master and gradient of a sparse parameter; they are replaced at a refresh.

        Raises:
            RuntimeError: before the first `set_indices`.
        """
        try:
            return self._sparse[parameter]
        except KeyError:
            raise RuntimeError(
                f"parameter {self._names.get(parameter, '?')!r} has no selected entries yet: add "
                "MaskRefreshCallback to the Trainer's callbacks, or call refresh_masks(optimizer, config) or "
                "optimizer.set_indices(parameter, indices) before the first step"
            ) from None

    # ---------------------------------------------------------------- gradients

    def _hook(self, parameter: nn.Parameter) -> None:
        this = weakref.ref(self)

        def release(parameter: nn.Parameter) -> None:
            optimizer = this()
            # Before the first selection the gradient stays where it is; step() raises in that case.
            if optimizer is not None and parameter in optimizer._sparse:
                grad = optimizer._sparse[parameter].collect(parameter)
                optimizer._spent = False
                if optimizer.on_collected is not None:
                    optimizer.on_collected(parameter, grad)

        handle = parameter.register_post_accumulate_grad_hook(release)
        self._hooks.append(handle)
        _RELEASE_HOOKS[parameter] = handle

    @property
    def hooks_attached(self) -> bool:
        """Whether the gradients of sparse parameters are taken in the backward pass."""
        return bool(self._hooks)

    def attach_hooks(self) -> None:
        """Take the gradients in the backward pass again, after `remove_hooks`."""
        if self.release_gradients and not self._hooks:
            for _, parameter, _ in self.sparse_parameters():
                _drop_earlier_hook(parameter)
                self._hook(parameter)

    def remove_hooks(self) -> None:
        """Leave the gradients of sparse parameters to whoever trains them next; `step` still works, from `p.grad`."""
        _remove_hooks(self._hooks)
        self._hooks.clear()

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """The gradients of the coming step on this rank: (K,) of sparse parameters, whole ones of dense parameters."""
        return list(self.gradients_by_parameter().values())

    @torch.no_grad()
    def gradients_by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """The same, each with its parameter."""
        # Put there by hand, or by a backward without the hook.
        waiting = [parameter for parameter in self._sparse if parameter.grad is not None]
        side_by_side(lambda p: self._sparse[p].collect(p), waiting, at_once=_on_cpu(waiting))
        # In the order of the groups, whatever the order of their first selection: sums depend on it.
        states = {p: self._sparse[p] for _, p, _ in self.sparse_parameters() if p in self._sparse}
        found = {p: state.grad for p, state in states.items() if state.grad is not None}
        whole = {p: p.grad for p in self.dense_parameters() if p.grad is not None}
        return found | {p: grad if self._owned[p].group is None else local(grad) for p, grad in whole.items()}

    def set_gradient(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Replace what `gradients_by_parameter` returned of a parameter that no ranks share."""
        if parameter in self._sparse:
            self._sparse[parameter].grad = grad
        else:
            parameter.grad = grad.view(parameter.shape)
        self._spent = False

    def _total_norm(self) -> Tensor:
        """0-dim 2-norm of all gradients, on all ranks."""
        grads = self.gradients_by_parameter()
        whole = [grad for p, grad in grads.items() if self._owned[p].group is None]
        split = [grad for p, grad in grads.items() if self._owned[p].group is not None]
        return total_norm(whole, split, self.split_over, self.skipped_steps.device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those collected from the selected entries too."""
        super().zero_grad(set_to_none)
        for state in self._sparse.values():
            state.grad = None
        self._spent = False

    @torch.no_grad()
    def scale_grads_(self, factor: Tensor | float) -> None:
        """Multiply every gradient of the coming step by a number, or a 0-dim tensor on their device."""
        grads = self.gradients()
        _multiply_(grads, factor)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float = float("inf")) -> Tensor:
        """Clip the global 2-norm over sparse and dense gradients together, as `torch.nn.utils.clip_grad_norm_`.

        The norm is that of what is trained: entries that are not selected do not count.

        Args:
            max_norm: infinity measures only.

        Returns:
            0-dim norm before clipping.
        """
        grads = self.gradients()
        norm = self._total_norm()
        if grads and max_norm != float("inf"):
            _multiply_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._norm = norm, _versions(grads)
        return norm

    @torch.no_grad()
    def clip_grad_value_(self, clip_value: float) -> None:
        """Clip every gradient entry to [-clip_value, clip_value]."""
        grads = self.gradients()
        if grads:
            torch._foreach_clamp_min_(grads, -clip_value)
            torch._foreach_clamp_max_(grads, clip_value)

    # ---------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the selected entries of sparse parameters and all entries of dense ones.

        Parameters without a gradient are left alone, as in torch. Nothing here waits for the device.

        Raises:
            RuntimeError: if a sparse parameter has no selection yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, parameter, _ in self.sparse_parameters():
            self.state_of(parameter)
        grads = self.gradients()
        self.attempted_steps += 1
        if not grads and self.split_over is None:
            return loss
        # Ranks that share a parameter measure it together, or one would wait for another that need not.
        known = self.split_over is None and self._norm is not None and self._norm[1] == _versions(grads)
        norm = self._norm[0] if self._norm is not None and known else self._total_norm()
        found_inf = (~torch.isfinite(norm)).to(torch.float32)
        self.skipped_steps = self.skipped_steps.to(found_inf.device) + found_inf
        for group in self.param_groups:
            (self._step_sparse if group["sparse"] else self._step_dense)(group, found_inf)
        self._spent = True
        return loss

    def _step_sparse(self, group: dict[str, Any], found_inf: Tensor) -> None:
        trained = [p for p in group["params"] if self._sparse[p].grad is not None]
        additive = isinstance(group["weight_decay"], (int, float)) and group["weight_decay"] == 0
        hyperparameters = _hyperparameters(group)

        def update(parameters: list[nn.Parameter]) -> None:
            states = [self._sparse[p] for p in parameters]
            operands = [s.operand(p, additive=additive) for p, s in zip(parameters, states, strict=True)]
            adamw_update(
                operands,
                [s.grad for s in states if s.grad is not None],
                [s.exp_avg for s in states],
                [s.exp_avg_sq for s in states],
                [self.state[p]["step"] for p in parameters],
                found_inf=found_inf,
                **hyperparameters,
            )
            for parameter, state, operand in zip(parameters, states, operands, strict=True):
                state.write(parameter, operand, additive=additive)

        # Some parameters at a time, so that the operands of one update take the memory of the last.
        chunks = _chunks(trained, lambda p: self._sparse[p].indices.numel(), _CHUNK_ENTRIES)
        side_by_side(update, list(chunks), at_once=_on_cpu(trained))

    def _step_dense(self, group: dict[str, Any], found_inf: Tensor) -> None:
        with_grad = [p for p in group["params"] if p.grad is not None]
        # One at a time: its moments are float32 only while they are worked on.
        for p in (p for p in with_grad if p in self._dense_moments):
            exp_avg, exp_avg_sq = self._dense_moments[p]
            adamw_update(
                [layout.flat_view(p)],
                [p.grad.reshape(-1)],
                [exp_avg],
                [exp_avg_sq],
                [self.state[p]["step"]],
                found_inf=found_inf,
                **_hyperparameters(group),
            )
        parameters = [p for p in with_grad if p not in self._dense_moments]
        adamw_update(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters],
            [local(self.state[p]["exp_avg"]) for p in parameters],
            [local(self.state[p]["exp_avg_sq"]) for p in parameters],
            [self.state[p]["step"] for p in parameters],
            found_inf=found_inf,
            **_hyperparameters(group),
        )

    # ---------------------------------------------------------------- state

    def state_bytes(self) -> int:
        """Bytes of indices, moments, masters and accumulators, and of the dense groups' moments."""
        dense = [self.state[p] for p in self.dense_parameters() if p in self.state and p not in self._dense_moments]
        dense_bytes = sum(local(state[key]).nbytes for state in dense for key in ("exp_avg", "exp_avg_sq"))
        dense_bytes += sum(moment.nbytes for pair in self._dense_moments.values() for moment in pair)
        return dense_bytes + sum(s.nbytes(p) for p, s in self._sparse.items())

    def sparse_state_dict(self) -> dict[str, Any]:
        """Selections, moments, masters and pending gradients by parameter name; tensors and numbers only.

        Gradients are there only between the micro-batches of one step, those of dense parameters too: what a step has
        used is left out, whether `zero_grad` was called or not.

        Where parameters are split over ranks, each has to call this. The vectors are those of the whole parameters,
        with indices into these, and only rank 0 of them gets any; gradients of a step that is under way are left out.
        """
        with_grads = not self._spent and self.split_over is None
        if with_grads:
            self.gradients()  # collects those that no hook has taken
        parameters = {}
        for name, parameter, _ in self.sparse_parameters():
            if self.is_selected(parameter):
                tensors = self._sparse[parameter].state_dict(with_grad=with_grads)
                parameters[name] = self._of_all_ranks(parameter, tensors)
        grads = {self._names[p]: p.grad for p in self.dense_parameters() if p.grad is not None}
        return {
            "attempted_steps": self.attempted_steps,
            "skipped_steps": self.skipped_steps,
            "parameters": {name: tensors for name, tensors in parameters.items() if tensors},
            "dense_grads": grads if with_grads else {},
            "dense_moments": {
                self._names[p]: {"exp_avg": plain(first), "exp_avg_sq": plain(second)}
                for p, (first, second) in self._dense_moments.items()
            },
        }

    def _of_all_ranks(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mine = self._owned[parameter]
        if mine.group is None or self.split_over is None:
            return tensors
        wide = layout.index_dtype(mine.numel)
        tensors = {**tensors, "indices": tensors["indices"].to(wide) + mine.start}
        gathered = {key: self.split_over.gather(vector) for key, vector in tensors.items()}
        return {key: vector for key, vector in gathered.items() if vector is not None}

    @torch.no_grad()
    def load_sparse_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `sparse_state_dict` returned, on the same ranks or others; each has to have all of it.

        Raises:
            ConfigError: if the names are not those of this optimizer's sparse parameters.
            ValueError: if the sizes are not those of this optimizer's sparse parameters.
        """
        saved = state_dict["parameters"]
        mine = {name: parameter for name, parameter, _ in self.sparse_parameters()}
        if saved and saved.keys() != mine.keys():
            raise ConfigError(
                f"the checkpoint's selection is for {len(saved)} parameters, this optimizer has {len(mine)}: "
                f"only in the checkpoint {sorted(saved.keys() - mine.keys())[:3]}, "
                f"only here {sorted(mine.keys() - saved.keys())[:3]}; "
                "resume with the target_modules of the run that wrote it"
            )
        for name, tensors in saved.items():
            parameter, indices = mine[name], tensors["indices"]
            for key, vector in tensors.items():
                if vector.shape != indices.shape:  # copying would broadcast a single entry
                    raise ValueError(f"{name}: {indices.numel()} indices, but {vector.numel()} of {key}")
            self.set_indices(parameter, indices)
            here = layout.slice_for_shard(indices, self._owned[parameter].start, self._owned[parameter].stop)
            self._sparse[parameter].load_state_dict({key: vector[here] for key, vector in tensors.items()})
        named = {name: parameter for parameter, name in self._names.items()}
        self._load_dense_moments(state_dict.get("dense_moments", {}))
        for name, grad in state_dict["dense_grads"].items():
            named[name].grad = grad.to(named[name].device, copy=True)  # the next backward adds to it in place
        self._spent = False
        self.attempted_steps = state_dict["attempted_steps"]
        self.skipped_steps = state_dict["skipped_steps"].to(self.skipped_steps.device)

    def _load_dense_moments(self, saved: dict[str, dict[str, Tensor]]) -> None:
        mine = {self._names[p]: pair for p, pair in self._dense_moments.items()}
        if saved.keys() != mine.keys():
            raise ConfigError(
                f"the checkpoint has {len(saved)} dense parameters with moments in 8 bits, this optimizer "
                f"{len(mine)}: resume with the state_dtype of the run that wrote it"
            )
        for name, moments in saved.items():
            for moment, key in zip(mine[name], ("exp_avg", "exp_avg_sq"), strict=True):
                if moments[key].numel() != moment.numel():
                    raise ValueError(f"{name}: {moment.numel()} entries, but {moments[key].numel()} of {key}")
                moment.copy_(moments[key])

    def __getstate__(self) -> dict[str, Any]:
        # Torch's own leaves out everything but groups and state, and a copy's hooks would be those of the original.
        raise TypeError(
            "SparseAdamW can be neither copied nor pickled: build one for the copied model and load_state_dict into it"
        )

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict, with the sparse part under `sparse` unless a callback saves that (`thin_state_dict`)."""
        state_dict = super().state_dict()
        if not self.thin_state_dict:
            state_dict["sparse"] = self.sparse_state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; a thin one leaves the sparse part to `load_sparse_state_dict`.

        Raises:
            ConfigError: if the groups are not of the same sizes.
        """
        state_dict = dict(state_dict)
        sparse = state_dict.pop("sparse", None)
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        mine = [len(group["params"]) for group in self.param_groups]
        if saved != mine:
            raise ConfigError(
                f"the checkpoint's optimizer has groups of {saved} parameters, this one of {mine}: resume with the "
                "method, target_modules and modules_to_train of the run that wrote it"
            )
        super().load_state_dict(state_dict)
        if sparse is not None:
            self.load_sparse_state_dict(sparse)


def _chunks(
    parameters: list[nn.Parameter], size: Callable[[nn.Parameter], int], limit: int
) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, as many together as have `limit` entries, at least one."""
    chunk: list[nn.Parameter] = []
    entries = 0
    for parameter in parameters:
        if chunk and entries + size(parameter) > limit:
            yield chunk
            chunk, entries = [], 0
        chunk.append(parameter)
        entries += size(parameter)
    if chunk:
        yield chunk


def _on_cpu(parameters: list[nn.Parameter]) -> bool:
    """Whether all are plain tensors in CPU memory: subclasses such as FakeTensor keep to the thread of their use."""
    return all(p.device.type == "cpu" and type(p.detach()) is Tensor for p in parameters)


def _multiply_(grads: list[Tensor], factor: Tensor | float) -> None:
    """In place, in one kernel for each device."""
    for device in dict.fromkeys(grad.device for grad in grads):
        here = factor.to(device) if isinstance(factor, Tensor) else factor
        torch._foreach_mul_([grad for grad in grads if grad.device == device], here)


def _versions(grads: list[Tensor]) -> list[tuple[int, int]]:
    """Changes when one of them is written to, or is another."""
    return [(id(grad), grad._version) for grad in grads]


def _state_dtype(given: torch.dtype | str) -> MomentsDtype:
    if given == "8bit":
        return "8bit"
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"state_dtype must be a floating dtype or '8bit', got {given}")
    return dtype


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}


def _drop_earlier_hook(parameter: nn.Parameter) -> None:
    """Whatever the newer optimizer does with the parameter, the older one must not take its gradients away."""
    earlier = _RELEASE_HOOKS.pop(parameter, None)
    if earlier is not None:
        earlier.remove()


def _remove_hooks(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
