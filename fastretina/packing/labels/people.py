"""Whose photograph each row is, and which eye, where no column says: from a pattern, the name, or what a DICOM file says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastretina.beton.reader import EYE, PATIENT
from fastretina.errors import JpegError, LabelError, UsageError
from fastretina.grading import eye_of, side_of
from fastretina.packing.config import PackConfig
from fastretina.packing.dicom import identity
from fastretina.packing.labels.images import image_stem


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


def by_header(paths: Sequence[str], patients: list[str], eyes: list[str]) -> int:
    """Fill in, where they are "", what the headers of DICOM files among N images tell; how many told something.

    Asks those that are called .dcm, and those without a known extension. A broken one tells nothing here: it cannot be packed.
    """
    told = 0
    for row, path in enumerate(paths):
        if not path or (patients[row] and eyes[row]) or (image_stem(path) != path and not path.lower().endswith(".dcm")):
            continue
        try:
            patient, side = identity(path)
        except JpegError:
            continue
        found = patients[row] or patient or "", eyes[row] or side or ""
        told += found != (patients[row], eyes[row])
        patients[row], eyes[row] = found
    return told


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
