"""Fusion of a patient's two eyes: the formula, who is whose partner, and that it helps where both eyes share the disease."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from fastretina.errors import UsageError
from fastretina.grading import patient_of
from fastretina.metrics.fusion import fuse_eyes, partners


def fused_by_loop(names: list[str], scores: np.ndarray, weight: float) -> np.ndarray:
    """The definition, pair by pair."""
    patients, out = [patient_of(name) for name in names], scores.copy()
    for one, patient in enumerate(patients):
        for other, candidate in enumerate(patients):
            if one != other and patient is not None and patient == candidate:
                out[one] = (1 - weight) * scores[one] + weight * scores[other]
    return out


def eyes(patients: int, seed: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names in random order, true grades and noisy probabilities of eyes whose patient's severity they share, one in ten alone."""
    rng = np.random.default_rng(seed)
    severity = rng.uniform(-0.5, 4.5, patients)
    names = [f"{number}_{side}" for number in range(patients) for side in ("left", "right")]
    own = np.repeat(severity, 2) + rng.normal(0, 0.3, 2 * patients)
    seen = own + rng.normal(0, 1.2, 2 * patients)
    logits = -((seen[:, None] - np.arange(5)) ** 2)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    kept = rng.permutation(2 * patients)[: int(1.9 * patients)]
    return [names[index] for index in kept], np.rint(own).clip(0, 4).astype(int)[kept], probabilities[kept]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5])
def test_it_is_the_formula_for_every_pair(weight):
    names, _, probabilities = eyes(60, seed=0)
    fused = fuse_eyes(names, probabilities, weight)
    np.testing.assert_allclose(fused, fused_by_loop(names, probabilities, weight), atol=1e-14)
    np.testing.assert_allclose(fused.sum(axis=1), 1.0, atol=1e-12)


def test_noisy_eyes_that_share_a_severity_are_graded_better_together():
    names, grades, probabilities = eyes(1000, seed=1)

    def kappa(scores: np.ndarray) -> float:
        return cohen_kappa_score(grades, scores.argmax(axis=1), weights="quadratic")

    alone, together = kappa(probabilities), kappa(fuse_eyes(names, probabilities, 0.5))
    assert kappa(fused_by_loop(names, probabilities, 0.5)) == together
    assert together > alone + 0.05
    assert (fuse_eyes(names, probabilities, 0.5).argmax(1) == grades).mean() > (probabilities.argmax(1) == grades).mean() + 0.03


def test_eyes_of_other_people_do_not_help():
    """The gain above is the patient's, not the averaging's."""
    names, grades, probabilities = eyes(1000, seed=1)
    shuffled = [names[index] for index in np.random.default_rng(2).permutation(len(names))]
    alone, mixed = ((scores.argmax(1) == grades).mean() for scores in (probabilities, fuse_eyes(shuffled, probabilities, 0.5)))
    assert mixed < alone


def test_images_without_a_partner_stay_the_same_to_the_bit():
    names = ["1_left", "2_right", "photo", "3_up", "left", "train/4_left", "4_right", "_left"]
    assert partners(names).tolist() == [0, 1, 2, 3, 4, 6, 5, 7]
    scores = np.random.default_rng(0).random((8, 5))
    fused = fuse_eyes(names, scores, 0.37)
    assert np.array_equal(fused[[0, 1, 2, 3, 4, 7]], scores[[0, 1, 2, 3, 4, 7]])
    assert not np.allclose(fused[[5, 6]], scores[[5, 6]])


def test_arrays_give_arrays_and_tensors_tensors_of_the_same_type():
    names, _, probabilities = eyes(20, seed=3)
    expected = fuse_eyes(names, probabilities, 0.25)
    for dtype in (np.float32, np.float64):
        fused = fuse_eyes(names, probabilities.astype(dtype), 0.25)
        assert fused.dtype == dtype
    for kind in (torch.float32, torch.float64):
        tensor = torch.from_numpy(probabilities).to(kind)
        before = tensor.clone()
        found = fuse_eyes(names, tensor, 0.25)
        assert found.dtype == kind
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
        assert torch.equal(tensor, before)


def test_two_images_of_one_eye_are_refused_by_name():
    with pytest.raises(UsageError, match=r"patient 10 has two images of the left eye, a/10_left and b/10_left"):
        fuse_eyes(["a/10_left", "10_right", "b/10_left"], np.ones((3, 5)), 0.5)


@pytest.mark.parametrize("weight", [-0.1, 0.51, float("nan")])
def test_a_weight_past_a_half_is_refused(weight):
    with pytest.raises(UsageError, match=r"0-0\.5"):
        fuse_eyes(["1_left"], np.ones((1, 5)), weight)


def test_names_and_rows_must_agree():
    with pytest.raises(ValueError, match="1 names for 2 rows"):
        fuse_eyes(["1_left"], np.ones((2, 5)), 0.5)
