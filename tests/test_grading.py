"""Whose eye an image is, and what classes are."""

from __future__ import annotations

import pytest

from fastretina.grading import RETINOPATHY, Classes, all_known, eye_of, patients_in_both, side_of


@pytest.mark.parametrize(
    ("name", "eye"),
    [
        ("10_left", ("10", "left")),
        ("10_right", ("10", "right")),
        ("10_L", ("10", "left")),
        ("10_r", ("10", "right")),
        ("10_OD", ("10", "right")),
        ("10_os", ("10", "left")),
        ("IM_7_Left", ("IM_7", "left")),
        ("site A/10_left", ("site A/10", "left")),  # not the 10 of site B
        ("site B/10_left", ("site B/10", "left")),
        ("IM000123", None),
        ("left", None),
        ("_left", None),
        ("a/_left", None),
        ("10_left_2", None),
        ("10_middle", None),
    ],
)
def test_a_name_tells_patient_and_side_or_neither(name: str, eye: tuple[str, str] | None) -> None:
    assert eye_of(name) == eye


def test_sides_in_the_words_of_clinics() -> None:
    assert [side_of(word) for word in ("OD", " os ", "Left", "R", "OU", "", "1")] == [
        "right",
        "left",
        "left",
        "right",
        None,
        None,
        None,
    ]


def test_patients_are_known_shared_by_none_or_unknown() -> None:
    assert all_known(["1", "2", "1"]) == ["1", "2", "1"]
    assert all_known(["1", None]) is None
    assert all_known(None) is None
    assert patients_in_both(["1", "2", "2"], ["2", "3"]) == 1
    assert patients_in_both(["1"], ["2"]) == 0
    assert patients_in_both(["1"], None) is None


def test_classes_say_what_they_are() -> None:
    assert (RETINOPATHY.title(2), RETINOPATHY.title(7), RETINOPATHY.noun) == ("2 moderate", "7", "grade")
    assert (RETINOPATHY.referable_title, RETINOPATHY.referable_score) == ("grade 2 or more", "p2 + p3 + p4")
    two = Classes(("0", "1"), referable=(1,))
    assert (two.title(1), two.noun, two.referable_title, two.referable_score) == ("1", "class", "1", "p1")
    many = Classes(("none", "AMD", "glaucoma"), referable=(1, 2))
    assert (list(many), many[1], len(many), many.referable_title) == (["none", "AMD", "glaucoma"], "AMD", 3, "AMD or glaucoma")
    assert Classes.stored(many.as_dict()) == many
    assert Classes(("a", "b", "c"), referable=(2,), ordinal=True).referable_title == "grade 2"


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "a\rb", "a\tb", "a\x9b", "a\u2028b", "a\0", "a\udce9"], ids=ascii)
def test_a_class_is_called_by_no_control_character(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be in a name"):
        Classes(("b", name))


@pytest.mark.parametrize(
    ("names", "referable"), [((), ()), (("one",), ()), (("a", "a"), ()), (("a", ""), ()), (("a", "b"), (2,)), (("a", "b"), (1, 0))]
)
def test_classes_that_cannot_be_are_refused(names: tuple[str, ...], referable: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="classes"):
        Classes(names, referable)
