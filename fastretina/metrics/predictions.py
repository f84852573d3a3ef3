"""A model's answers for a data set, and their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastretina.metrics.classification import GradeMetrics, grade_metrics
from fastretina.metrics.table import SelectionMetric
from fastretina.system.files import write_csv


@dataclass(frozen=True)
class Predictions:
    """A model's answers for a data set, on the CPU, in the data set's order.

    Attributes:
        log_probabilities: (N, C) float32; the answer is the most probable grade, whatever the head.
        labels: (N,) int64 true grades. ids: (N,) int64 sample ids.
    """

    log_probabilities: Tensor
    labels: Tensor
    ids: Tensor

    @property
    def predicted(self) -> Tensor:
        """(N,) int64, the most probable grade."""
        return self.log_probabilities.argmax(dim=1)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(torch.nn.functional.nll_loss(self.log_probabilities.double(), self.labels))

    @property
    def metrics(self) -> GradeMetrics:
        """All metrics of the most probable grades."""
        return grade_metrics(self.predicted, self.labels, self.log_probabilities.shape[1])


@dataclass(frozen=True)
class Scores:
    """Loss (nats) and metrics of one pass over one data set."""

    loss: float
    metrics: GradeMetrics

    @classmethod
    def of(cls, predictions: Predictions) -> Scores:
        """The scores of a model's answers."""
        return cls(predictions.loss, predictions.metrics)

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


def write_predictions(path: Path, answers: Predictions, names: Sequence[str]) -> None:
    """Write predictions.csv: id, name, grade, predicted, p0, p1, ... of answers for N images with these names."""
    probabilities = answers.log_probabilities.exp()
    header = ["id", "name", "grade", "predicted", *(f"p{grade}" for grade in range(probabilities.shape[1]))]
    columns = (answers.ids, answers.labels, answers.predicted, probabilities)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    write_csv(path, header, ([number, name, grade, best, *row] for name, number, grade, best, row in rows))
