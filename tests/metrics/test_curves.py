"""ROC, precision-recall and decision curves, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as oracle
from answer_cases import answers

from fastretina.metrics.curves import POINTS, decision_curve, precision_recall, roc


def case(seed: int, count: int, digits: int | None) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = answers(seed, count, digits)
    labels[:2] = (0, 4)
    return labels >= 2, probabilities[:, 2:].sum(axis=1)


@pytest.mark.parametrize("seed", range(25))
def test_curves_are_those_of_scikit_learn(seed):
    ill, scores = case(seed, 4 + 5 * seed, digits=seed % 3 or None)
    false, true, thresholds = oracle.roc_curve(ill, scores, drop_intermediate=False)
    found = roc(ill, scores)
    np.testing.assert_allclose(found.x, false)
    np.testing.assert_allclose(found.y, true)
    assert found.thresholds[0] is None
    np.testing.assert_array_equal(found.thresholds[1:], thresholds[1:])
    precision, recall, thresholds = oracle.precision_recall_curve(ill, scores)
    found = precision_recall(ill, scores)
    np.testing.assert_allclose(found.x, recall[-2::-1])  # but for the point that it makes up at recall 0
    np.testing.assert_allclose(found.y, precision[-2::-1])
    np.testing.assert_array_equal(found.thresholds, thresholds[::-1])


def test_long_curves_are_thinned_to_points_of_the_whole_that_leave_no_gap():
    ill, scores = case(1, 3000, None)
    for curve in (roc, precision_recall):
        found = curve(ill, scores)
        assert POINTS / 2 < len(found.x) <= POINTS
        assert found.thresholds == sorted((cut for cut in found.thresholds if cut is not None), reverse=True) or curve is roc
    found = roc(ill, scores)
    false, true, thresholds = oracle.roc_curve(ill, scores, drop_intermediate=False)
    place = np.searchsorted(-thresholds, [-np.inf, *(-cut for cut in found.thresholds[1:])])
    np.testing.assert_allclose(found.x, false[place])
    np.testing.assert_allclose(found.y, true[place])
    assert (found.x[-1], found.y[-1]) == (1, 1)
    assert np.max(np.abs(np.diff(found.x)) + np.abs(np.diff(found.y))) < 3 / POINTS
    assert oracle.auc(found.x, found.y) == pytest.approx(oracle.roc_auc_score(ill, scores), abs=0.002)


def test_curves_of_one_kind_alone_do_not_exist():
    scores = np.array([0.1, 0.7])
    assert roc(np.array([True, True]), scores) is None
    assert roc(np.array([False, False]), scores) is None
    assert precision_recall(np.array([False, False]), scores) is None
    assert precision_recall(np.array([True, True]), scores).y == [1, 1]


@pytest.mark.parametrize("seed", range(15))
def test_net_benefit_is_counted_by_hand(seed):
    ill, scores = case(seed, 3 + 7 * seed, digits=seed % 2 or None)
    scores[2:5] = 0.25  # just at a threshold
    found = decision_curve(ill, scores)
    assert found.thresholds == pytest.approx([n / 100 for n in range(1, 100)])
    for t, model, everyone in zip(found.thresholds, found.model, found.everyone, strict=True):
        referred = [(sick, score >= t) for sick, score in zip(ill.tolist(), scores.tolist(), strict=True)]
        worth = t / (1 - t)
        benefit = sum(1 if sick else -worth for sick, called in referred if called) / len(ill)
        assert model == pytest.approx(benefit)
        assert everyone == pytest.approx(sum(1 if sick else -worth for sick in ill.tolist()) / len(ill))


def test_a_model_that_is_always_right_gains_what_there_is_to_gain():
    ill = np.array([True, False, False, True, False])
    found = decision_curve(ill, ill.astype(np.float64))
    assert found.model == pytest.approx([0.4] * 99)
    assert min(found.everyone) < 0 < max(found.everyone) < 0.4
