"""Intervals of a grader's metrics by a cluster bootstrap by patient: a patient's two eyes are no two independent samples.

Percentile method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Resampling of clusters: Davison and
Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS, overall, questions
from fastretina.metrics.table import Floats, Ints, defined, metrics_for

LEVEL = 0.95
RESAMPLES = 1000
CHUNK = 16  # resamples at a time: 0.9 MB of weights for 7,000 images, which stay in a core's cache

# Of (people, R) float64 numbers of how often each person counts: each of some metrics by name, (R,), NaN where undefined.
Statistic = Callable[[Floats], dict[str, Floats]]


@dataclass(frozen=True)
class Interval:
    """A metric of the data set, and the bounds of its interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def bounds(self) -> dict[str, float | None]:
        """For JSON."""
        return {"low": self.low, "high": self.high}


@dataclass(frozen=True)
class Intervals:
    """What was found of a data set.

    Attributes:
        scalars: the metrics of `metrics_for`, and of RANKINGS, by name; where a class is referable, AUROC_REFERABLE.
        by_class: each of RANKINGS by name, for one class against the rest, class by class.
    """

    scalars: dict[str, Interval]
    by_class: dict[str, list[Interval]]

    @classmethod
    def of(cls, found: dict[str, Interval], classes: Classes) -> Intervals:
        """Of what `grading` names."""
        by_class = {each.name: [found.pop(f"{each.name} {number}") for number in range(len(classes))] for each in RANKINGS}
        return cls(found, by_class)


def patient_groups(patients: Sequence[str]) -> Ints:
    """(N,) int64: images of the same patient have the same number, 0, 1, ..."""
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(patient, len(numbers)) for patient in patients], dtype=np.int64)


def draws(groups: int, resamples: int, seed: int) -> Iterator[Ints]:
    """The resamples: `groups` numbers in 0..groups-1 each, drawn with replacement."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield random.integers(groups, size=groups)


def resample(
    people: int, statistics: Mapping[str, Sequence[Statistic]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[dict[str, Interval]]]:
    """All metrics of each of the statistics with their 95 % intervals, from the same resamples of so many people.

    A resample in which a metric is undefined (no referable eye in it) has no part in that metric's interval.
    """
    resampled, every = draws(people, resamples, seed), [one for several in statistics.values() for one in several]
    chunks: list[list[dict[str, Floats]]] = []
    while chunk := [np.bincount(drawn, minlength=people) for drawn in islice(resampled, CHUNK)]:
        weights = np.ascontiguousarray(np.asarray(chunk, dtype=np.float64).T)
        chunks.append([statistic(weights) for statistic in every])
    points = [statistic(np.ones((people, 1))) for statistic in every]
    found = iter(
        {name: _interval(value[0], np.concatenate([each[name] for each in several])) for name, value in point.items()}
        for point, several in zip(points, zip(*chunks, strict=True), strict=True)
    )
    return {name: list(islice(found, len(several))) for name, several in statistics.items()}


def at_the_end(found: Interval, people: int) -> Interval:
    """A share of so many independent people with its interval. Of one that is 0 or 1 every resample says the same, as if no other
    people could be otherwise: its interval is Clopper and Pearson's (Biometrika 26:404, 1934), which ends (alpha / 2)^(1 / people)
    from the other end."""
    if found.value not in (0.0, 1.0) or people < 1:
        return found
    bound = float(((1 - LEVEL) / 2) ** (1 / people))
    return Interval(found.value, bound, 1.0) if found.value else Interval(found.value, 0.0, 1 - bound)


def tallies(true: Ints, called: Ints, owner: Ints, number: int) -> Callable[[Floats], Floats]:
    """What makes (R, number, number) confusion matrices, rows true, of weights as a Statistic has them. true, called: (N,) integers
    from 0. owner: (N,) the person of each."""
    people, place = np.unique(owner, return_inverse=True)
    cells = place * number**2 + true * number + called
    confusion = np.bincount(cells, minlength=len(people) * number**2).reshape(len(people), number**2).astype(np.float64)
    return lambda weights: (weights[people].T @ confusion).reshape(-1, number, number)


def measured(function: Callable[[Floats], Floats], matrices: Floats) -> Floats:
    """(R,) of a metric of METRICS, NaN where a matrix (R, C, C) has no image: a resample may have none of a subgroup."""
    some = matrices.any(axis=(1, 2))
    found = np.full(len(matrices), np.nan)
    found[some] = function(matrices[some])
    return found


def grading(labels: Ints, probabilities: Floats, owner: Ints, classes: Classes) -> Statistic:
    """The metrics of `metrics_for` and of RANKINGS by name, where a class is referable AUROC_REFERABLE, and those of each class
    against the rest (`auroc 0`). labels, owner: (N,). probabilities: (N, C)."""
    number = len(classes)
    tallied = tallies(labels, probabilities.argmax(axis=1), owner, number)
    asked = [question.counts(owner) for question in questions(labels, probabilities, classes)]

    def statistic(weights: Floats) -> dict[str, Floats]:
        matrices = tallied(weights)
        found = {metric.name: metric.function(matrices) for metric in metrics_for(number, classes.ordinal)}
        # By question, by ranking: (R,) each.
        ranked = [[ranking.function(*counts) for ranking in RANKINGS] for counts in (counted(weights) for counted in asked)]
        by_class = {ranking.name: column for ranking, column in zip(RANKINGS, zip(*ranked[:number], strict=True), strict=True)}
        found |= {name: overall(np.stack(column, axis=1)) for name, column in by_class.items()}
        if len(ranked) > number:
            found[AUROC_REFERABLE] = ranked[number][0]
        return found | {f"{name} {at}": area for name, column in by_class.items() for at, area in enumerate(column)}

    return statistic


def bootstrap(
    labels: Ints, probabilities: Floats, groups: Ints, classes: Classes, resamples: int = RESAMPLES, seed: int = 0
) -> Intervals:
    """The metrics of `grading` alone.

    Args:
        labels: (N,) true classes, N >= 1. probabilities: (N, C). groups: (N,) numbers, 0, 1, ..., of what is drawn: those of
            `patient_groups`, or where patients are unknown a number for each image.
    """
    found = resample(int(groups.max()) + 1, {"images": [grading(labels, probabilities, groups, classes)]}, resamples, seed)
    return Intervals.of(found["images"][0], classes)


def _interval(point: float, resampled: Floats) -> Interval:
    known = resampled[~np.isnan(resampled)]
    if np.isnan(point) or not len(known):
        return Interval(defined(point), None, None)
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(point), float(low), float(high))
