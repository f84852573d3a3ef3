"""Bootstrap intervals of a grader's figures. Patients are drawn whole: a patient's two eyes are no two independent samples.

Percentile method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Drawing whole clusters: Davison and
Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastretina.grading import REFERABLE_FROM, patient_of

LEVEL = 0.95
RESAMPLES = 1000
CHUNK = 32  # resamples at a time: 1.8 MB of weights for 7,000 images, which stay in a core's cache

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A figure of the data set, and the bounds of its interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


def patient_groups(names: Iterable[str]) -> Ints:
    """(N,) int64: images of the same patient (`<patient>_<left|right>`) have the same number, 0, 1, ...; all others one each."""
    numbers: dict[tuple[str, object], int] = {}
    found = []
    for place, name in enumerate(names):
        patient = patient_of(name)
        key = ("image", place) if patient is None else ("patient", patient)
        found.append(numbers.setdefault(key, len(numbers)))
    return np.asarray(found, dtype=np.int64)


def draws(groups: int, resamples: int, seed: int) -> Iterator[Ints]:
    """The resamples: `groups` numbers in 0..groups-1 each, drawn with replacement."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield random.integers(groups, size=groups)


def bootstrap(
    labels: Ints, probabilities: npt.NDArray[np.floating], groups: Ints, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Accuracy, balanced accuracy, QWK and AUROC of referable disease with their 95 % intervals.

    Args:
        labels: (N,) true grades, N >= 1. probabilities: (N, C). groups: (N,) from `patient_groups`.

    A resample in which a figure is undefined (no referable eye in it) has no part in that figure's interval.
    """
    classes = probabilities.shape[1]
    people = int(groups.max()) + 1
    cells = groups * classes**2 + labels * classes + probabilities.argmax(axis=1)
    confusion = np.bincount(cells, minlength=people * classes**2).reshape(people, classes**2).astype(np.float64)
    scores = referable_scores(probabilities)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where a new score begins: ties count half
    referable = (labels[order] >= REFERABLE_FROM).astype(np.float64)
    owner = groups[order]

    def figures(weights: Floats) -> Floats:
        """(r, 4) figures where the patients count (r, people) times."""
        images = weights[:, owner]
        sick = np.add.reduceat(images * referable, starts, axis=1)
        every = np.add.reduceat(images, starts, axis=1)
        matrices = (weights @ confusion).reshape(-1, classes, classes)
        return np.stack([accuracy(matrices), balanced_accuracy(matrices), qwk(matrices), auroc(sick, every - sick)], axis=1)

    found, chunk = [], []
    for number, drawn in enumerate(draws(people, resamples, seed), start=1):
        chunk.append(np.bincount(drawn, minlength=people))
        if len(chunk) == CHUNK or number == resamples:
            found.append(figures(np.asarray(chunk, dtype=np.float64)))
            chunk = []
    points = figures(np.ones((1, people)))[0]
    names = ("accuracy", "balanced_accuracy", "qwk", "auroc_referable")
    return {name: _interval(point, column) for name, point, column in zip(names, points, np.concatenate(found).T, strict=True)}


def _interval(point: float, resampled: Floats) -> Interval:
    defined = resampled[~np.isnan(resampled)]
    value = None if np.isnan(point) else float(point)
    if value is None or not len(defined):
        return Interval(value, None, None)
    low, high = np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(low), float(high))


def referable_scores(probabilities: npt.NDArray[np.floating]) -> Floats:
    """(N,) probability of referable disease, grade 2 or more, from (N, C) probabilities."""
    scores: Floats = probabilities[:, REFERABLE_FROM:].astype(np.float64).sum(axis=1)
    return scores


def accuracy(matrices: Floats) -> Floats:
    """(R,) shares of right answers of (R, C, C) confusion matrices, rows true."""
    shares: Floats = np.trace(matrices, axis1=1, axis2=2) / matrices.sum(axis=(1, 2))
    return shares


def balanced_accuracy(matrices: Floats) -> Floats:
    """(R,) mean recalls, over the grades that occur, of (R, C, C) confusion matrices."""
    totals = matrices.sum(axis=2)
    recalls = np.diagonal(matrices, axis1=1, axis2=2) / np.maximum(totals, 1)
    means: Floats = recalls.sum(axis=1) / (totals > 0).sum(axis=1)
    return means


def qwk(matrices: Floats) -> Floats:
    """(R,) Cohen's kappas with quadratic weights (Cohen, Psychol Bull 70:213, 1968); NaN where one grade is all there is."""
    grades = np.arange(matrices.shape[1])
    penalty = np.square(grades[:, None] - grades[None, :]).astype(np.float64)
    observed = (matrices * penalty).sum(axis=(1, 2))
    chance = np.einsum("ri,ij,rj->r", matrices.sum(axis=2), penalty, matrices.sum(axis=1)) / matrices.sum(axis=(1, 2))
    return 1.0 - _ratio(observed, chance)


def auroc(sick: Floats, well: Floats) -> Floats:
    """(R,) areas under the ROC curve from (R, U) numbers of sick and well images at each of U ascending scores; NaN without both.

    The share of (sick, well) pairs in which the sick one has the higher score, ties half (Hanley and McNeil, Radiology 143:29,
    1982).
    """
    below = np.cumsum(well, axis=1) - well / 2
    return _ratio((sick * below).sum(axis=1), sick.sum(axis=1) * well.sum(axis=1))


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
