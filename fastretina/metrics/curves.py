"""Curves of a referable score over all thresholds, as numbers for files and plots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastretina.metrics.table import Floats

POINTS = 200  # of a curve, where it has more: some 8 KB of JSON
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Curve:
    """Points from the highest threshold to the lowest.

    Attributes:
        x, y: of a ROC curve 1 - specificity and sensitivity; of a precision-recall curve recall and precision. 0-1.
        thresholds: refer where the score is at or above; None at the first point of a ROC curve, which refers nobody.
    """

    x: list[float]
    y: list[float]
    thresholds: list[float | None]


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit, TP/n - FP/n * t / (1 - t): true positives, less the false ones at the rate t that says how many of them one
    found is worth (Vickers and Elkin, Med Decis Making 26:565, 2006). To refer nobody has net benefit 0.

    Attributes:
        thresholds: t, 0.01 to 0.99. model: where the score is at or above t. everyone: to refer all.
    """

    thresholds: list[float]
    model: list[float]
    everyone: list[float]


def roc(ill: Booleans, scores: Floats) -> Curve | None:
    """Of (N,) images or persons, ill or not, and their scores. None without some of each. At most `POINTS` points: evenly along
    the curve, the first and the last among them."""
    if not ill.any() or ill.all():
        return None
    sick, every, thresholds = _above(ill, scores)
    x, y = (every - sick) / (~ill).sum(), sick / ill.sum()
    return _thinned(np.append(0.0, x), np.append(0.0, y), [None, *thresholds.tolist()])


def precision_recall(ill: Booleans, scores: Floats) -> Curve | None:
    """As `roc`; None without anyone ill. Begins at the highest score: no point is made up at recall 0."""
    if not ill.any():
        return None
    sick, every, thresholds = _above(ill, scores)
    return _thinned(sick / ill.sum(), sick / every, thresholds.tolist())


def decision_curve(ill: Booleans, scores: Floats) -> DecisionCurve:
    """Of (N,) images, N >= 1, ill or not, and the calibrated probabilities that they are."""
    thresholds = np.arange(1, 100) / 100
    odds = thresholds / (1 - thresholds)
    # Those not yet below a threshold, counted from the sorted scores.
    true, false = (len(some) - np.searchsorted(np.sort(some), thresholds, "left") for some in (scores[ill], scores[~ill]))
    model = (true - false * odds) / len(ill)
    everyone = ill.mean() - (~ill).mean() * odds
    return DecisionCurve(thresholds.tolist(), model.tolist(), everyone.tolist())


def _above(ill: Booleans, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """How many ill, and how many in all, have at least each of the different scores, which come last, from the highest down."""
    thresholds, place = np.unique(-scores, return_inverse=True)
    sick, every = (np.cumsum(np.bincount(place[some], minlength=len(thresholds))) for some in (ill, np.full(len(ill), True)))
    return sick.astype(np.float64), every.astype(np.float64), -thresholds


def _thinned(x: Floats, y: Floats, thresholds: list[float | None]) -> Curve:
    if len(x) > POINTS:
        along = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
        kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], POINTS))).tolist()
        x, y, thresholds = x[kept], y[kept], [thresholds[at] for at in kept]
    return Curve(x.tolist(), y.tolist(), thresholds)
