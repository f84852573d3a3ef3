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
    """Shares of images given the right class."""
    return ratio(np.trace(matrices, axis1=1, axis2=2), matrices.sum(axis=(1, 2)))


def balanced_accuracy(matrices: Floats) -> Floats:
    """Means of the recalls of the classes that occur among the labels (scikit-learn's definition)."""
    recalls = ratio(np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=2))
    means: Floats = np.nanmean(recalls, axis=1)
    return means


def qwk(matrices: Floats) -> Floats:
    """Cohen's kappas with quadratic weights (Cohen, Psychol Bull 70:213, 1968); NaN where one grade is all there is.

    Only where a distance between two classes means something."""
    grades = np.arange(matrices.shape[1])
    penalty = np.square(grades[:, None] - grades[None, :]).astype(np.float64)
    observed = (matrices * penalty).sum(axis=(1, 2))
    chance = np.einsum("ri,ij,rj->r", matrices.sum(axis=2), penalty, matrices.sum(axis=1)) / matrices.sum(axis=(1, 2))
    return 1.0 - ratio(observed, chance)


def macro_f1(matrices: Floats) -> Floats:
    """Means of the F1 of the classes that occur among labels or predictions (scikit-learn's definition)."""
    f1 = ratio(2 * np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(axis=1) + matrices.sum(axis=2))
    means: Floats = np.nanmean(f1, axis=1)
    return means


def sensitivity(matrices: Floats) -> Floats:
    """Of two classes: shares of the images of the second that are called so."""
    return ratio(matrices[:, 1, 1], matrices[:, 1].sum(axis=1))


def specificity(matrices: Floats) -> Floats:
    """Of two classes: shares of the images of the first that are called so."""
    return ratio(matrices[:, 0, 0], matrices[:, 0].sum(axis=1))


def ppv(matrices: Floats) -> Floats:
    """Of two classes: shares right among the images called the second."""
    return ratio(matrices[:, 1, 1], matrices[:, :, 1].sum(axis=1))


def npv(matrices: Floats) -> Floats:
    """Of two classes: shares right among the images called the first."""
    return ratio(matrices[:, 0, 0], matrices[:, :, 0].sum(axis=1))


def ratio(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where that is 0 / 0."""
    ratios: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return ratios


def defined(value: float) -> float | None:
    """A plain number for files and reports; None for NaN."""
    return None if np.isnan(value) else float(value)


class Metric(NamedTuple):
    """A scalar metric.

    Attributes:
        name: in files and of --select-by. title, meaning: for people; {one} and {many} stand for what a class is called,
            {first} and {second} for the names of two.
        percent: shown as per cent, else as a number of three decimals. needs: what the classes must be for it to be defined.
    """

    name: str
    title: str
    function: Callable[[Floats], Floats]
    percent: bool
    meaning: str
    needs: Literal["", "order", "two classes"] = ""


METRICS = (
    Metric(
        "accuracy", "accuracy", accuracy, True,
        "the share of photographs given the right {one}. Where most of them are of one {one}, to say so of everyone scores high.",
    ),
    Metric(
        "balanced_accuracy", "balanced accuracy", balanced_accuracy, True,
        "the share right within each {one}, averaged over the {many}, so that the rare ones count as much as the most frequent.",
    ),
    Metric(
        "qwk", "QWK", qwk, False,
        "quadratic weighted kappa: how far the grades agree with the true ones beyond chance: 1 is complete agreement, 0 what "
        "guessing reaches. A grade that is two off counts four times as much as one that is one off.",
        needs="order",
    ),
    Metric("macro_f1", "macro F1", macro_f1, False, "the mean F1 of the {many}."),
    Metric(
        "sensitivity", "sensitivity", sensitivity, True,
        "of the photographs that are “{second}”, the share that the model calls so: where its probability is above a half.",
        needs="two classes",
    ),
    Metric(
        "specificity", "specificity", specificity, True,
        "of the photographs that are “{first}”, the share that the model calls so.",
        needs="two classes",
    ),
    Metric(
        "ppv", "PPV", ppv, True,
        "positive predictive value: of the photographs that the model calls “{second}”, the share that are. Like the next, it is "
        "another where these are rarer or more frequent than here.",
        needs="two classes",
    ),
    Metric(
        "npv", "NPV", npv, True,
        "negative predictive value: of the photographs that the model calls “{first}”, the share that are.",
        needs="two classes",
    ),
)  # fmt: skip
TITLES = {metric.name: metric.title for metric in METRICS} | {"loss": "loss"}


def metrics_for(number: int, ordinal: bool) -> tuple[Metric, ...]:
    """Those of METRICS that are defined for so many classes, with an order or without."""
    held = {"": True, "order": ordinal, "two classes": number == 2}
    return tuple(metric for metric in METRICS if held[metric.needs])


def headline(ordinal: bool) -> str:
    """The metric that says most in one number, and that an epoch is chosen by where nothing else is asked for."""
    return "qwk" if ordinal else "balanced_accuracy"


if TYPE_CHECKING:
    SelectionMetric = str  # a type checker cannot follow the table
else:
    SelectionMetric = Literal[("auto", *(metric.name for metric in METRICS), "loss")]
