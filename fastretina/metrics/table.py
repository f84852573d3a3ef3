"""The scalar metrics of a grader, a line each: results.csv, metrics.json, intervals, reports and commands list what stands here.

Each is a function of confusion matrices, (R, C, C) float64 counts with rows true and at least one image in each, to (R,) float64:
of one matrix for a pass over a data set, of a thousand for a bootstrap. NaN where undefined; higher is better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def accuracy(matrices: Floats) -> Floats:
    """Shares of images with the right grade."""
    return ratio(np.trace(matrices, axis1=1, axis2=2), matrices.sum(axis=(1, 2)))


def balanced_accuracy(matrices: Floats) -> Floats:
    """Means of the recalls of the grades that occur among the labels (scikit-learn's definition)."""
    recalls = ratio(np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=2))
    means: Floats = np.nanmean(recalls, axis=1)
    return means


def qwk(matrices: Floats) -> Floats:
    """Cohen's kappas with quadratic weights (Cohen, Psychol Bull 70:213, 1968); NaN where one grade is all there is."""
    grades = np.arange(matrices.shape[1])
    penalty = np.square(grades[:, None] - grades[None, :]).astype(np.float64)
    observed = (matrices * penalty).sum(axis=(1, 2))
    chance = np.einsum("ri,ij,rj->r", matrices.sum(axis=2), penalty, matrices.sum(axis=1)) / matrices.sum(axis=(1, 2))
    return 1.0 - ratio(observed, chance)


def macro_f1(matrices: Floats) -> Floats:
    """Means of the F1 of the grades that occur among labels or predictions (scikit-learn's definition)."""
    f1 = ratio(2 * np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=1) + matrices.sum(axis=2))
    means: Floats = np.nanmean(f1, axis=1)
    return means


def ratio(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where that is 0 / 0."""
    ratios: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return ratios


def defined(value: float) -> float | None:
    """A plain number for files and reports; None for NaN."""
    return None if np.isnan(value) else float(value)


class Metric(NamedTuple):
    """A scalar metric. name: in files and of --select-by. title, meaning: for people. percent: shown as per cent, else as a number
    of three decimals."""

    name: str
    title: str
    function: Callable[[Floats], Floats]
    percent: bool
    meaning: str


METRICS = (
    Metric(
        "accuracy", "accuracy", accuracy, True,
        "the share of photographs given the right grade. Most show no disease, so that “no disease” for everyone scores high.",
    ),
    Metric(
        "balanced_accuracy", "balanced accuracy", balanced_accuracy, True,
        "the share right within each grade, averaged over the grades, so that the rare ones count as much as grade 0.",
    ),
    Metric(
        "qwk", "QWK", qwk, False,
        "quadratic weighted kappa: how far the grades agree with the true ones beyond chance: 1 is complete agreement, 0 what "
        "guessing reaches. A grade that is two off counts four times as much as one that is one off.",
    ),
    Metric("macro_f1", "macro F1", macro_f1, False, "the mean F1 of the grades."),
)  # fmt: skip
# What no confusion matrix tells: these need the probabilities.
AUROC = "auroc_referable"
AUROC_MEANING = "how often the model finds an eye with the disease more suspicious than one without: 1 always, 0.5 by chance."
TITLES = {metric.name: metric.title for metric in METRICS} | {AUROC: "AUROC of referable disease", "loss": "loss"}

if TYPE_CHECKING:
    SelectionMetric = str  # a type checker cannot follow the table
else:
    SelectionMetric = Literal[(*(metric.name for metric in METRICS), "loss")]
