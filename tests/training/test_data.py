"""Validation images share no patient with the rest, and are the same whatever the order of the file."""

from __future__ import annotations

import numpy as np
import pytest

from fastretina.errors import UsageError
from fastretina.grading import patients_in_both
from fastretina.training.data import validation_split


def data_set(patients: int = 500, seed: int = 0) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    names = [f"{patient}_{side}" for patient in range(patients) for side in ("left", "right") if rng.random() < 0.8]
    return names, rng.choice(5, len(names), p=[0.735, 0.07, 0.15, 0.025, 0.02])


def test_no_patient_stands_on_both_sides_and_no_image_is_lost():
    names, labels = data_set()
    train, val = validation_split(names, labels, 0.1, "patient")
    assert sorted([*train, *val]) == list(range(len(names)))
    assert not patients_in_both([names[i] for i in train], [names[i] for i in val])
    assert len(val) == pytest.approx(0.1 * len(names), rel=0.1)
    assert all(train[1:] > train[:-1])


def test_by_image_the_eyes_of_a_patient_may_part():
    names, labels = data_set()
    train, val = validation_split(names, labels, 0.3, "image")
    assert patients_in_both([names[i] for i in train], [names[i] for i in val])


def test_rare_grades_come_to_the_validation_set_in_their_proportion():
    names, labels = data_set(2000)
    _, val = validation_split(names, labels, 0.2, "patient")
    for grade in range(5):
        assert (labels[val] == grade).sum() == pytest.approx(0.2 * (labels == grade).sum(), rel=0.35)


def test_the_split_does_not_depend_on_the_order_of_the_file():
    names, labels = data_set()
    _, val = validation_split(names, labels, 0.1, "patient")
    order = np.random.default_rng(5).permutation(len(names))
    _, again = validation_split([names[i] for i in order], labels[order], 0.1, "patient")
    assert {names[i] for i in val} == {names[order[i]] for i in again}


def test_a_patient_stays_on_its_side_when_others_are_added():
    """Not exactly (a stratum's share is rounded), but nearly: a split by position would mix half of them anew."""
    names, labels = data_set(1000)
    few = [i for i, name in enumerate(names) if int(name.split("_")[0]) < 800]
    _, before = validation_split([names[i] for i in few], labels[few], 0.2, "patient")
    _, after = validation_split(names, labels, 0.2, "patient")
    earlier = {names[few[i]] for i in before}
    assert len(earlier & {names[i] for i in after}) > 0.85 * len(earlier)


def test_names_without_patients_are_refused_with_the_way_out():
    with pytest.raises(UsageError, match="--split-by image"):
        validation_split(["a.png", "10_left"], np.zeros(2, np.int64), 0.5, "patient")


def test_a_side_without_images_is_refused():
    with pytest.raises(UsageError, match="both need some"):
        validation_split(["10_left", "11_left"], np.array([0, 1]), 0.1, "patient")
