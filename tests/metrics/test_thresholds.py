"""Fitted thresholds reach the highest kappa that an exhaustive search finds, nearly always, and are always ascending."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from fastretina.metrics.thresholds import fit_thresholds


def kappa(scores, labels, thresholds) -> float:
    grades = np.searchsorted(thresholds, scores)
    if len({*labels, *grades}) == 1:
        return 0.0  # undefined
    return cohen_kappa_score(labels, grades, weights="quadratic", labels=range(len(thresholds) + 1))


def test_an_exhaustive_search_finds_hardly_ever_more():
    rng = np.random.default_rng(0)
    lost = []
    for _ in range(10):
        labels = rng.integers(0, 4, 8)
        scores = labels + rng.normal(0, 1.0, 8)
        ordered = np.sort(scores)
        cuts = [ordered[0] - 1, *((ordered[1:] + ordered[:-1]) / 2), ordered[-1] + 1]
        best = max(kappa(scores, labels, choice) for choice in combinations_with_replacement(cuts, 3))
        lost.append(best - kappa(scores, labels, fit_thresholds(scores, labels, 4)))
    assert min(lost) > -1e-9
    assert np.mean(np.array(lost) > 1e-9) <= 0.1
    assert max(lost) < 0.05


@pytest.mark.parametrize("n", [1, 2, 50, 7000])
def test_thresholds_are_ascending_and_no_worse_than_the_half_grades(n):
    rng = np.random.default_rng(n)
    for _ in range(5):
        labels = rng.choice(5, n, p=[0.735, 0.07, 0.15, 0.025, 0.02])
        scores = 0.5 * labels + rng.normal(0, 0.4, n)
        found = fit_thresholds(scores, labels, 5)
        assert len(found) == 4
        assert found == sorted(found)
        assert np.isfinite(found).all()
        assert kappa(scores, labels, found) >= kappa(scores, labels, [0.5, 1.5, 2.5, 3.5]) - 0.002


def test_grades_that_no_score_reaches_keep_thresholds_out_of_reach():
    scores, labels = np.array([0.1, 0.2, 0.9, 1.1]), np.array([0, 0, 1, 1])
    found = fit_thresholds(scores, labels, 5)
    assert 0.2 < found[0] < 0.9
    assert found[1:] == [1.6, 2.5, 3.5]


def test_one_score_for_all_is_no_error():
    assert len(fit_thresholds(np.full(9, 0.73), np.arange(9) % 5, 5)) == 4
