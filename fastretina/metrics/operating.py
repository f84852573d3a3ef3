"""Thresholds for referring a patient, fitted on validation data and frozen: what a test set is measured at is not chosen on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.table import Floats, Ints

HIGH_SENSITIVITY, HIGH_SPECIFICITY, YOUDEN = "high-sensitivity", "high-specificity", "youden"


@dataclass(frozen=True)
class Threshold:
    """A frozen decision: refer where the referable score, `referable_scores`, is at or above `value`.

    Attributes:
        name: "high-sensitivity", "high-specificity" or "youden".
        value: of the score; just above the highest, so that it may exceed 1, where nothing may be referred.
        target: what was asked for on the validation data, 0-1; None for youden, which has none.
        sensitivity, specificity: reached on the validation data, 0-1.
    """

    name: str
    value: float
    target: float | None
    sensitivity: float
    specificity: float


@dataclass(frozen=True)
class Operating:
    """The thresholds of one model, and the data that they are from.

    Attributes:
        images, referable: of the validation data: how many, and how many of them with referable disease.
        data: the digest of the validation data (`Beton.digest`); None where that is unknown, or where there are several.
        members: of an ensemble, whose thresholds these are the means of; 1 for a model's own.
    """

    thresholds: tuple[Threshold, ...]
    images: int
    referable: int
    data: str | None
    members: int = 1

    def named(self, name: str) -> Threshold:
        """The threshold of that name. KeyError."""
        return {threshold.name: threshold for threshold in self.thresholds}[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "thresholds": [asdict(threshold) for threshold in self.thresholds]}

    @classmethod
    def stored(cls, value: Any) -> Operating:
        """Out of JSON, the inverse of `as_dict`. ValueError."""
        try:
            thresholds = tuple(_stored_threshold(**entry) for entry in value["thresholds"])
            images, referable, data, members = value["images"], value["referable"], value["data"], value.get("members", 1)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"thresholds {value!r}") from error
        if any(type(count) is not int for count in (images, referable, members)) or not (data is None or isinstance(data, str)):
            raise ValueError(f"thresholds {value!r}")
        return cls(thresholds, images, referable, data, members)

    @classmethod
    def mean(cls, several: Sequence[Operating]) -> Operating:
        """Of an ensemble, of one or more members: the mean of its members' values for each threshold that all of them have, for the
        same target.

        So are sensitivity and specificity, which nobody measured for the ensemble itself: they are what its members reached. Data
        that several members share count once, and are named where all do.
        """
        asked = [{(found.name, found.target) for found in one.thresholds} for one in several]
        names = [found.name for found in several[0].thresholds if all((found.name, found.target) in each for each in asked)]
        counted = {one.data or number: one for number, one in enumerate(several)}
        return cls(
            tuple(_mean([one.named(name) for one in several]) for name in names),
            sum(one.images for one in counted.values()),
            sum(one.referable for one in counted.values()),
            several[0].data if len(counted) == 1 else None,
            len(several),
        )


def referable_scores(probabilities: Floats, classes: Classes) -> Floats:
    """(N,) probability of referable disease from (N, C) probabilities."""
    scores: Floats = probabilities[:, list(classes.referable)].sum(axis=1)
    return scores


def fit_operating(
    labels: Ints,
    probabilities: Floats,
    classes: Classes,
    sensitivity: float = 0.9,
    specificity: float = 0.98,
    data: str | None = None,
) -> Operating | None:
    """Thresholds for validation data: (N,) true classes and (N, C) float64 calibrated probabilities.

    high-sensitivity is the highest observed score that reaches that sensitivity, high-specificity the lowest that reaches that
    specificity, both 0-1. Where the first of them lies above the second they change places: both then reach both targets, and on
    data that the network finds harder the one called high-sensitivity is still the one that refers more. youden has the highest
    sensitivity + specificity - 1 (Youden, Cancer 3:32, 1950), of equals the lowest. None where no class is referable, or where
    the data hold no referable image, or nothing else.
    """
    ill = np.isin(labels, classes.referable)
    if not ill.any() or ill.all():
        return None
    scores = referable_scores(probabilities, classes)
    values = np.unique(scores)
    values = np.append(values, np.nextafter(values[-1], np.inf))  # the last refers nobody
    sick, well = np.sort(scores[ill]), np.sort(scores[~ill])
    referred, spared = len(sick) - np.searchsorted(sick, values, "left"), np.searchsorted(well, values, "left")
    # One division rounds 9 of 10 just as a target of 0.9 was rounded; whole numbers keep two equal sums equal.
    reached, cleared = referred / len(sick), spared / len(well)
    low, high = sorted((int(np.flatnonzero(reached >= sensitivity)[-1]), int(np.flatnonzero(cleared >= specificity)[0])))
    places = {
        HIGH_SENSITIVITY: (low, sensitivity),
        HIGH_SPECIFICITY: (high, specificity),
        YOUDEN: (int(np.argmax(referred * len(well) + spared * len(sick))), None),
    }
    found = [
        Threshold(name, float(values[at]), target, float(reached[at]), float(cleared[at])) for name, (at, target) in places.items()
    ]
    return Operating(tuple(found), len(labels), int(ill.sum()), data)


def _stored_threshold(name: Any, value: Any, target: Any, sensitivity: Any, specificity: Any) -> Threshold:
    numbers = [number for number in (value, target, sensitivity, specificity) if number is not None]
    if not isinstance(name, str) or not all(type(number) in (int, float) and np.isfinite(number) for number in numbers):
        raise TypeError(name)
    return Threshold(name, float(value), None if target is None else float(target), float(sensitivity), float(specificity))


def _mean(several: Sequence[Threshold]) -> Threshold:
    means = np.mean([(one.value, one.sensitivity, one.specificity) for one in several], axis=0)
    return Threshold(several[0].name, float(means[0]), several[0].target, float(means[1]), float(means[2]))
