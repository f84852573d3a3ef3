"""What the grades are, which of them are referable, and whose eye an image is: the one place that knows."""

from __future__ import annotations

import re
from collections.abc import Iterable

CLASSES = ("no DR", "mild", "moderate", "severe", "proliferative")  # in ascending order: a grade is a class's number here
REFERABLE_FROM = 2  # the lowest grade that a screening programme refers to an ophthalmologist

NUM_CLASSES = len(CLASSES)
GRADES = {str(grade): grade for grade in range(NUM_CLASSES)}  # as label files write them
REFERABLE = f"grade {REFERABLE_FROM}" + (" or more" if REFERABLE_FROM < NUM_CLASSES - 1 else "")
REFERABLE_SCORE = " + ".join(f"p{grade}" for grade in range(REFERABLE_FROM, NUM_CLASSES))  # the probability of referable disease
_EYE = re.compile(r"(.+)_(left|right)")


def grade_title(grade: int) -> str:
    """`2 moderate`; the bare number past the known classes."""
    return f"{grade} {CLASSES[grade]}" if grade < NUM_CLASSES else str(grade)


def eye_of(name: str) -> tuple[str, str] | None:
    """Patient and side of `<patient>_<left|right>` (a folder before it does not count); None for other names."""
    match = _EYE.fullmatch(name.rpartition("/")[2])
    return (match[1], match[2]) if match else None


def patient_of(name: str) -> str | None:
    """The patient of `<patient>_<left|right>`; None for other names."""
    eye = eye_of(name)
    return eye and eye[0]


def patients_in_both(one: Iterable[str], other: Iterable[str]) -> set[str]:
    """Patients with images in both lists of names: their eyes are not independent, so scores on one flatter the other."""
    first, second = ({patient for name in names if (patient := patient_of(name))} for names in (one, other))
    return first & second
