"""A model's answers for a data set, and the metrics that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastretina.grading import Classes
from fastretina.metrics.table import METRICS, SelectionMetric, defined, metrics_for
from fastretina.system.csv_text import write_csv

_NAMES = frozenset(metric.name for metric in METRICS)


@dataclass(frozen=True)
class GradeMetrics:
    """Metrics of one pass over a data set, all of which follow from its confusion matrix. None stands where one is undefined; JSON
    then holds null, never NaN. Each of METRICS is an attribute too.

    Attributes:
        confusion: counts, rows the true class, columns the predicted one; at least one image.
        ordinal: whether the classes have an order; as all had of which older files tell.
    """

    confusion: list[list[int]]
    ordinal: bool = True

    @cached_property
    def values(self) -> dict[str, float | None]:
        """Each of METRICS that is defined for such classes, by name; `qwk` is there for all, None where they have no order."""
        matrix = np.asarray([self.confusion], dtype=np.float64)
        asked = {metric.name for metric in metrics_for(len(self.confusion), self.ordinal)}
        found = {metric.name: defined(metric.function(matrix)[0]) for metric in METRICS if metric.name in asked}
        return {metric.name: found.get(metric.name) for metric in METRICS if metric.name in asked or metric.needs == "order"}

    @property
    def per_class_recall(self) -> list[float | None]:
        """By class, 0-1; None for a class without a label."""
        return [row[number] / sum(row) if any(row) else None for number, row in enumerate(self.confusion)]

    def __getattr__(self, name: str) -> float | None:
        if name not in _NAMES:
            raise AttributeError(name)
        return self.values.get(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, fit for JSON."""
        return {**self.values, "per_class_recall": self.per_class_recall, "confusion": self.confusion}


def grade_metrics(predicted: Tensor, labels: Tensor, classes: Classes) -> GradeMetrics:
    """All metrics of predicted and true classes, both (N,) integers from 0 to one less than there are, on any device, N >= 1.

    Meant for once an epoch: it copies to the CPU, so that the training step itself never waits for a result.
    """
    if predicted.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"predicted and labels must be two equal (N,) tensors, N >= 1: {tuple(predicted.shape)}, {tuple(labels.shape)}"
        )
    number = len(classes)
    both = torch.stack((labels.cpu().long(), predicted.cpu().long()))
    if int(both.min()) < 0 or int(both.max()) >= number:
        raise ValueError(f"classes must be in 0-{number - 1}, got {int(both.min())}-{int(both.max())}")
    cells = torch.bincount(both[0] * number + both[1], minlength=number**2)
    return GradeMetrics(cells.view(number, number).tolist(), classes.ordinal)


@dataclass(frozen=True)
class Predictions:
    """A model's answers for a data set, on the CPU, in the data set's order.

    Attributes:
        log_probabilities: (N, C) float32; the answer is the most probable class, whatever the head.
        labels: (N,) int64 true classes. ids: (N,) int64 sample ids.
    """

    log_probabilities: Tensor
    labels: Tensor
    ids: Tensor

    @property
    def predicted(self) -> Tensor:
        """(N,) int64, the most probable class."""
        return self.log_probabilities.argmax(dim=1)


@dataclass(frozen=True)
class Scores:
    """Loss (nats) and metrics of one pass over one data set."""

    loss: float
    metrics: GradeMetrics

    @classmethod
    def of(cls, answers: Predictions, classes: Classes) -> Scores:
        """Mean cross-entropy, and all metrics of the most probable classes."""
        loss = torch.nn.functional.nll_loss(answers.log_probabilities.double(), answers.labels)
        return cls(float(loss), grade_metrics(answers.predicted, answers.labels, classes))

    @property
    def values(self) -> dict[str, float | None]:
        """The loss and each of METRICS, by name; None where undefined."""
        return {"loss": self.loss, **self.metrics.values}

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {"loss": self.loss, **self.metrics.as_dict()}

    def rank(self, metric: SelectionMetric) -> tuple[float, float]:
        """What epochs are compared by, higher is better: the metric (an undefined one below every number), then the accuracy."""
        value, accuracy = -self.loss if metric == "loss" else self.values[metric], self.metrics.accuracy
        return (-math.inf if value is None else value, -math.inf if accuracy is None else accuracy)


def write_predictions(
    path: Path, answers: Predictions, names: Sequence[str], uncertainty: NDArray[np.float64] | None = None
) -> None:
    """Write predictions.csv: id, name, grade (empty where the image has none), predicted, p0, p1, ... of N images so called; with
    (N,) uncertainties of an ensemble a column of that name."""
    probabilities = answers.log_probabilities.exp()
    header = ["id", "name", "grade", "predicted", *(f"p{number}" for number in range(probabilities.shape[1]))]
    columns = [column.tolist() for column in (answers.ids, answers.labels, answers.predicted, probabilities)]
    more: list[list[float]] = [[]] * len(names)
    if uncertainty is not None:
        header, more = [*header, "uncertainty"], [[float(value)] for value in uncertainty]
    rows = zip(names, *columns, more, strict=True)
    write_csv(
        path,
        header,
        ([number, name, None if grade < 0 else grade, best, *row, *extra] for name, number, grade, best, row, extra in rows),
    )
