"""Intervals of a grader's metrics by a cluster bootstrap by patient: a patient's two eyes are no two independent samples.

Percentile method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Resampling of clusters: Davison and
Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS, overall, questions
from fastretina.metrics.table import Floats, Ints, defined, metrics_for

LEVEL = 0.95
RESAMPLES = 1000
CHUNK = 16  # resamples at a time: 0.9 MB of weights for 7,000 images, which stay in a core's cache


@dataclass(frozen=True)
class Interval:
    """A metric of the data set, and the bounds of its interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Intervals:
    """What was found of a data set.

    Attributes:
        scalars: the metrics of `metrics_for`, and of RANKINGS, by name; where a class is referable, AUROC_REFERABLE.
        by_class: each of RANKINGS by name, for one class against the rest, class by class.
    """

    scalars: dict[str, Interval]
    by_class: dict[str, list[Interval]]


def patient_groups(patients: Sequence[str]) -> Ints:
    """(N,) int64: images of the same patient have the same number, 0, 1, ..."""
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(patient, len(numbers)) for patient in patients], dtype=np.int64)


def draws(groups: int, resamples: int, seed: int) -> Iterator[Ints]:
    """The resamples: `groups` numbers in 0..groups-1 each, drawn with replacement."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield random.integers(groups, size=groups)


def bootstrap(
    labels: Ints, probabilities: Floats, groups: Ints, classes: Classes, resamples: int = RESAMPLES, seed: int = 0
) -> Intervals:
    """All metrics with their 95 % intervals.

    Args:
        labels: (N,) true classes, N >= 1. probabilities: (N, C). groups: (N,) numbers, 0, 1, ..., of what is drawn: those of
            `patient_groups`, or where patients are unknown a number for each image.

    A resample in which a metric is undefined (no referable eye in it) has no part in that metric's interval.
    """
    number, people = len(classes), int(groups.max()) + 1
    cells = groups * number**2 + labels * number + probabilities.argmax(axis=1)
    confusion = np.bincount(cells, minlength=people * number**2).reshape(people, number**2).astype(np.float64)
    table = metrics_for(number, classes.ordinal)
    asked = [question.counts(groups) for question in questions(labels, probabilities, classes)]

    def metrics(weights: Floats) -> Floats:
        """(r, M) metrics where the groups count (r, people) times: scalars first, then those by class."""
        matrices = (weights @ confusion).reshape(-1, number, number)
        people_first = np.ascontiguousarray(weights.T)
        # By question, by ranking: (r,) each.
        ranked = [[ranking.function(*counts) for ranking in RANKINGS] for counts in (counted(people_first) for counted in asked)]
        by_class = [np.stack(column, axis=1) for column in zip(*ranked[:number], strict=True)]
        scalars = [*(metric.function(matrices) for metric in table), *map(overall, by_class)]
        scalars += [found[0] for found in ranked[number:]]  # the AUROC of referable disease
        return np.concatenate([np.stack(scalars, axis=1), *by_class], axis=1)

    resampled, found = draws(people, resamples, seed), []
    while chunk := [np.bincount(drawn, minlength=people) for drawn in islice(resampled, CHUNK)]:
        found.append(metrics(np.asarray(chunk, dtype=np.float64)))
    points = metrics(np.ones((1, people)))[0]
    intervals = [_interval(point, column) for point, column in zip(points, np.concatenate(found).T, strict=True)]
    names = [*(metric.name for metric in table), *(ranking.name for ranking in RANKINGS)]
    names += [AUROC_REFERABLE] if classes.referable else []
    rest = iter(intervals[len(names) :])
    return Intervals(dict(zip(names, intervals, strict=False)), {ranking.name: list(islice(rest, number)) for ranking in RANKINGS})


def _interval(point: float, resampled: Floats) -> Interval:
    known = resampled[~np.isnan(resampled)]
    if np.isnan(point) or not len(known):
        return Interval(defined(point), None, None)
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(point), float(low), float(high))
