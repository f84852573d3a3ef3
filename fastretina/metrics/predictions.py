"""A model's answers for a data set, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastretina.metrics.classification import GradeMetrics, grade_metrics
from fastretina.metrics.names import SelectionMetric
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
        """All figures of `fastretina.metrics`."""
        return grade_metrics(self.predicted, self.labels, self.log_probabilities.shape[1])


@dataclass(frozen=True)
class Scores:
    """Loss (nats) and figures of one pass over one data set."""

    loss: float
    metrics: GradeMetrics

    @classmethod
    def of(cls, predictions: Predictions) -> Scores:
        """The scores of a model's answers."""
        return cls(predictions.loss, predictions.metrics)

    def rank(self, metric: SelectionMetric) -> tuple[float, float]:
        """What epochs are compared by, higher is better: the figure (an undefined one below every number), then the accuracy."""
        value = -self.loss if metric == "loss" else getattr(self.metrics, metric)
        return (float("-inf") if value is None else value, self.metrics.accuracy)


def write_predictions(
    path: Path,
    ids: npt.NDArray[np.int64],
    names: Sequence[str],
    grades: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
) -> None:
    """Write predictions.csv: id, name, grade, predicted, p0, p1, ... of (N,) ids, names and true grades, (N, C) probabilities."""
    header = ["id", "name", "grade", "predicted", *(f"p{grade}" for grade in range(probabilities.shape[1]))]
    predicted = probabilities.argmax(axis=1)
    rows = zip(ids.tolist(), names, grades.tolist(), predicted.tolist(), probabilities.tolist(), strict=True)
    write_csv(path, header, ([*row[:4], *row[4]] for row in rows))
