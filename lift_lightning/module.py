"""The LightningModule: fine-tunes a language model by manual optimization, with LIFT or in full."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lift_lightning import __version__
from lift_lightning.adapters import Adapter, AdapterName, adapter_targets, put_on
from lift_lightning.callbacks import MaskRefreshCallback
from lift_lightning.callbacks.mask_refresh import CHECKPOINT_KEY as SELECTION_KEY
from lift_lightning.delta import open_folder
from lift_lightning.delta.checkpoint import with_base, without_base
from lift_lightning.delta.sources import check_names_in_base
from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.answering import Answering
from lift_lightning.evaluation.classification import (
    Classification,
    MetricName,
    Predictions,
    check_padding,
    judged_by,
    labels_of,
)
from lift_lightning.evaluation.recorder import summary_table
from lift_lightning.evaluation.results import source_commit
from lift_lightning.evaluation.tasks import GenericKind
from lift_lightning.losses import SummedLoss, causal_lm_loss, classification_loss
from lift_lightning.models import (
    ModelTask,
    checkpoint_activations,
    keep_buffer_dtypes,
    load_empty_model,
    load_model,
    load_tokenizer,
)
from lift_lightning.monitoring import StepMeter
from lift_lightning.optimizer import SparseAdamW
from lift_lightning.param_groups import build_param_groups
from lift_lightning.reduction import GradientSum
from lift_lightning.rivals import check_arguments, rank_by_budget, refuse_split_adapters
from lift_lightning.rng import rng_state, set_rng_state
from lift_lightning.selection_config import DEFAULT_RANK
from lift_lightning.sharding import Ranks, all_ranks, allocate, flatten_model, fully_shard_model

# And with it the strategies that the Trainer finds by name.
from lift_lightning.strategies import WEIGHTS_KEY, mixed_precision_of, refuse_split_models
from lift_lightning.support import CountOptimizerSteps, SkipReporter, leave_unwrapped, refuse_unsupported
from lift_lightning.weight_files import WeightFiles, WeightLayoutError

CHECKPOINT_KEY = "lift_lightning_module"

Method = Literal["lift", "full", AdapterName]
LossReduction = Literal["token_mean", "micro_batch_mean"]
StateDtype = Literal["float32", "bfloat16", "8bit"]
# The schedules of transformers that need nothing beyond warmup and length, and whose rate is a function of the step.
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt"]


class LiftLightningModule(pl.LightningModule):
    """A language model that is fine-tuned on its principal weights (arXiv 2506.00772).

    Needs a `MaskRefreshCallback`, which selects the entries. Optimization is manual, so that gradients of the selected
    entries can be taken out during the backward pass: accumulation and clipping are arguments here, not the Trainer's.
    A batch of the Trainer is a micro-batch; `global_step`, `max_steps` and `every_n_train_steps` count optimizer steps.

    Args:
        model_name_or_path: hub id or local folder of a transformers model.
        task: `causal_lm`, or `sequence_classification`.
        num_labels: of a classification; 1 is a regression; null takes what the DataModule says, else the checkpoint.
        method: `lift` trains selected entries of the targeted matrices; `full` trains every parameter; `lora`,
            `rslora`, `dora`, `pissa`, `shira` and `spectral` train an adapter on the targeted matrices.
        adapter_rank: of an adapter, the same for every matrix; 128 if neither this nor `match_budget` is given.
        adapter_alpha: scale of an adapter; null for twice the rank, with `pissa` for the rank.
        match_budget: set the largest `adapter_rank` at which no more numbers are trained than the Trainer's
            `MaskRefreshCallback` would select.
        target_modules: what is trained sparsely, or carries the adapter: a preset (`all-linear`, `attention`, `mlp`,
            `q_proj`, ...), a regular expression, or a list of either.
        modules_to_train: what is trained densely, in the same notation. Parameters that the checkpoint does not have,
            such as a new classifier head, always are.
        lr: peak learning rate.
        betas: AdamW's decay rates of the moments.
        eps: AdamW's epsilon.
        weight_decay: decoupled, on trained entries only.
        lr_scheduler_type: a schedule of transformers, such as `linear`, `cosine` or `constant_with_warmup`.
        warmup_ratio: share of the steps over which the learning rate rises from 0.
        accumulate_grad_batches: micro-batches to an optimizer step; fewer in the last step of an epoch.
        gradient_clip_val: largest global norm of the trained entries' gradients; null does not clip.
        loss_reduction: `token_mean` averages over all label tokens of the step, so that the split into micro-batches
            does not matter; `micro_batch_mean` averages the means of the micro-batches, as the released code does.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        state_dtype: dtype of the moments of sparse parameters, `float32`, `bfloat16` or `8bit`; `8bit` is of dense ones
            too.
        master_weights: keep float32 copies of the selected entries; null means for bfloat16 and float16 weights.
        attn_implementation: attention kernel of transformers, such as `sdpa`.
        revision: of the model on the hub.
        num_beams: of generation in `test` (the paper's code: 4).
        max_new_tokens: of an answer in `test`; null for each task's own limit (256; 32 where a label is asked for).
        temperature: of answers that are drawn from the model's distribution, by the seed of the run; null for the
            likeliest answer that the beams find.
        predictions_dir: where `test` writes predictions; `predictions` beside the logs of the run if null.
        save_base_weights: whether checkpoints hold all weights. Else they hold the delta from the base, which must be
            there when one is loaded.
        metrics: of a classification's validation: `accuracy`, `f1` (of class 1), `matthews`, or of a regression
            `pearson`, `spearman`; null takes those of the DataModule, else accuracy or both correlations.
        unknown_tasks: how `test` scores a file that is none of the known tasks: by its `number`, or its `exact` text;
            null refuses it.

    Raises:
        ConfigError: if a value is out of its range.
    """

    model: PreTrainedModel | None

    def __init__(
        self,
        model_name_or_path: str,
        task: ModelTask = "causal_lm",
        num_labels: int | None = None,
        method: Method = "lift",
        adapter_rank: int | None = None,
        adapter_alpha: float | None = None,
        match_budget: bool = False,
        target_modules: str | list[str] = "all-linear",
        modules_to_train: str | list[str] | None = None,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_scheduler_type: Schedule = "linear",
        warmup_ratio: float = 0.03,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        loss_reduction: LossReduction = "token_mean",
        gradient_checkpointing: bool = False,
        state_dtype: StateDtype = "float32",
        master_weights: bool | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        num_beams: int = 4,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        predictions_dir: str | None = None,
        unknown_tasks: GenericKind | None = None,
        metrics: list[MetricName] | None = None,
        save_base_weights: bool = True,
    ) -> None:
        super().__init__()
        if accumulate_grad_batches < 1:
            raise ConfigError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
        if not lr >= 0:
            raise ConfigError(f"lr must be at least 0, got {lr}")
        if not 0 <= warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio must be between 0 and 1, got {warmup_ratio}")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ConfigError(f"gradient_clip_val must be above 0, or null not to clip, got {gradient_clip_val}")
        for name, value, choices in (
            ("task", task, ModelTask),
            ("method", method, Method),
            ("lr_scheduler_type", lr_scheduler_type, Schedule),
            ("loss_reduction", loss_reduction, LossReduction),
            ("state_dtype", state_dtype, StateDtype),
        ):
            if value not in get_args(choices):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
        check_arguments(method, adapter_rank, adapter_alpha, match_budget, save_base_weights)
        if metrics is not None and task == "causal_lm":
            raise ConfigError(f"metrics are of sequence_classification only, got {metrics}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.model_name_or_path = model_name_or_path
        self.model = None
        self.adapter: Adapter | None = None
        self.new_parameters: list[str] = []
        self.meter = StepMeter()
        self._restored: dict[str, Any] | None = None
        self._skips: SkipReporter | None = None
        self._ranks: Ranks | None = None  # that train together with this one
        self._sum: GradientSum | None = None  # where each of them has the whole model
        self._settings: list[dict[str, Any]] = []
        self._start_step()
        self._val_total, self._val_weight = self._loss, self._weight
        self._labels: Classification | None = None  # of the DataModule, if it tells
        self._predictions = Predictions()

    def _start_step(self) -> None:
        """Nothing is accumulated: sums over the micro-batches of the coming step."""
        self._accumulated = 0
        self._inside = False  # a micro-batch, whose gradients may be half there
        # float32 and int64 whatever the default dtype: bfloat16 cannot count beyond 256.
        self._loss = torch.zeros((), dtype=torch.float32, device=self.device)
        self._weight = torch.zeros((), dtype=torch.int64, device=self.device)  # label tokens, or micro-batches

    # ---------------------------------------------------------------- model and optimizer

    def configure_model(self) -> None:
        """Load the model, once, in the precision that the Trainer asks for."""
        if self.model is not None:
            return
        files = None
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            files = self._make_empty_model()
        if files is None:
            self._load_whole_model()
        if self._labels is not None:
            check_padding(self.hf_model.config.pad_token_id, self.trainer.datamodule)
        self._judged_by()  # refuses metrics that it cannot have
        if self.hparams.gradient_checkpointing:
            checkpoint_activations(self.hf_model)
        if self.hparams.method not in ("lift", "full"):
            self._put_adapter_on()
        elif self._trainer is not None:
            self._shard()
        if files is not None:
            allocate(self.hf_model, self.trainer.strategy.root_device)
            files.fill(self.hf_model)
            files.close()

    def _load_whole_model(self) -> None:
        hparams = self.hparams
        self.model, self.new_parameters = load_model(
            hparams.model_name_or_path,
            task=hparams.task,
            num_labels=hparams.num_labels,
            revision=hparams.revision,
            attn_implementation=hparams.attn_implementation,
        )

    def _put_adapter_on(self) -> None:
        """Under every strategy that is not refused each process has the whole model."""
        hparams = self.hparams
        targets = adapter_targets(self.hf_model, hparams.method, hparams.target_modules, self._dense_patterns())
        if hparams.match_budget:
            callbacks = [] if self._trainer is None else self.trainer.callbacks
            # A checkpoint tells the rank, where no Trainer is.
            hparams.adapter_rank = rank_by_budget(self.hf_model, hparams.method, targets, callbacks)
            hparams.match_budget = False
        rank = DEFAULT_RANK if hparams.adapter_rank is None else hparams.adapter_rank
        self.adapter = put_on(self.hf_model, hparams.method, rank, alpha=hparams.adapter_alpha, targets=targets)

    def _make_empty_model(self) -> WeightFiles | None:
        """The model without weights, and where each process reads its part of them; None if it cannot be done so."""
        hparams = self.hparams
        reason = f"the task is {hparams.task}"
        if hparams.task == "causal_lm":
            try:
                self.model, files = load_empty_model(
                    hparams.model_name_or_path,
                    revision=hparams.revision,
                    attn_implementation=hparams.attn_implementation,
                )
                return files
            except WeightLayoutError as error:
                reason = str(error)
        rank_zero_info(f"each process loads all weights before the model is split, since {reason}")
        return None

    def _shard(self) -> None:
        """Split the model over the ranks, if that is the strategy: block by block, and not as a part of this module."""
        strategy, blocks = self.trainer.strategy, list(self.hf_model._no_split_modules or ())
        if isinstance(strategy, ModelParallelStrategy):
            fully_shard_model(self.hf_model, self.device_mesh["data_parallel"], blocks, self.trainer.precision)
        elif isinstance(strategy, FSDPStrategy):
            self.param_groups()  # freezes: for what is frozen when it is flattened no gradients are kept
            wrapped = flatten_model(
                self.hf_model,
                blocks,
                device=strategy.root_device,
                mixed_precision=mixed_precision_of(strategy),
                sharding_strategy=strategy.sharding_strategy,
                cpu_offload=strategy.cpu_offload,
                **strategy.kwargs,
            )
            self.model = cast(PreTrainedModel, wrapped)  # whose attributes it passes on

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiftLightningModule:
        # A Trainer in bf16-true casts buffers as well, and rotary frequencies in bfloat16 are another model.
        with keep_buffer_dtypes(self):
            return super()._apply(fn, recurse)

    @property
    def hf_model(self) -> PreTrainedModel:
        """The transformers model, once it is loaded."""
        assert self.model is not None, "configure_model() comes first"
        return self.model

    def configure_optimizers(self) -> dict[str, Any]:
        """`SparseAdamW` and a transformers schedule that `training_step` steps, once for each optimizer step."""
        hparams = self.hparams
        optimizer = SparseAdamW(
            self.param_groups(),
            lr=hparams.lr,
            betas=hparams.betas,
            eps=hparams.eps,
            weight_decay=hparams.weight_decay,
            state_dtype=hparams.state_dtype,
            master_weights=hparams.master_weights,
        )
        steps = self._total_steps()
        # Here, because it brings transformers' Trainer along, and peft and bitsandbytes where they are installed.
        from transformers import get_scheduler

        scheduler = get_scheduler(
            hparams.lr_scheduler_type,
            optimizer,
            num_warmup_steps=math.ceil(hparams.warmup_ratio * steps),
            num_training_steps=steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def param_groups(self) -> list[dict[str, Any]]:
        """What is trained sparsely and what densely; the rest is frozen. Override for another method."""
        if self.adapter is not None:
            return self.adapter.param_groups()
        if self.hparams.method == "full":
            return build_param_groups(self.hf_model, target_modules=(), modules_to_train=".")
        return build_param_groups(self.hf_model, self.hparams.target_modules, self._dense_patterns())

    def _dense_patterns(self) -> list[str]:
        new = [f"^{re.escape(name)}$" for name in self.new_parameters]
        wanted = self.hparams.modules_to_train or []
        return [*([wanted] if isinstance(wanted, str) else wanted), *new]

    def _total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches  # of optimizer steps, see CountOptimizerSteps
        if steps in (-1, float("inf")):
            raise MisconfigurationException(
                "the learning rate's schedule needs the length of the run: set trainer.max_steps or trainer.max_epochs"
            )
        return int(steps)

    def configure_callbacks(self) -> list[pl.Callback]:
        """What makes the Trainer count in optimizer steps, besides the user's callbacks."""
        return [*super().configure_callbacks(), CountOptimizerSteps(self, self.hparams.accumulate_grad_batches)]

    def setup(self, stage: str) -> None:
        """Take from the DataModule what is left open, and refuse what would train wrong in silence."""
        if self.hparams.method not in ("lift", "full"):
            refuse_split_adapters(self.hparams.method, self.trainer.strategy)
        self._labels = labels_of(getattr(self.trainer, "datamodule", None), self.hparams.task, self.hparams.num_labels)
        if self._labels is not None:
            self.hparams.num_labels = self._labels.num_labels  # a checkpoint tells export
        if stage == "fit":
            refuse_unsupported(self.trainer)
            if isinstance(self.trainer.strategy, DDPStrategy):
                leave_unwrapped(self.trainer.strategy)
            self._restored = None  # of a checkpoint that an earlier fit read and did not come to use

    def on_fit_start(self) -> None:
        """Refuse to train sparsely when nothing would select the entries."""
        for parameter in self.parameters():
            parameter.grad = None  # of a fit that broke off
        # The checkpoint, if any, is read after this.
        keys = ("initial_lr", "betas", "eps", "weight_decay")
        self._settings = [{k: group[k] for k in keys if k in group} for group in self._sparse_adamw().param_groups]
        # Checkpoints are taken between optimizer steps, which is where a run can be resumed.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        if self.hparams.method == "lift" and not self._has_selector():
            raise MisconfigurationException(
                "method='lift' needs a MaskRefreshCallback to select the entries: Trainer(callbacks="
                "[MaskRefreshCallback(interval=200, rank=128), ...])"
            )
        if not self.hparams.save_base_weights:
            refuse_split_models(self.trainer.strategy)
            with open_folder(self.model_name_or_path, self.hparams.revision) as base:
                check_names_in_base(self.hf_model, base.names(), self.new_parameters)

    def _has_selector(self) -> bool:
        return any(isinstance(callback, MaskRefreshCallback) for callback in self.trainer.callbacks)

    # ---------------------------------------------------------------- training

    def forward(self, **inputs: Tensor) -> Any:
        """The model's own output."""
        return self.hf_model(**inputs)

    def on_train_start(self) -> None:
        """Begin anew, whatever an earlier fit left behind; on resume, what is typed wins over what was saved."""
        self.meter = StepMeter()
        self._start_step()
        optimizer = self._sparse_adamw()
        if self._restored is not None:
            self._take_back_settings(optimizer)
        self._warn_of_narrow_dense_weights(optimizer)
        self._ranks = all_ranks()
        self._sum = None
        if self._ranks is not None and optimizer.split_over is None:
            self._sum = GradientSum(optimizer, self._ranks)
        self._skips = None if self._has_selector() else SkipReporter(optimizer)  # the callback has one of its own

    def _take_back_settings(self, optimizer: SparseAdamW) -> None:
        """After a checkpoint was read: what `configure_optimizers` had set, and its schedule's rates from here on."""
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            for group, rate, schedule in zip(
                optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * schedule(scheduler.last_epoch)

    def _warn_of_narrow_dense_weights(self, optimizer: SparseAdamW) -> None:
        dense = [p for group in optimizer.param_groups if not group["sparse"] for p in group["params"]]
        narrow = sum(p.numel() for p in dense if p.dtype in (torch.bfloat16, torch.float16))
        if narrow:
            rank_zero_warn(
                f"{narrow:,} densely trained entries are in {self.trainer.precision} without float32 masters, so small "
                "updates are lost; use trainer.precision=bf16-mixed"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """On resume, continue the random numbers where the checkpoint left them, after all loaders were started."""
        if self._restored is not None:
            self._accumulated = self._restored["accumulated"]
            self._weight = self._restored["weight"].to(self.device)
            self._loss = self._restored["loss"].to(self.device)
            self._continue_random_numbers(self._restored["rng"])
            self._restored = None

    def _continue_random_numbers(self, states: list[dict[str, Any]]) -> None:
        ranks, rank = (1, 0) if self._ranks is None else (self._ranks.size, self._ranks.rank)
        if len(states) == ranks:
            set_rng_state(states[rank])
        else:
            rank_zero_info(
                f"the checkpoint is of {len(states)} processes, these are {ranks}: dropout draws other numbers than it "
                "would have in a run without a break"
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One micro-batch; every `accumulate_grad_batches` of them, and at the end of an epoch, an optimizer step."""
        self._inside = True
        loss = self._summed_loss(batch)
        if self.hparams.loss_reduction == "token_mean":
            summand, weight = loss
        else:
            summand, weight = loss.total / loss.weight.clamp(min=1), torch.ones_like(loss.weight)
        last = self._accumulated + 1 >= self.hparams.accumulate_grad_batches or self.trainer.is_last_batch
        if last and self._sum is not None:
            self._sum.begin()
        self.manual_backward(summand)
        self._accumulated += 1
        self._weight += weight
        self._loss += summand.detach()
        self.meter.count(batch["attention_mask"].sum())
        if last:
            self._optimizer_step()
        self._inside = False

    def _sparse_adamw(self) -> SparseAdamW:
        return self.optimizers().optimizer

    def _optimizer_step(self) -> None:
        optimizer = self._sparse_adamw()
        loss, weight = self._over_ranks(self._loss, self._weight)
        weight = weight.clamp(min=1)
        scale = 1.0 / weight
        if self._sum is not None:
            self._sum.finish()
        elif self._ranks is not None:
            scale *= self._ranks.size  # FSDP takes the mean over the ranks, which may have different weights
        optimizer.scale_grads_(scale)
        clip = self.hparams.gradient_clip_val
        norm = optimizer.clip_grad_norm_(float("inf") if clip is None else clip)
        self.optimizers().step()  # Lightning's wrapper: it advances global_step
        optimizer.zero_grad()
        self.lr_schedulers().step()
        self._log_step({"train_loss": loss / weight, "grad_norm": norm})
        self._start_step()

    def _over_ranks(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Each summed over the ranks, in one exchange."""
        if self._ranks is None:
            return sums
        totals = self._ranks.sum_(torch.stack([one.double() for one in sums]))
        return tuple(total.to(one.dtype) for total, one in zip(totals, sums, strict=True))

    def _log_step(self, metrics: dict[str, Tensor]) -> None:
        # Lightning would send a step's values again with every micro-batch of the next one, so loggers are served here.
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name == "train_loss", logger=False)
        every = self.trainer.log_every_n_steps
        if self.loggers and every and self.global_step % every == 0:
            rates = self.meter.rates(self.device)
            if self._ranks is not None and "tokens_per_second" in rates:
                rates["tokens_per_second"] = self._over_ranks(torch.as_tensor(rates["tokens_per_second"]))[0]
            if self._sum is not None:
                rates["reduced_mib"] = self._sum.sent_bytes / 2**20
            values = {name: float(value) for name, value in {**metrics, **rates}.items()}
            for logger in self.loggers:
                logger.log_metrics({**values, "epoch": self.current_epoch}, step=self.global_step - 1)
        if self._skips is not None:
            self._skips.look(every)

    def _summed_loss(self, batch: dict[str, Tensor]) -> SummedLoss:
        return self._loss_of(self._logits(batch), batch["labels"])

    def selection_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """0-dim mean loss of a batch, for criteria that select by its gradient."""
        loss = self._summed_loss(batch)
        return loss.total / loss.weight.clamp(min=1)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        options = {"use_cache": False} if self.hparams.task == "causal_lm" else {}
        return self(**inputs, **options).logits

    def _loss_of(self, logits: Tensor, labels: Tensor) -> SummedLoss:
        return (causal_lm_loss if self.hparams.task == "causal_lm" else classification_loss)(logits, labels)

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Start the sums, in float32 and int64: a torchmetrics mean is cast with the module, and bfloat16 saturates."""
        self._val_total = torch.zeros((), dtype=torch.float32, device=self.device)
        self._val_weight = torch.zeros((), dtype=torch.int64, device=self.device)
        self._predictions = Predictions()
        self._ranks = all_ranks()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss over the label tokens (or examples) of the whole validation set, and predictions of a classification."""
        logits = self._logits(batch)
        loss = self._loss_of(logits, batch["labels"])
        self._val_total += loss.total
        self._val_weight += loss.weight
        if self.hparams.task != "causal_lm":
            self._predictions.add(logits, batch["labels"], dataloader_idx)

    def _judged_by(self) -> Classification | None:
        if self.hparams.task == "causal_lm":
            return None
        num_labels = self.hf_model.config.num_labels
        assert num_labels is not None, "transformers gives a classifier 2 if nothing else is said"
        return judged_by(self._labels, num_labels, self.hparams.metrics)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss`; `val_perplexity` over tokens for a language model, the metrics of a classification."""
        total, weight = self._over_ranks(self._val_total, self._val_weight)
        mean = total / weight.clamp(min=1)
        # sync_dist changes nothing, all ranks have the same by now, and keeps Lightning from recommending it.
        self.log("val_loss", mean, prog_bar=True, sync_dist=True)
        if self.hparams.task == "causal_lm":
            self.log("val_perplexity", mean.exp(), sync_dist=True)
        if (judged := self._judged_by()) is not None:
            found = self._predictions.rows()
            for name, value in judged.measure([found] if self._ranks is None else self._ranks.objects(found)).items():
                self.log(f"val_{name}", value, prog_bar=True, sync_dist=True)

    # ---------------------------------------------------------------- test

    def on_test_start(self) -> None:
        """Begin, or take up, the predictions."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise MisconfigurationException(
                "test generates answers, which a model wrapped by FSDP1 does not do: set trainer.strategy to fsdp2, "
                "ddp or auto, which read the same checkpoints"
            )
        if self.hparams.task != "causal_lm":
            raise MisconfigurationException(
                f"test generates answers, which task={self.hparams.task!r} does not do: use validate"
            )
        hparams = self.hparams
        beside = self.trainer.log_dir or self.trainer.default_root_dir
        folder = Path(hparams.predictions_dir or Path(beside) / "predictions")
        self._answering = Answering(
            load_tokenizer(self.model_name_or_path, hparams.revision),
            hparams.num_beams,
            hparams.max_new_tokens,
            folder,
            self._about(),
            hparams.unknown_tasks,
            all_ranks(),
            temperature=hparams.temperature,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 43)),
            in_step=isinstance(self.trainer.strategy, ModelParallelStrategy),
        )
        if self._answering.already:
            rank_zero_info(f"{folder} has {self._answering.already:,} answers of this test already")

    def _about(self) -> dict[str, Any]:
        """What is tested, and how."""
        hparams = self.hparams
        return {
            "model": self.model_name_or_path,
            "revision": hparams.revision,
            "checkpoint": None if self.trainer.ckpt_path is None else str(self.trainer.ckpt_path),
            "precision": self.trainer.precision,
            "num_beams": hparams.num_beams,
            "max_new_tokens": hparams.max_new_tokens,
            "temperature": hparams.temperature,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "lift_lightning": __version__,
            "commit": source_commit(),
            "command": shlex.join(sys.argv),
        }

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate answers to one left-padded batch of prompts and score them, those that are not there yet."""
        self._answering.answer(self.hf_model, batch)
        # Lightning's bar counts batches. A name of its own for each task, since a metric may not be of two loaders.
        name = f"{batch['rows'][0]['task']}_samples_per_second"
        self.log(name, self._answering.rate, prog_bar=True, logger=False, add_dataloader_idx=False, batch_size=1)

    def on_test_epoch_end(self) -> None:
        """Log each task's accuracy by both rules, and print them as a table."""
        summaries = self._answering.finish()
        for task, found in summaries.items():
            self.log(f"test_{task}_paper", found.accuracy_paper, sync_dist=True)
            self.log(f"test_{task}_strict", found.accuracy_strict, sync_dist=True)
        if self.trainer.is_global_zero:
            Console().print(summary_table(summaries, self._answering.folder))

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a bit-equal resume needs: random states, and the sums of a step that is under way.

        A checkpoint that an exception asks for inside a micro-batch begins its next step anew: the gradients may hold a
        part of that micro-batch.
        """
        under_way = self._ranks is not None and self._accumulated > 0  # each rank has a part of the gradients
        if self._inside or under_way:
            where = "inside a micro-batch" if self._inside else "between the micro-batches of a step"
            rank_zero_warn(f"a checkpoint is saved {where}: the gradients of the step are left out")
            selection = checkpoint.get(SELECTION_KEY, {"optimizer": {"parameters": {}, "dense_grads": {}}})["optimizer"]
            selection["dense_grads"] = {}
            for tensors in selection["parameters"].values():
                tensors.pop("grad", None)
            self._start_step()
        checkpoint[CHECKPOINT_KEY] = {
            "accumulated": self._accumulated,
            "weight": self._weight,
            "loss": self._loss,
            "rng": [rng_state()] if self._ranks is None else self._ranks.objects(rng_state()),
        }
        if not self.hparams.save_base_weights:
            self._leave_out_base(checkpoint)

    def _leave_out_base(self, checkpoint: dict[str, Any]) -> None:
        weights = {
            name.removeprefix("model."): checkpoint["state_dict"].pop(name)
            for name in list(checkpoint["state_dict"])
            if name.startswith("model.")
        }
        if self.trainer.is_global_zero:  # which writes the file
            with open_folder(self.model_name_or_path, self.hparams.revision) as base:
                checkpoint[WEIGHTS_KEY] = without_base(weights, base)

    def _put_back_base(self, checkpoint: dict[str, Any]) -> None:
        with open_folder(self.model_name_or_path, self.hparams.revision) as base:
            weights = with_base(checkpoint.pop(WEIGHTS_KEY), base, "the checkpoint")
        checkpoint["state_dict"].update({f"model.{name}": tensor for name, tensor in weights.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until the first batch of a fit that resumes; what is only loaded must not reach into the next fit.

        Weights without the base's get those back, before they are loaded.
        """
        if WEIGHTS_KEY in checkpoint:
            self._put_back_base(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._restored = checkpoint.get(CHECKPOINT_KEY)
