"""A validation set out of the training set, which shares no patient with what is left."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastretina.errors import UsageError
from fastretina.grading import patient_of

SplitBy = Literal["patient", "image"]


def validation_split(
    names: Sequence[str], labels: NDArray[np.int64], fraction: float, by: SplitBy
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions, ascending, of (training, validation) images.

    A pure function of names and grades: the same for every seed and every order of the images, so that runs can be compared and
    a patient never changes sides. Patients (or images) are stratified by their highest grade, and those of each stratum whose
    names have the lowest SHA-256 go to the validation set: `fraction` of the stratum, rounded, so that rare grades come too.

    Args:
        names: N image names. labels: (N,) grades. fraction: 0-1, of the patients of each stratum. by: "patient" keeps the images
            of a patient (`<patient>_<left|right>`) together.

    Raises UsageError where names tell of no patients, or where one side would be empty.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        patient = patient_of(name) if by == "patient" else name
        if patient is None:
            raise UsageError(
                f"--split-by patient: the name {name!r} tells of no patient (such as 10_left); use --split-by image, or --val FILE"
            )
        groups[str(patient)].append(position)
    strata: dict[int, list[str]] = defaultdict(list)
    for group, positions in groups.items():
        strata[int(labels[positions].max())].append(group)
    chosen: list[int] = []
    for members in strata.values():
        ranked = sorted(members, key=lambda group: hashlib.sha256(group.encode()).digest())
        for group in ranked[: round(fraction * len(members))]:
            chosen += groups[group]
    validation = np.array(sorted(chosen), dtype=np.int64)
    if not 0 < len(validation) < len(labels):
        raise UsageError(
            f"--val-fraction {fraction:g}: leaves {len(labels) - len(validation)} of {len(labels)} images for training and "
            f"{len(validation)} for validation; both need some"
        )
    return np.setdiff1d(np.arange(len(labels)), validation), validation
