"""What a model with a classifier head is judged by: predictions of a whole evaluation, measured by torchmetrics.

Letters: B sequences in a batch; C classes; P rows of an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score, multiclass_accuracy, multiclass_matthews_corrcoef
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from lift_lightning.errors import ConfigError
from lift_lightning.losses import has_label

MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Found = dict[int, tuple[Tensor, Tensor]]  # by loader predictions and labels, (P,) each


@dataclass(frozen=True)
class Classification:
    """Labels of rows, and what a model of them is judged by. A DataModule that has one as `classification` is followed.

    Attributes:
        num_labels: classes; 1 is a regression.
        metrics: of validation.
        parts: what the validation loaders are called in the names of metrics, where there are several.

    Raises:
        ConfigError: if a metric is none, or not one of so many classes.
    """

    num_labels: int
    metrics: tuple[MetricName, ...]
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fitting = [name for name in get_args(MetricName) if _suits(name, self.num_labels)]
        for name in self.metrics:
            if name not in fitting:
                raise ConfigError(
                    f"metrics of {self.num_labels} labels ({'regression' if self.num_labels == 1 else 'classes'}) must "
                    f"be of {', '.join(fitting)}, got {name!r}: set --model.metrics"
                )

    def measure(self, ranks: Sequence[Found]) -> dict[str, float]:
        """Every metric over the rows of all ranks; of several loaders, of each, with its name in front."""
        loaders = sorted({loader for found in ranks for loader in found})
        measured = {}
        for loader in loaders:
            there = [found[loader] for found in ranks if loader in found]
            predicted, labels = (torch.cat(parts) for parts in zip(*there, strict=True))
            part = self.parts[loader] if loader < len(self.parts) else str(loader)
            for name in self.metrics:
                full = name if len(loaders) == 1 else f"{part}_{name}"
                measured[full] = measure(name, predicted, labels, self.num_labels)
        return measured


def labels_of(data: Any, task: str, num_labels: int | None) -> Classification | None:
    """What a DataModule says of its labels; None if it has none, or says nothing, as one of the user's own may.

    Args:
        data: a DataModule, or None.
        task: of the model.
        num_labels: asked for; None follows the data.

    Raises:
        ConfigError: if the rows are not for the task, or have another number of labels.
    """
    if not hasattr(data, "classification"):
        return None
    labels: Classification | None = data.classification
    kind = type(data).__name__
    if (labels is None) != (task == "causal_lm"):
        has, wanted = ("text", "causal_lm") if labels is None else ("labels", "sequence_classification")
        raise ConfigError(f"the rows of {kind} have {has}, and the model's task is {task}: set --model.task {wanted}")
    if labels is not None and num_labels not in (None, labels.num_labels):
        raise ConfigError(
            f"num_labels is {num_labels}, and the rows of {kind} ask for {labels.num_labels}: leave --model.num_labels "
            "out, it follows the data"
        )
    return labels


def judged_by(labels: Classification | None, num_labels: int, metrics: Sequence[MetricName] | None) -> Classification:
    """The metrics that are asked for, else those of the data, else accuracy or both correlations.

    Args:
        labels: what the data say of themselves.
        num_labels: outputs of the model.
        metrics: asked for.

    Raises:
        ConfigError: if a metric is not one of so many labels.
    """
    if metrics is None:
        metrics = labels.metrics if labels else ("pearson", "spearman") if num_labels == 1 else ("accuracy",)
    return Classification(num_labels, tuple(metrics), labels.parts if labels else ())


def check_padding(pad_token_id: int | None, data: Any) -> None:
    """A decoder's classifier reads the last token that is not padding, and has to know which is.

    A DataModule of the user's own need not tell what it pads with.

    Raises:
        ConfigError: if the batches are padded with another token than the model's.
    """
    padded_with = getattr(data, "pad_token_id", pad_token_id)
    if padded_with != pad_token_id:
        raise ConfigError(
            f"batches are padded with token {padded_with} and the model takes token {pad_token_id} for padding: "
            f"set --data.pad_token {data.tokenizer.convert_ids_to_tokens(pad_token_id)!r}"
        )


class Predictions:
    """Collects what a model predicts of rows, loader by loader.

    In plain lists: a state of a torchmetrics object is cast with the module that it is part of, and summed over ranks
    on its own terms, where here a rank may have no row of a part.
    """

    def __init__(self) -> None:
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, logits: Tensor, labels: Tensor, loader: int = 0) -> None:
        """One batch.

        Args:
            logits: (B, C).
            labels: (B,) class numbers, -100 where there is none; or real targets where C is 1, NaN where there is none.
            loader: which of the loaders it comes from.
        """
        predicted = logits[:, 0].float() if logits.shape[1] == 1 else logits.argmax(dim=1)
        self._found.setdefault(loader, []).append((predicted.detach(), labels))

    def rows(self) -> Found:
        """By loader the predictions and the labels of the rows that have one: (P,) each, on the CPU."""
        found = {}
        for loader, batches in self._found.items():
            predicted, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
            found[loader] = predicted[kept := has_label(labels)], labels[kept]
        return found


def measure(name: MetricName, predicted: Tensor, labels: Tensor, num_labels: int) -> float:
    """One metric of a whole evaluation; NaN where it is not defined, as for a correlation with a constant.

    Args:
        name: of the metric.
        predicted: (P,) class numbers, or real numbers.
        labels: (P,) likewise.
        num_labels: C.
    """
    if labels.numel() == 0:
        return math.nan
    if len(predicted.unique()) == 1 or len(labels.unique()) == 1:
        # torchmetrics 1.9 gives a model that says 1 of all rows of CoLA 0.03 of Matthews; by definition it has 0. Of a
        # constant's correlations it gives 0 for Spearman's, and NaN with a warning for Pearson's.
        if name == "matthews":
            return 0.0
        if num_labels == 1:
            return math.nan
    return float(_MEASURES[name](predicted, labels, num_labels))


def _suits(name: MetricName, num_labels: int) -> bool:
    if name in ("pearson", "spearman"):
        return num_labels == 1
    return num_labels == 2 if name == "f1" else num_labels > 1


_MEASURES: dict[MetricName, Callable[[Tensor, Tensor, int], Tensor]] = {
    "accuracy": partial(multiclass_accuracy, average="micro"),
    "f1": lambda predicted, labels, _: binary_f1_score(predicted, labels),  # of class 1
    "matthews": multiclass_matthews_corrcoef,
    "pearson": lambda predicted, labels, _: pearson_corrcoef(predicted.double(), labels.double()),
    "spearman": lambda predicted, labels, _: spearman_corrcoef(predicted.double(), labels.double()),
}
