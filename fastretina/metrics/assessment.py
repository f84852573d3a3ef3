"""All that is said about a model's answers besides GradeMetrics: intervals, screening for referable disease, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from fastretina.grading import REFERABLE_FROM
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES, Interval, bootstrap, patient_groups
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.screening import OperatingPoint, operating_points
from fastretina.metrics.table import AUROC, Floats, Ints

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
    """From (N,) true grades and (N, C) probabilities, N >= 1; the confidence is the highest probability."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    samples = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, right)]
    means = [[float(total / n) if n else None for total, n in zip(column, samples, strict=True)] for column in sums]
    return Calibration(float(np.abs(sums[0] - sums[1]).sum() / len(labels)), samples.tolist(), *means)


@dataclass(frozen=True)
class Assessment:
    """What intervals, screening and calibration say of one data set.

    Attributes:
        groups: the patients (or single images, where names tell of no patient) that are resampled.
        prevalence: share of images with referable disease, 0-1.
    """

    groups: int
    prevalence: float
    intervals: dict[str, Interval]
    operating_points: list[OperatingPoint]
    calibration: Calibration

    @classmethod
    def of(cls, answers: Predictions, names: Sequence[str]) -> Self:
        """Of a model's answers, with the image's name for each. Some 0.2 s for 7,000 images."""
        labels, probabilities = answers.labels.numpy(), answers.log_probabilities.double().exp().numpy()
        groups = patient_groups(names)
        return cls(
            int(groups.max()) + 1,
            float((labels >= REFERABLE_FROM).mean()),
            bootstrap(labels, probabilities, groups),
            operating_points(labels, probabilities),
            calibration(labels, probabilities),
        )

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json; None where undefined."""
        return {
            AUROC: self.intervals[AUROC].value,
            "prevalence_referable": self.prevalence,
            "intervals": {
                **{name: {"low": found.low, "high": found.high} for name, found in self.intervals.items()},
                "level": LEVEL,
                "method": "percentile cluster bootstrap by patient",
                "resamples": RESAMPLES,
                "patients": self.groups,
            },
            "referable": [asdict(point) for point in self.operating_points],
            "calibration": asdict(self.calibration),
        }
