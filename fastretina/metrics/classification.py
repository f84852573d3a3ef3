"""The metrics of one pass over a data set, from predicted and true grades."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastretina.grading import NUM_CLASSES
from fastretina.metrics.table import METRICS, defined

_NAMES = frozenset(metric.name for metric in METRICS)


@dataclass(frozen=True)
class GradeMetrics:
    """Metrics of one pass over a data set, all of which follow from its confusion matrix. None stands where one is undefined; JSON
    then holds null, never NaN. Each of METRICS is an attribute too.

    Attributes:
        confusion: counts, rows the true grade, columns the predicted one; at least one image.
    """

    confusion: list[list[int]]

    @cached_property
    def values(self) -> dict[str, float | None]:
        """Each of METRICS, by name."""
        matrix = np.asarray([self.confusion], dtype=np.float64)
        return {metric.name: defined(metric.function(matrix)[0]) for metric in METRICS}

    @property
    def per_class_recall(self) -> list[float | None]:
        """By grade, 0-1; None for a grade without a label."""
        return [row[grade] / sum(row) if any(row) else None for grade, row in enumerate(self.confusion)]

    def __getattr__(self, name: str) -> float | None:
        if name not in _NAMES:
            raise AttributeError(name)
        return self.values[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, fit for JSON."""
        return {**self.values, "per_class_recall": self.per_class_recall, "confusion": self.confusion}


def grade_metrics(predicted: Tensor, labels: Tensor, num_classes: int = NUM_CLASSES) -> GradeMetrics:
    """All metrics of predicted and true grades, both (N,) integers in 0..num_classes-1 on any device, N >= 1.

    Meant for once an epoch: it copies to the CPU, so that the training step itself never waits for a result.
    """
    if predicted.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"predicted and labels must be two equal (N,) tensors, N >= 1: {tuple(predicted.shape)}, {tuple(labels.shape)}"
        )
    both = torch.stack((labels.cpu().long(), predicted.cpu().long()))
    if int(both.min()) < 0 or int(both.max()) >= num_classes:
        raise ValueError(f"grades must be in 0-{num_classes - 1}, got {int(both.min())}-{int(both.max())}")
    cells = torch.bincount(both[0] * num_classes + both[1], minlength=num_classes**2)
    return GradeMetrics(cells.view(num_classes, num_classes).tolist())
