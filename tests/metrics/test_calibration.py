"""How far probabilities can be believed, against a slow reference and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as oracle
from answer_cases import answers, predictions

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.calibration import calibration


@pytest.mark.parametrize("seed", range(10))
def test_the_calibration_error_is_that_of_a_slow_reference(seed):
    labels, probabilities = answers(seed, 300)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected, counts = 0.0, []
    for n in range(15):
        inside = (confidence > n / 15) & (confidence <= (n + 1) / 15)
        counts.append(inside.sum())
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = calibration(labels, probabilities, RETINOPATHY)
    assert found.ece == pytest.approx(expected, abs=1e-12)
    assert found.samples == counts
    assert found.brier == pytest.approx(oracle.brier_score_loss(labels >= 2, probabilities[:, 2:].sum(axis=1)))
    assert [mean is None for mean in found.accuracy] == [n == 0 for n in found.samples]


def test_answers_that_are_as_sure_as_they_are_right_have_no_calibration_error():
    probabilities = np.tile([0.75, 0.25, 0, 0, 0], (100, 1))
    assert calibration(np.repeat([0, 1], [75, 25]), probabilities, RETINOPATHY).ece == pytest.approx(0)
    assert calibration(np.repeat([0, 1], [25, 75]), probabilities, RETINOPATHY).ece == pytest.approx(0.5)


def test_before_the_temperature_and_after_it_are_told_apart_and_no_referable_class_has_no_brier_score():
    labels, probabilities = answers(1, 80)
    sharper = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
    found = Assessment.of(predictions(labels, probabilities), RETINOPATHY, None, uncalibrated=predictions(labels, sharper))
    assert found.calibration.ece == pytest.approx(calibration(labels, probabilities, RETINOPATHY).ece, abs=1e-6)
    assert found.uncalibrated.ece == pytest.approx(calibration(labels, sharper, RETINOPATHY).ece, abs=1e-6)
    assert found.as_dict()["calibration_before"]["ece"] == found.uncalibrated.ece
    nobody = Classes(RETINOPATHY.names)
    assert calibration(labels, probabilities, nobody).brier is None
    assert Assessment.of(predictions(labels, probabilities), nobody, None).as_dict()["calibration_before"] is None
