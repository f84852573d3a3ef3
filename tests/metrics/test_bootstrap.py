"""Intervals, screening and calibration, each against scikit-learn or a slow reference."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sklearn.metrics as oracle
import torch

from fastretina.metrics.assessment import Assessment, calibration
from fastretina.metrics.bootstrap import bootstrap, draws, patient_groups
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.screening import operating_points
from fastretina.report import plots
from fastretina.report.assessment import calibration as calibration_section
from fastretina.report.assessment import intervals, lines, screening

NAMES = ("accuracy", "balanced_accuracy", "qwk", "macro_f1", "auroc_referable")
GRADES = list(range(5))


def answers(seed: int, count: int, digits: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(N,) skewed grades and (N, 5) probabilities that know something of them; few digits make tied scores."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, size=count, p=[0.6, 0.1, 0.15, 0.1, 0.05])
    logits = rng.normal(0, 1, (count, 5)) + 1.5 * np.eye(5)[labels]
    if digits is not None:
        logits = np.round(logits, digits)
    probabilities = np.exp(logits)
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"{n // 2}_{'left' if n % 2 else 'right'}" for n in range(count)]


def slow_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """By scikit-learn; NaN where undefined."""
    predicted, sick = probabilities.argmax(1), labels >= 2
    seen = np.union1d(labels, predicted)
    return {
        "accuracy": oracle.accuracy_score(labels, predicted),
        "balanced_accuracy": oracle.recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0),
        "qwk": oracle.cohen_kappa_score(labels, predicted, labels=GRADES, weights="quadratic") if len(seen) > 1 else np.nan,
        "macro_f1": oracle.f1_score(labels, predicted, average="macro"),
        "auroc_referable": oracle.roc_auc_score(sick, probabilities[:, 2:].sum(1)) if 0 < sick.sum() < len(sick) else np.nan,
    }


def test_the_metrics_are_those_of_scikit_learn_on_200_random_cases():
    for seed in range(200):
        labels, probabilities = answers(seed, count=4 + seed, digits=0 if seed % 3 == 0 else None)
        found = bootstrap(labels, probabilities, np.arange(len(labels)), resamples=2)
        for name, value in slow_metrics(labels, probabilities).items():
            if np.isnan(value):
                assert found[name].value is None
            else:
                assert found[name].value == pytest.approx(value, abs=1e-9), (seed, name)


@pytest.mark.parametrize("count", [9, 40])
def test_the_bootstrap_is_the_slow_one_with_the_same_draws(count):
    """9 images in 5 patients: resamples without a referable eye, or of one grade alone, occur and are left out."""
    labels, probabilities = answers(count, count, digits=1)
    groups = patient_groups(names(count))
    resampled = []
    for drawn in draws(int(groups.max()) + 1, 150, seed=3):
        images = np.concatenate([np.flatnonzero(groups == patient) for patient in drawn])
        resampled.append(slow_metrics(labels[images], probabilities[images]))
    found = bootstrap(labels, probabilities, groups, resamples=150, seed=3)
    for name in NAMES:
        low, high = np.nanpercentile([metrics[name] for metrics in resampled], [2.5, 97.5])
        assert found[name].low == pytest.approx(low, abs=1e-9), name
        assert found[name].high == pytest.approx(high, abs=1e-9), name
    assert count == 40 or any(np.isnan(metrics["auroc_referable"]) for metrics in resampled)


def test_intervals_of_eyes_that_fail_together_are_wider_by_patient():
    """Both eyes of a patient graded right, or both wrong: there are half as many independent samples, so √2 times the width."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 5, 400), 2)
    right = np.repeat(rng.random(400) < 0.7, 2)
    probabilities = np.eye(5)[np.where(right, labels, (labels + 1) % 5)]
    by_patient = bootstrap(labels, probabilities, patient_groups(names(800)))["accuracy"]
    by_image = bootstrap(labels, probabilities, np.arange(800))["accuracy"]
    ratio = (by_patient.high - by_patient.low) / (by_image.high - by_image.low)
    assert 1.25 < ratio < 1.6
    assert by_patient.low < right.mean() < by_patient.high


def test_eyes_of_a_patient_are_one_group_and_other_names_stand_alone():
    groups = patient_groups(["10_left", "7_right", "a/10_right", "scan", "scan", "7_left"])
    assert groups.tolist() == [0, 1, 0, 2, 3, 1]


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    labels, probabilities = answers(1, 60)
    one, same, other = (bootstrap(labels, probabilities, np.arange(60), seed=seed)["qwk"] for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_a_thousand_resamples_of_the_real_test_set_take_about_a_second():
    labels, probabilities = answers(2, 7026)
    groups = patient_groups(names(7026))
    started = time.process_time()
    found = bootstrap(labels, probabilities, groups)
    assert time.process_time() - started < 5
    assert all(found[name].low < found[name].value < found[name].high for name in NAMES)


def test_metrics_that_do_not_exist_are_none():
    found = bootstrap(np.zeros(6, np.int64), np.eye(5)[[0] * 6], np.arange(6), resamples=20)
    assert found["accuracy"].value == 1.0
    for name in ("qwk", "auroc_referable"):
        assert (found[name].value, found[name].low, found[name].high) == (None, None, None)
    assert operating_points(np.zeros(6, np.int64), np.eye(5)[[0] * 6]) == []


@pytest.mark.parametrize("seed", range(20))
def test_operating_points_are_on_the_roc_curve_of_scikit_learn(seed):
    labels, probabilities = answers(seed, 30 + 10 * seed, digits=1)
    sick, scores = labels >= 2, probabilities[:, 2:].sum(1)
    false, true, thresholds = oracle.roc_curve(sick, scores, drop_intermediate=False)
    predicted, half, *others = operating_points(labels, probabilities)
    assert predicted.sensitivity == pytest.approx(oracle.recall_score(sick, probabilities.argmax(1) >= 2))
    assert predicted.specificity == pytest.approx(oracle.recall_score(~sick, probabilities.argmax(1) < 2))
    assert half.sensitivity == pytest.approx(oracle.recall_score(sick, scores >= 0.5))
    assert half.specificity == pytest.approx(oracle.recall_score(~sick, scores < 0.5))
    for target, point in zip((0.8, 0.9), others, strict=True):
        first = int(np.flatnonzero(true >= target - 1e-9)[0])
        assert point.threshold == pytest.approx(thresholds[first])
        assert point.sensitivity == pytest.approx(true[first])
        assert point.specificity == pytest.approx(1 - false[first])


@pytest.mark.parametrize("seed", range(10))
def test_the_calibration_error_is_that_of_a_slow_reference(seed):
    labels, probabilities = answers(seed, 300)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for n in range(15):
        inside = (confidence > n / 15) & (confidence <= (n + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = calibration(labels, probabilities)
    assert found.ece == pytest.approx(expected, abs=1e-12)
    assert sum(found.samples) == 300
    assert [mean is None for mean in found.accuracy] == [n == 0 for n in found.samples]


def test_answers_that_are_as_sure_as_they_are_right_have_no_calibration_error():
    probabilities = np.tile([0.75, 0.25, 0, 0, 0], (100, 1))
    assert calibration(np.repeat([0, 1], [75, 25]), probabilities).ece == pytest.approx(0)
    assert calibration(np.repeat([0, 1], [25, 75]), probabilities).ece == pytest.approx(0.5)


@pytest.mark.parametrize("labels", [[0] * 20, [n % 5 for n in range(20)]], ids=["one grade", "all grades"])
def test_an_assessment_goes_into_json_html_and_the_terminal(labels):
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found = Assessment.of(Predictions(logits.log_softmax(1), torch.tensor(labels), torch.arange(20)), names(20))
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["intervals"]["patients"] == 10
    assert set(NAMES) < written["intervals"].keys()
    assert (written["auroc_referable"] is None) == (labels[1] == 0)
    assert "95&nbsp;% interval" in "\n".join(intervals(found).parts)
    assert (screening(found) is None) == (labels[1] == 0)
    assert "ECE" in "\n".join(calibration_section(found).parts)
    assert any(line.startswith("QWK") for line in lines(found))
    assert plots.reliability(found.calibration).startswith(b"\x89PNG")
