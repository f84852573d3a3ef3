"""Validation images share no patient with the rest, and are the same whatever the order of the file."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fastretina.errors import UsageError
from fastretina.grading import eye_of, patients_in_both
from fastretina.training.data import split


def data_set(patients: int = 500, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Names of images, and their labels."""
    rng = np.random.default_rng(seed)
    names = [f"{patient}_{side}" for patient in range(patients) for side in ("left", "right") if rng.random() < 0.8]
    return names, rng.choice(5, len(names), p=[0.735, 0.07, 0.15, 0.025, 0.02])


def people(names: list[str]) -> list[str]:
    return [eye_of(name)[0] for name in names]


def test_no_patient_stands_on_both_sides_and_no_image_is_lost():
    names, labels = data_set()
    train, val = split(people(names), labels, 0.1, "--val-fraction")
    assert sorted([*train, *val]) == list(range(len(names)))
    assert patients_in_both(people([names[i] for i in train]), people([names[i] for i in val])) == 0
    assert len(val) == pytest.approx(0.1 * len(names), rel=0.1)
    assert all(train[1:] > train[:-1])


def test_by_image_the_eyes_of_a_patient_may_part():
    names, labels = data_set()
    train, val = split(names, labels, 0.3, "--val-fraction")
    assert patients_in_both(people([names[i] for i in train]), people([names[i] for i in val])) > 100


def test_rare_grades_come_to_the_validation_set_in_their_proportion():
    names, labels = data_set(2000)
    _, val = split(people(names), labels, 0.2, "--val-fraction")
    for grade in range(5):
        assert (labels[val] == grade).sum() == pytest.approx(0.2 * (labels == grade).sum(), rel=0.35)


def test_the_split_does_not_depend_on_the_order_of_the_file():
    names, labels = data_set()
    _, val = split(people(names), labels, 0.1, "--val-fraction")
    order = np.random.default_rng(5).permutation(len(names))
    _, again = split(people([names[i] for i in order]), labels[order], 0.1, "--val-fraction")
    assert {names[i] for i in val} == {names[order[i]] for i in again}


def test_a_patient_stays_on_its_side_when_others_are_added():
    """Not exactly (a stratum's share is rounded), but nearly: a split by position would mix half of them anew."""
    names, labels = data_set(1000)
    few = [i for i, name in enumerate(names) if int(name.split("_")[0]) < 800]
    _, before = split(people([names[i] for i in few]), labels[few], 0.2, "--val-fraction")
    _, after = split(people(names), labels, 0.2, "--val-fraction")
    earlier = {names[few[i]] for i in before}
    assert len(earlier & {names[i] for i in after}) > 0.85 * len(earlier)


def test_the_split_is_the_one_that_earlier_versions_made():
    """A run that is taken up again must find its validation set: by SHA-256 of the patients, stratum by stratum."""
    names, labels = data_set(60)
    _, val = split(people(names), labels, 0.1, "--val-fraction")
    worst = {patient: max(labels[i] for i, name in enumerate(people(names)) if name == patient) for patient in people(names)}
    expected: set[str] = set()
    for grade in range(5):
        stratum = sorted((p for p in worst if worst[p] == grade), key=lambda p: hashlib.sha256(p.encode()).digest())
        expected |= set(stratum[: round(0.1 * len(stratum))])
    assert {people(names)[i] for i in val} == expected


def test_a_side_without_images_is_refused():
    with pytest.raises(UsageError, match="--test-fraction: takes 0 of 2 images and leaves 2; both sides need some"):
        split(["10", "11"], np.array([0, 1]), 0.1, "--test-fraction")
