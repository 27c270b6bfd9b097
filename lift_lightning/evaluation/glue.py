"""The tasks of GLUE: how many labels each has, and by what it is judged (Wang et al. 2018, arXiv 1804.07461)."""

from __future__ import annotations

from typing import Literal

from lift_lightning.evaluation.classification import Classification

GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]

GLUE: dict[GlueTask, Classification] = {
    "cola": Classification(2, ("matthews",)),
    "sst2": Classification(2, ("accuracy",)),
    "mrpc": Classification(2, ("accuracy", "f1")),
    "stsb": Classification(1, ("pearson", "spearman")),
    "qqp": Classification(2, ("accuracy", "f1")),
    "mnli": Classification(3, ("accuracy",), parts=("matched", "mismatched")),
    "qnli": Classification(2, ("accuracy",)),
    "rte": Classification(2, ("accuracy",)),
}
