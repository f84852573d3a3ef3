"""The figures by which a grader is judged, from predicted and true grades, by torchmetrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_cohen_kappa,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_recall,
)


@dataclass(frozen=True)
class GradeMetrics:
    """Figures of one pass over a data set. None stands where a figure is undefined; JSON then holds null, never NaN.

    Attributes:
        accuracy: share of samples with the right grade, 0-1.
        balanced_accuracy: mean of the recalls of the grades that occur among the labels, 0-1 (scikit-learn's definition).
        qwk: Cohen's kappa with quadratic weights (Cohen, Psychol Bull 70:213, 1968), at most 1, 0 for chance;
            None where one grade is all that occurs in labels and predictions together.
        macro_f1: mean F1 over the grades that occur among labels or predictions, 0-1.
        per_class_recall: by grade, 0-1; None for a grade without a label.
        confusion: counts, rows the true grade, columns the predicted one.
    """

    accuracy: float
    balanced_accuracy: float
    qwk: float | None
    macro_f1: float
    per_class_recall: list[float | None]
    confusion: list[list[int]]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, fit for JSON."""
        return asdict(self)


def grade_metrics(predicted: Tensor, labels: Tensor, num_classes: int = 5) -> GradeMetrics:
    """All figures from predicted and true grades, both (N,) integers in 0..num_classes-1 on any device, N >= 1.

    Meant for once an epoch: it copies to the CPU, so that the training step itself never waits for a result.
    """
    if predicted.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"predicted and labels must be two equal (N,) tensors, N >= 1: {tuple(predicted.shape)}, {tuple(labels.shape)}"
        )
    predicted, labels = predicted.cpu().long(), labels.cpu().long()
    both = torch.stack((predicted, labels))
    if int(both.min()) < 0 or int(both.max()) >= num_classes:
        raise ValueError(f"grades must be in 0-{num_classes - 1}, got {int(both.min())}-{int(both.max())}")
    confusion = multiclass_confusion_matrix(predicted, labels, num_classes)
    recall = multiclass_recall(predicted, labels, num_classes, average=None)
    present = confusion.sum(dim=1) > 0
    # One grade everywhere makes kappa 0/0; torchmetrics gives NaN there.
    qwk = _plain(multiclass_cohen_kappa(predicted, labels, num_classes, weights="quadratic"))
    return GradeMetrics(
        accuracy=_plain(multiclass_accuracy(predicted, labels, num_classes, average="micro")),
        # torchmetrics' macro accuracy counts a grade that is predicted but never occurs as recall 0; scikit-learn leaves it out.
        balanced_accuracy=_plain(recall[present].mean()),
        qwk=None if qwk != qwk else qwk,
        macro_f1=_plain(multiclass_f1_score(predicted, labels, num_classes, average="macro")),
        per_class_recall=[_plain(value) if there else None for value, there in zip(recall, present, strict=True)],
        confusion=confusion.tolist(),
    )


def _plain(value: Tensor) -> float:
    """torchmetrics computes in float32, whose digits past the seventh are noise."""
    return round(float(value), 7)
