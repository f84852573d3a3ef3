"""Late fusion of a patient's two eyes: retinopathy is a disease of the whole body, so that one eye's answer says something of the
other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastretina.beton.reader import Beton
from fastretina.errors import UsageError
from fastretina.grading import Side

Scores = TypeVar("Scores", npt.NDArray[np.floating], Tensor)


class Eye(NamedTuple):
    """Whose eye an image shows, and which; name: of the image."""

    patient: str
    side: Side
    name: str


def eyes_of(beton: Beton) -> list[Eye]:
    """What each of the N images of a data set shows. UsageError where that is not known of all."""
    patients, sides = beton.patients or [None] * len(beton), beton.eyes or [None] * len(beton)
    rows = zip(patients, sides, beton.names, strict=True)
    found = [Eye(patient, side, name) for patient, side, name in rows if patient is not None and side is not None]
    if len(found) < len(beton):
        raise UsageError(
            f"--fuse-eyes: {beton.path}: of {len(beton) - len(found):,} of {len(beton):,} images it is unknown whose eye they "
            "show, or which; pack them with --patient-column and --eye-column, or with --patient-pattern, or leave --fuse-eyes away"
        )
    return found


def partners(eyes: Sequence[Eye]) -> npt.NDArray[np.int64]:
    """(N,) int64: the index of the same patient's other eye; the image's own index where there is none.

    UsageError where a patient has two images of one side: which of them belongs to the other side cannot be known.
    """
    indices: dict[tuple[str, Side], int] = {}
    for index, eye in enumerate(eyes):
        if (first := indices.setdefault(eye[:2], index)) != index:
            raise UsageError(
                f"eyes cannot be fused: patient {eye.patient} has two images of the {eye.side} eye, {eyes[first].name} and "
                f"{eye.name}; grade without fusion, or leave one of them out"
            )
    other: dict[Side, Side] = {"left": "right", "right": "left"}
    return np.asarray([indices.get((eye.patient, other[eye.side]), index) for index, eye in enumerate(eyes)], dtype=np.int64)


def check_weight(weight: float) -> None:
    """UsageError where the other eye would count more than the one graded, or less than nothing."""
    if not 0.0 <= weight <= 0.5:
        raise UsageError(f"--fuse-eyes {weight}: the weight of the other eye must be in 0-0.5: no eye counts more than its own")


def fuse_eyes(eyes: Sequence[Eye], scores: Scores, weight: float) -> Scores:
    """(1 - weight) times an eye's own scores plus `weight` times the other eye's; images without a partner stay as they are.

    Args:
        eyes: of N images, see `partners`, which also says what is refused.
        scores: (N, C) finite floats, an array or a tensor on any device: probabilities stay probabilities. Not changed.
        weight: 0 (no fusion) to 0.5 (both eyes get the mean). UsageError outside.
    """
    check_weight(weight)
    if len(eyes) != len(scores):
        raise ValueError(f"{len(eyes)} eyes for {len(scores)} rows of scores")
    # The difference, not the sum of two products: an image that is its own partner then stays the same to the bit.
    return scores + weight * (scores[partners(eyes)] - scores)
