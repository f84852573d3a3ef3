"""Fusion of a patient's two eyes: the formula, who is whose partner, and that it helps where both eyes share the disease."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from labelled import write_labelled
from sklearn.metrics import cohen_kappa_score

from fastretina import open_beton
from fastretina.errors import UsageError
from fastretina.metrics.fusion import Eye, eyes_of, fuse_eyes, partners


def fused_by_loop(shown: list[Eye], scores: np.ndarray, weight: float) -> np.ndarray:
    """The definition, pair by pair."""
    out = scores.copy()
    for one, eye in enumerate(shown):
        for other, candidate in enumerate(shown):
            if one != other and eye.patient == candidate.patient:
                out[one] = (1 - weight) * scores[one] + weight * scores[other]
    return out


def eyes(patients: int, seed: int) -> tuple[list[Eye], np.ndarray, np.ndarray]:
    """Eyes in random order, true grades and noisy probabilities of eyes whose patient's severity they share, one in ten alone."""
    rng = np.random.default_rng(seed)
    severity = rng.uniform(-0.5, 4.5, patients)
    shown = [Eye(str(number), side, f"{number}-{side}") for number in range(patients) for side in ("left", "right")]
    own = np.repeat(severity, 2) + rng.normal(0, 0.3, 2 * patients)
    seen = own + rng.normal(0, 1.2, 2 * patients)
    logits = -((seen[:, None] - np.arange(5)) ** 2)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    kept = rng.permutation(2 * patients)[: int(1.9 * patients)]
    return [shown[index] for index in kept], np.rint(own).clip(0, 4).astype(int)[kept], probabilities[kept]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5])
def test_it_is_the_formula_for_every_pair(weight):
    shown, _, probabilities = eyes(60, seed=0)
    fused = fuse_eyes(shown, probabilities, weight)
    np.testing.assert_allclose(fused, fused_by_loop(shown, probabilities, weight), atol=1e-14)
    np.testing.assert_allclose(fused.sum(axis=1), 1.0, atol=1e-12)


def test_noisy_eyes_that_share_a_severity_are_graded_better_together():
    shown, grades, probabilities = eyes(1000, seed=1)

    def kappa(scores: np.ndarray) -> float:
        return cohen_kappa_score(grades, scores.argmax(axis=1), weights="quadratic")

    alone, together = kappa(probabilities), kappa(fuse_eyes(shown, probabilities, 0.5))
    assert kappa(fused_by_loop(shown, probabilities, 0.5)) == together
    assert together > alone + 0.05
    assert (fuse_eyes(shown, probabilities, 0.5).argmax(1) == grades).mean() > (probabilities.argmax(1) == grades).mean() + 0.03


def test_eyes_of_other_people_do_not_help():
    """The gain above is the patient's, not the averaging's."""
    shown, grades, probabilities = eyes(1000, seed=1)
    shuffled = [shown[index] for index in np.random.default_rng(2).permutation(len(shown))]
    alone, mixed = ((scores.argmax(1) == grades).mean() for scores in (probabilities, fuse_eyes(shuffled, probabilities, 0.5)))
    assert mixed < alone


def test_images_without_a_partner_stay_the_same_to_the_bit():
    shown = [Eye("1", "left", "a"), Eye("2", "right", "b"), Eye("4", "left", "c"), Eye("4", "right", "d")]
    assert partners(shown).tolist() == [0, 1, 3, 2]
    scores = np.random.default_rng(0).random((4, 5))
    fused = fuse_eyes(shown, scores, 0.37)
    assert np.array_equal(fused[:2], scores[:2])
    assert not np.allclose(fused[2:], scores[2:])


def test_unknown_patients_or_eyes_are_an_error_that_says_how_many(tiny_betons, tmp_path):
    with open_beton(tiny_betons.test) as known:
        assert eyes_of(known)[:2] == [Eye("15", "left", "15_left"), Eye("15", "right", "15_right")]
        partly = write_labelled(tmp_path / "partly.beton", known, names=["scan", *known.names[1:]])
        none = write_labelled(tmp_path / "none.beton", known, names=[f"scan{n}" for n in range(len(known))])
    for path, unknown in ((partly, 1), (none, 20)):
        with open_beton(path) as beton, pytest.raises(UsageError, match=f"of {unknown} of 20 images .*--patient-column"):
            eyes_of(beton)


def test_arrays_give_arrays_and_tensors_tensors_of_the_same_type():
    shown, _, probabilities = eyes(20, seed=3)
    expected = fuse_eyes(shown, probabilities, 0.25)
    for dtype in (np.float32, np.float64):
        fused = fuse_eyes(shown, probabilities.astype(dtype), 0.25)
        assert fused.dtype == dtype
    for kind in (torch.float32, torch.float64):
        tensor = torch.from_numpy(probabilities).to(kind)
        before = tensor.clone()
        found = fuse_eyes(shown, tensor, 0.25)
        assert found.dtype == kind
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
        assert torch.equal(tensor, before)


def test_two_images_of_one_eye_are_refused_by_name():
    with pytest.raises(UsageError, match=r"patient 10 has two images of the left eye, a/10_left and b/10_left"):
        fuse_eyes([Eye("10", "left", "a/10_left"), Eye("10", "right", "x"), Eye("10", "left", "b/10_left")], np.ones((3, 5)), 0.5)


@pytest.mark.parametrize("weight", [-0.1, 0.51, float("nan")])
def test_a_weight_past_a_half_is_refused(weight):
    with pytest.raises(UsageError, match=r"0-0\.5"):
        fuse_eyes([Eye("1", "left", "1_left")], np.ones((1, 5)), weight)


def test_eyes_and_rows_must_agree():
    with pytest.raises(ValueError, match="1 eyes for 2 rows"):
        fuse_eyes([Eye("1", "left", "1_left")], np.ones((2, 5)), 0.5)
