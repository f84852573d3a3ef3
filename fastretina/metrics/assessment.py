"""All that is said about a model's answers besides GradeMetrics: intervals, screening for referable disease, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES, Interval, bootstrap, patient_groups
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS
from fastretina.metrics.screening import OperatingPoint, operating_points
from fastretina.metrics.table import Floats, Ints

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """The reliability of the probability that comes with each answer, by 15 bins of equal width over 0-1, each (low, high].

    Attributes:
        ece: expected calibration error, 0-1: |accuracy - confidence| of the bins, weighted by their samples (Guo et al., On
            Calibration of Modern Neural Networks, ICML 2017, equation 3, M = 15).
        samples: by bin. confidence, accuracy: means by bin; None for an empty one.
    """

    ece: float
    samples: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]


def calibration(labels: Ints, probabilities: Floats) -> Calibration:
    """From (N,) true classes and (N, C) probabilities, N >= 1; the confidence is the highest probability."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    samples = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, right)]
    means = [[float(total / n) if n else None for total, n in zip(column, samples, strict=True)] for column in sums]
    return Calibration(float(np.abs(sums[0] - sums[1]).sum() / len(labels)), samples.tolist(), *means)


@dataclass(frozen=True)
class Assessment:
    """What intervals, rankings, screening and calibration say of one data set.

    Attributes:
        classes: what is told apart. images: how many.
        patients: whose images they are, as a number of people; None where that is unknown: then single images were resampled.
        prevalence: share of images with referable disease, 0-1; None where no class is referable.
    """

    classes: Classes
    images: int
    patients: int | None
    prevalence: float | None
    intervals: dict[str, Interval]
    by_class: dict[str, list[Interval]]
    operating_points: list[OperatingPoint]
    calibration: Calibration

    @classmethod
    def of(cls, answers: Predictions, classes: Classes, patients: Sequence[str] | None) -> Self:
        """Of a model's answers; patients: whose image each is, None where that is not known of all. Some 1.7 s for 7,000
        images of five classes."""
        labels, probabilities = answers.labels.numpy(), answers.log_probabilities.double().exp().numpy()
        groups = np.arange(len(labels)) if patients is None else patient_groups(patients)
        found = bootstrap(labels, probabilities, groups, classes)
        return cls(
            classes,
            len(labels),
            None if patients is None else int(groups.max()) + 1,
            float(np.isin(labels, classes.referable).mean()) if classes.referable else None,
            found.scalars,
            found.by_class,
            operating_points(labels, probabilities, classes),
            calibration(labels, probabilities),
        )

    @property
    def one_disease(self) -> bool:
        """Whether what is referable is the second of two classes: what is said of the one is then said of the other."""
        return len(self.classes) == 2 and self.classes.referable == (1,)

    @property
    def told(self) -> dict[str, Interval]:
        """The intervals that a reader is to see, each once."""
        return {name: found for name, found in self.intervals.items() if not (self.one_disease and name == AUROC_REFERABLE)}

    @property
    def method(self) -> str:
        """How the intervals were made, and what to think of them."""
        if self.patients is None:
            return "percentile bootstrap by image: patients are unknown, so that the intervals may be too narrow"
        return "percentile cluster bootstrap by patient"

    @property
    def resampled(self) -> str:
        """How many of what were drawn: "10 patients", "20 images"."""
        return f"{self.images:,} images" if self.patients is None else f"{self.patients:,} patients"

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json; None where undefined, or where no class is referable."""
        scalars = {ranking.name: self.intervals[ranking.name].value for ranking in RANKINGS}
        referable = self.intervals.get(AUROC_REFERABLE)
        return {
            **scalars,
            AUROC_REFERABLE: referable and referable.value,
            **{f"{name}_by_class": [interval.value for interval in found] for name, found in self.by_class.items()},
            "prevalence_referable": self.prevalence,
            "intervals": {
                **{name: _bounds(interval) for name, interval in self.intervals.items()},
                **{f"{name}_by_class": [_bounds(interval) for interval in found] for name, found in self.by_class.items()},
                "level": LEVEL,
                "method": self.method,
                "resamples": RESAMPLES,
                "patients": self.patients,
            },
            "referable": [asdict(point) for point in self.operating_points],
            "calibration": asdict(self.calibration),
        }


def _bounds(interval: Interval) -> dict[str, float | None]:
    return {"low": interval.low, "high": interval.high}
