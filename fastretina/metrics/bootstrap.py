"""Intervals of a grader's metrics by a cluster bootstrap by patient: a patient's two eyes are no two independent samples.

Percentile method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Resampling of clusters: Davison and
Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastretina.grading import REFERABLE_FROM, patient_of
from fastretina.metrics.screening import referable_scores
from fastretina.metrics.table import AUROC, METRICS, Floats, Ints, defined, ratio

LEVEL = 0.95
RESAMPLES = 1000
CHUNK = 32  # resamples at a time: 1.8 MB of weights for 7,000 images, which stay in a core's cache


@dataclass(frozen=True)
class Interval:
    """A metric of the data set, and the bounds of its interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


def patient_groups(names: Iterable[str]) -> Ints:
    """(N,) int64: images of the same patient (`<patient>_<left|right>`) have the same number, 0, 1, ...; all others one each."""
    numbers: dict[str | int, int] = {}
    owners = [patient_of(name) or index for index, name in enumerate(names)]
    return np.asarray([numbers.setdefault(owner, len(numbers)) for owner in owners], dtype=np.int64)


def draws(groups: int, resamples: int, seed: int) -> Iterator[Ints]:
    """The resamples: `groups` numbers in 0..groups-1 each, drawn with replacement."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield random.integers(groups, size=groups)


def bootstrap(labels: Ints, probabilities: Floats, groups: Ints, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Each of METRICS and the AUROC of referable disease, by name, with their 95 % intervals.

    Args:
        labels: (N,) true grades, N >= 1. probabilities: (N, C). groups: (N,) from `patient_groups`.

    A resample in which a metric is undefined (no referable eye in it) has no part in that metric's interval.
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

    def metrics(weights: Floats) -> Floats:
        """(r, M) metrics where the patients count (r, people) times."""
        images = weights[:, owner]
        sick = np.add.reduceat(images * referable, starts, axis=1)
        every = np.add.reduceat(images, starts, axis=1)
        matrices = (weights @ confusion).reshape(-1, classes, classes)
        return np.stack([*(metric.function(matrices) for metric in METRICS), auroc(sick, every - sick)], axis=1)

    resampled, found = draws(people, resamples, seed), []
    while chunk := [np.bincount(drawn, minlength=people) for drawn in islice(resampled, CHUNK)]:
        found.append(metrics(np.asarray(chunk, dtype=np.float64)))
    points = metrics(np.ones((1, people)))[0]
    names = (*(metric.name for metric in METRICS), AUROC)
    return {name: _interval(point, column) for name, point, column in zip(names, points, np.concatenate(found).T, strict=True)}


def _interval(point: float, resampled: Floats) -> Interval:
    known = resampled[~np.isnan(resampled)]
    if np.isnan(point) or not len(known):
        return Interval(defined(point), None, None)
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(point), float(low), float(high))


def auroc(sick: Floats, well: Floats) -> Floats:
    """(R,) areas under the ROC curve from (R, U) numbers of sick and well images at each of U ascending scores; NaN without both.

    The share of (sick, well) pairs in which the sick one has the higher score, ties half (Hanley and McNeil, Radiology 143:29,
    1982).
    """
    below = np.cumsum(well, axis=1) - well / 2
    return ratio((sick * below).sum(axis=1), sick.sum(axis=1) * well.sum(axis=1))
