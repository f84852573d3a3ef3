"""What the grades are, which of them are referable, and whose eye an image is: the one place that knows."""

from __future__ import annotations

import re
from collections.abc import Iterable

REFERABLE_FROM = 2  # the lowest grade that a screening programme refers to an ophthalmologist
GRADES = {str(grade): grade for grade in range(5)}
_EYE = re.compile(r"(.+)_(left|right)")


def patient_of(name: str) -> str | None:
    """The patient of `<patient>_<left|right>` (a folder before it does not count); None for other names."""
    match = _EYE.fullmatch(name.rpartition("/")[2])
    return match[1] if match else None


def patients_in_both(one: Iterable[str], other: Iterable[str]) -> set[str]:
    """Patients with images in both lists of names: their eyes are not independent, so scores on one flatter the other."""
    first, second = ({patient_of(name) for name in names} - {None} for names in (one, other))
    return {patient for patient in first & second if patient is not None}


GRADE_NAMES = ("no DR", "mild", "moderate", "severe", "proliferative")


def grade_title(grade: int) -> str:
    """`2 moderate`; the bare number past the five grades of diabetic retinopathy."""
    return f"{grade} {GRADE_NAMES[grade]}" if grade < len(GRADE_NAMES) else str(grade)


NUM_CLASSES = 5
