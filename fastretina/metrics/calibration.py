"""How far a model's probabilities can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.operating import referable_scores
from fastretina.metrics.table import Floats, Ints

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """The reliability of the probability that comes with each answer, by 15 bins of equal width over 0-1, each (low, high].

    Attributes:
        ece: expected calibration error, 0-1: |accuracy - confidence| of the bins, weighted by their samples (Guo et al., On
            Calibration of Modern Neural Networks, ICML 2017, equation 3, M = 15).
        samples: by bin. confidence, accuracy: means by bin; None for an empty one.
        brier: mean squared error of the probability of referable disease, 0-1, lower is better (Brier, Mon Weather Rev 78:1,
            1950); None where no class is referable.
    """

    ece: float
    samples: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]
    brier: float | None = None


def calibration(labels: Ints, probabilities: Floats, classes: Classes) -> Calibration:
    """From (N,) true classes and (N, C) probabilities, N >= 1; the confidence is the highest probability."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    samples = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, right)]
    sure, true = ([float(total / n) if n else None for total, n in zip(column, samples, strict=True)] for column in sums)
    brier = None
    if classes.referable:
        brier = float(np.square(referable_scores(probabilities, classes) - np.isin(labels, classes.referable)).mean())
    return Calibration(float(np.abs(sums[0] - sums[1]).sum() / len(labels)), samples.tolist(), sure, true, brier)
