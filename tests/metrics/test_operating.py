"""Thresholds for referring: against a search of all of them, kept as JSON, and of an ensemble."""

from __future__ import annotations

import json

import numpy as np
import pytest
from answer_cases import answers

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.operating import Operating, Threshold, fit_operating


def searched(ill: np.ndarray, scores: np.ndarray) -> list[tuple[float, float, float]]:
    """Value, sensitivity and specificity of every threshold that means something, ascending."""
    values = [*sorted(set(scores.tolist())), 1.5]
    return [(value, (scores[ill] >= value).mean(), (scores[~ill] < value).mean()) for value in values]


@pytest.mark.parametrize("seed", range(30))
def test_thresholds_are_those_that_a_search_of_all_finds(seed):
    labels, probabilities = answers(seed, 12 + 5 * seed, digits=1)
    labels[:2] = (0, 4)
    wanted, spared = [(0.9, 0.98), (0.8, 0.5), (1.0, 1.0)][seed % 3]
    found = fit_operating(labels, probabilities, RETINOPATHY, wanted, spared, "digest")
    ill = labels >= 2
    every = searched(ill, probabilities[:, [2, 3, 4]].sum(axis=1))
    high = max(row for row in every if row[1] >= wanted - 1e-12)
    low = min(row for row in every if row[2] >= spared - 1e-12)
    high, low = sorted((high, low))
    best = max(row[1] + row[2] for row in every)
    youden = min(row for row in every if row[1] + row[2] > best - 1e-12)
    for name, target, row in (("high-sensitivity", wanted, high), ("high-specificity", spared, low), ("youden", None, youden)):
        threshold = found.named(name)
        assert threshold.target == target
        assert (threshold.sensitivity, threshold.specificity) == pytest.approx(row[1:])
        if row[0] == 1.5:  # nobody is referred
            assert threshold.value > every[-2][0]
            assert threshold.value == pytest.approx(every[-2][0])
        else:
            assert threshold.value == row[0]
    assert (found.images, found.referable, found.data) == (len(labels), int(ill.sum()), "digest")


@pytest.mark.parametrize("percent", range(50, 100))
def test_a_target_that_is_a_share_of_the_images_asks_for_no_image_more(percent):
    """80 of 100 is 0.8, whatever the rounding of either."""
    score = np.linspace(0.1, 0.9, 100)
    labels, probabilities = np.repeat([0, 1], 100), np.stack([1 - np.tile(score, 2), np.tile(score, 2)], axis=1)
    found = fit_operating(labels, probabilities, Classes(("no", "yes"), (1,)), percent / 100, percent / 100)
    assert found.named("high-sensitivity").value == score[100 - percent]
    assert found.named("high-sensitivity").sensitivity == percent / 100
    assert found.named("high-specificity").value == score[percent]
    assert found.named("high-specificity").specificity == percent / 100
    assert found.named("youden").value == score[0]  # of equals the lowest


def test_where_one_threshold_reaches_both_targets_the_more_sensitive_refers_more():
    score = np.array([0.01, 0.02, 0.03, 0.04, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.995])
    labels, probabilities = (score > 0.5).astype(np.int64), np.stack([1 - score, score], axis=1)
    found = fit_operating(labels, probabilities, Classes(("no", "yes"), (1,)), 0.7, 0.9)
    low, high = found.named("high-sensitivity"), found.named("high-specificity")
    assert (low.value, low.sensitivity, low.specificity) == (0.6, 1.0, 1.0)
    assert (high.value, high.sensitivity, high.specificity) == (0.8, 5 / 7, 1.0)
    assert low.sensitivity >= low.target
    assert high.specificity >= high.target


def test_there_are_none_without_referable_images_or_without_others():
    labels, probabilities = answers(0, 40)
    assert fit_operating(labels, probabilities, Classes(RETINOPATHY.names, ordinal=True)) is None
    assert fit_operating(np.zeros_like(labels), probabilities, RETINOPATHY) is None
    assert fit_operating(np.full_like(labels, 2), probabilities, RETINOPATHY) is None


def test_thresholds_come_out_of_json_to_the_bit():
    found = fit_operating(*answers(3, 90), RETINOPATHY, data="abc")
    assert Operating.stored(json.loads(json.dumps(found.as_dict(), allow_nan=False))) == found
    with pytest.raises(KeyError):
        found.named("low")


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": None},
        {"thresholds": [{"name": "youden"}]},
        {"images": 1.5},
        {"referable": "3"},
        {"data": 7},
        {"thresholds": [{"name": "youden", "value": None, "target": None, "sensitivity": 1, "specificity": 1}]},
        {"thresholds": [{"name": "youden", "value": float("nan"), "target": None, "sensitivity": 1, "specificity": 1}]},
        {"thresholds": [{"name": 3, "value": 0.5, "target": None, "sensitivity": 1, "specificity": 1}]},
    ],
)
def test_what_are_no_thresholds_is_refused(change):
    good = fit_operating(*answers(3, 90), RETINOPATHY).as_dict()
    with pytest.raises(ValueError, match=r"^thresholds "):
        Operating.stored(good | change)
    for value in (None, [], 3, {}):
        with pytest.raises(ValueError, match=r"^thresholds "):
            Operating.stored(value)


def threshold(value: float, name: str = "youden", target: float | None = None) -> Threshold:
    return Threshold(name, value, target, value, 1 - value)


def test_those_of_an_ensemble_are_the_mean_of_its_members_and_shared_data_count_once():
    one = Operating((threshold(0.2), threshold(0.3, "high-sensitivity", 0.9)), 100, 30, "a")
    other, third = Operating((threshold(0.4),), 100, 30, "a"), Operating((threshold(0.6),), 50, 5, "b")
    found = Operating.mean([one, other, third])
    (mean,) = found.thresholds
    assert (mean.name, mean.target) == ("youden", None)
    assert (mean.value, mean.sensitivity, mean.specificity) == pytest.approx((0.4, 0.4, 0.6))
    assert (found.images, found.referable, found.data, found.members) == (150, 35, None, 3)
    assert Operating.mean([one, other]).data == "a"
    assert Operating.mean([one]) == one


def test_members_with_thresholds_for_different_targets_have_none_together():
    several = [Operating((threshold(0.2, "high-sensitivity", target), threshold(0.5)), 10, 3, None) for target in (0.9, 0.8)]
    assert [found.name for found in Operating.mean(several).thresholds] == ["youden"]
