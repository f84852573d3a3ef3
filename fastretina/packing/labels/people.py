"""Whose photograph each row is, and which eye: from columns, a pattern, or the name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastretina.beton.reader import EYE, PATIENT
from fastretina.errors import LabelError, UsageError
from fastretina.grading import eye_of, side_of
from fastretina.packing.config import PackConfig


def by_name(names: Sequence[str], config: PackConfig) -> tuple[list[str], list[str]]:
    """Patients and eyes, "" where unknown, as the names of N images tell: by --patient-pattern, else by `grading.eye_of`.

    names: with their folder, without extension and without what says the class.

    Raises:
        UsageError: the pattern is none. LabelError: no name matches it.
    """
    eyes = [eye_of(name) or ("", "") for name in names]
    if config.patient_pattern is None:
        return [patient for patient, _ in eyes], [side for _, side in eyes]
    pattern, group = _pattern(config.patient_pattern)
    matches = [pattern.search(name) for name in names]
    if names and not any(matches):
        raise LabelError(f"--patient-pattern {config.patient_pattern}: matches no name, like {names[0]!r}")
    patients = [(match[group] or "").strip() if match else "" for match in matches]
    if EYE not in pattern.groupindex:
        return patients, [side for _, side in eyes]
    return patients, [(side_of(match[EYE] or "") or "") if match else "" for match in matches]


def _pattern(text: str) -> tuple[re.Pattern[str], int]:
    """A compiled pattern, and the number of the group that is the patient."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(f"--patient-pattern {text}: no regular expression ({error})") from None
    eye = pattern.groupindex.get(EYE)
    groups = [number for number in range(1, pattern.groups + 1) if number != eye]
    if PATIENT not in pattern.groupindex and not groups:
        raise UsageError(f"--patient-pattern {text}: put what is the patient in parentheses, like ([0-9]+)_")
    return pattern, pattern.groupindex.get(PATIENT, groups[0] if groups else 0)
