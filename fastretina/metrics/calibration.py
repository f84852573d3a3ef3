"""How far a grader's probabilities can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastretina.metrics.table import Ints

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


def calibration(labels: Ints, probabilities: npt.NDArray[np.floating]) -> Calibration:
    """From (N,) true grades and (N, C) probabilities, N >= 1; the confidence is the highest probability."""
    confidence = probabilities.astype(np.float64).max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    samples = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, right.astype(np.float64))]
    means = [[float(total / n) if n else None for total, n in zip(column, samples, strict=True)] for column in sums]
    ece = float(np.abs(sums[0] - sums[1]).sum() / len(labels))
    return Calibration(ece, samples.tolist(), means[0], means[1])
