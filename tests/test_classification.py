"""Metrics of a whole evaluation against values worked out by hand; what a DataModule says of labels is followed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lift_lightning.errors import ConfigError
from lift_lightning.evaluation.classification import (
    Classification,
    Predictions,
    check_padding,
    judged_by,
    labels_of,
    measure,
)

# Of class 1: 3 found, 1 missed, 2 wrongly so; 4 rightly not. 7 of 10 right.
LABELS = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
PREDICTED = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 7 / 10),
        ("f1", 2 * 3 / (2 * 3 + 2 + 1)),
        ("matthews", (3 * 4 - 2 * 1) / math.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))),
    ],
)
def test_metrics_of_two_classes(name, value):
    assert measure(name, PREDICTED, LABELS, 2) == pytest.approx(value)


def test_accuracy_counts_rows_and_not_classes():
    # The mean over classes, which is torchmetrics' default, would be (1 + 0 + 0) / 3.
    assert measure("accuracy", torch.zeros(10, dtype=torch.int64), torch.tensor([0] * 8 + [1, 2]), 3) == pytest.approx(
        0.8
    )


def test_correlations():
    predicted, labels = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    # Deviations -3, -2, -1, 6 and -1.5, -0.5, 0.5, 1.5: 14 / sqrt(50 * 5).
    assert measure("pearson", predicted, labels, 1) == pytest.approx(14 / math.sqrt(250))
    assert measure("spearman", predicted, labels, 1) == pytest.approx(1)
    # Of tied values each has the mean of their ranks: 1.5, 1.5, 3, 4 against 1 to 4 is 4.5 / sqrt(4.5 * 5).
    tied = torch.tensor([1.0, 1.0, 3.0, 10.0])
    assert measure("spearman", tied, labels, 1) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_a_constant_answer():
    """torchmetrics 1.9 gave 0.03 to a model that says 1 of all rows of CoLA."""
    ones = torch.ones(10, dtype=torch.int64)
    assert measure("matthews", ones, LABELS, 2) == 0
    assert measure("matthews", PREDICTED, ones, 2) == 0
    assert measure("accuracy", ones, LABELS, 2) == pytest.approx(0.4)
    assert math.isnan(measure("pearson", torch.ones(3), torch.arange(3.0), 1))
    assert math.isnan(measure("spearman", torch.ones(3), torch.arange(3.0), 1))
    assert math.isnan(measure("accuracy", ones[:0], ones[:0], 2))


def classes(*batches):
    found = Predictions()
    for loader, predicted, labels in batches:
        found.add(torch.eye(2)[predicted], torch.tensor(labels), loader)
    return found.rows()


def test_rows_without_a_label_do_not_count():
    found = classes((0, [1, 0], [1, -100]), (0, [0], [1]))
    assert [tensor.tolist() for tensor in found[0]] == [[1, 0], [1, 1]]
    regression = Predictions()
    regression.add(torch.tensor([[1.0], [2.0]]), torch.tensor([math.nan, 3.0]))
    assert [tensor.tolist() for tensor in regression.rows()[0]] == [[2.0], [3.0]]


def test_all_ranks_and_loaders():
    """The last turn may give a rank nothing but rows that do not count."""
    ranks = [
        classes((0, [1, 1], [1, 0]), (1, [1], [1])),
        classes((0, [0, 0], [0, 1]), (1, [0], [-100])),
        classes((0, [0], [0])),
    ]
    labels = Classification(2, ("accuracy",), ("matched", "mismatched"))
    assert labels.measure(ranks) == {"matched_accuracy": pytest.approx(3 / 5), "mismatched_accuracy": 1.0}
    assert Classification(2, ("accuracy",)).measure(ranks).keys() == {"0_accuracy", "1_accuracy"}
    assert Classification(2, ("accuracy", "f1")).measure(ranks[2:]) == {"accuracy": 1.0, "f1": 0.0}


def test_bfloat16_is_widened():
    """A state of torchmetrics in a module of bf16-true counted in bfloat16, which ends at 256."""
    found = Predictions()
    for _ in range(3):
        found.add(torch.tensor([[0.0, 1.0]] * 333, dtype=torch.bfloat16), torch.ones(333, dtype=torch.int64))
    assert found.rows()[0][0].shape == (999,)
    assert Classification(2, ("accuracy",)).measure([found.rows()]) == {"accuracy": 1.0}
    found = Predictions()
    found.add(torch.tensor([[1.0]], dtype=torch.bfloat16), torch.tensor([1.0]))
    assert found.rows()[0][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("num_labels", "metric", "message"),
    [
        (1, "accuracy", r"metrics of 1 labels \(regression\) must be of pearson, spearman, got 'accuracy'"),
        (3, "f1", r"metrics of 3 labels \(classes\) must be of accuracy, matthews, got 'f1'"),
        (2, "auc", "must be of accuracy, f1, matthews, got 'auc': set --model.metrics"),
    ],
)
def test_metrics_that_do_not_suit(num_labels, metric, message):
    with pytest.raises(ConfigError, match=message):
        Classification(num_labels, (metric,))


def test_metrics_are_those_asked_for_else_of_the_data_else_usual_ones():
    of_data = Classification(2, ("matthews",), ("a", "b"))
    assert judged_by(of_data, 2, None) == of_data
    assert judged_by(of_data, 2, ["f1"]) == Classification(2, ("f1",), ("a", "b"))
    assert judged_by(None, 4, None).metrics == ("accuracy",)
    assert judged_by(None, 1, None).metrics == ("pearson", "spearman")


def test_what_data_say_is_followed_or_refused():
    labels = Classification(3, ("accuracy",))
    data, text = SimpleNamespace(classification=labels), SimpleNamespace(classification=None)
    assert labels_of(data, "sequence_classification", None) is labels
    assert labels_of(data, "sequence_classification", 3) is labels
    assert labels_of(text, "causal_lm", None) is None
    assert labels_of(object(), "sequence_classification", 2) is None  # of the user's own, which says nothing
    with pytest.raises(ConfigError, match="num_labels is 2, .* ask for 3: leave --model.num_labels out"):
        labels_of(data, "sequence_classification", 2)
    with pytest.raises(ConfigError, match="have labels, .* causal_lm: set --model.task sequence_classification"):
        labels_of(data, "causal_lm", None)
    with pytest.raises(ConfigError, match="have text, .* set --model.task causal_lm"):
        labels_of(text, "sequence_classification", None)


def test_batches_and_model_have_one_padding():
    tokenizer = SimpleNamespace(convert_ids_to_tokens={7: "<unk>"}.get)
    check_padding(7, SimpleNamespace(pad_token_id=7))
    check_padding(7, object())  # of the user's own, which says nothing
    with pytest.raises(
        ConfigError, match="padded with token 2 and the model takes token 7 .* --data.pad_token '<unk>'"
    ):
        check_padding(7, SimpleNamespace(pad_token_id=2, tokenizer=tokenizer))
