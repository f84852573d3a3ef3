"""Thresholds that cut a score into grades with the highest quadratic weighted kappa."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastretina.metrics.table import Floats, qwk

MAX_CUTS = 512  # where a threshold may lie; quantiles of the scores where there are more of them
MAX_ROUNDS = 50


def fit_thresholds(scores: Floats, labels: NDArray[np.int64], num_classes: int) -> list[float]:
    """`num_classes` - 1 ascending thresholds for (N,) scores, N >= 1, whose number below a score is its grade.

    Coordinate ascent: each threshold in turn moves to the best cut between its neighbours, until none moves. Begun from the
    half grades and from the thresholds that give each grade as often as it is; the better end counts. A threshold above all
    scores is no lower than half-way between its grades.
    """
    values = np.unique(scores)
    if len(values) > MAX_CUTS:
        values = np.unique(np.quantile(values, np.linspace(0, 1, MAX_CUTS)))
    cuts = np.concatenate([[values[0] - 0.5], (values[1:] + values[:-1]) / 2, [values[-1] + 0.5]])
    # below[c, k]: how many of true grade k have a score at or below cut c
    below = np.stack([np.searchsorted(np.sort(scores[labels == grade]), cuts, "right") for grade in range(num_classes)], axis=1)
    halves = np.arange(num_classes - 1) + 0.5
    shares = np.cumsum(np.bincount(labels, minlength=num_classes))[:-1]
    starts = (np.searchsorted(cuts, halves), np.searchsorted(below.sum(axis=1), shares))
    ends = [_climb(np.minimum(start, len(cuts) - 1), below) for start in starts]
    best, _ = max(ends, key=lambda end: end[1])
    found = np.where(cuts[best] >= cuts[-1], np.maximum(halves, cuts[-1]), cuts[best])
    return [float(value) for value in found]


def _climb(start: NDArray[np.intp], below: NDArray[np.int64]) -> tuple[NDArray[np.intp], float]:
    """Indices of the cuts after the ascent, and their kappa."""
    chosen = start.copy()
    best = float(_kappas(chosen[None], below)[0])
    for _ in range(MAX_ROUNDS):
        before = best
        for number in range(len(chosen)):
            low = chosen[number - 1] if number else 0
            high = chosen[number + 1] if number + 1 < len(chosen) else len(below) - 1
            tried = np.repeat(chosen[None], high - low + 1, axis=0)
            tried[:, number] = np.arange(low, high + 1)
            kappas = _kappas(tried, below)
            if kappas.max() > best + 1e-12:
                best, chosen = float(kappas.max()), tried[int(kappas.argmax())]
        if best <= before:
            break
    return chosen, best


def _kappas(chosen: NDArray[np.intp], below: NDArray[np.int64]) -> Floats:
    """(T,) kappas, 0 where undefined, of (T, C - 1) indices of cuts."""
    ends = np.broadcast_to(below[-1], (len(chosen), 1, below.shape[1]))
    edges = np.concatenate([np.zeros_like(ends), below[chosen], ends], axis=1)
    confusion = np.diff(edges, axis=1).astype(np.float64)  # (T, predicted, true)
    return np.nan_to_num(qwk(confusion.swapaxes(1, 2)), nan=0.0)
