"""Late fusion of a patient's two eyes: retinopathy is a disease of the whole body, so that one eye's answer says something of the
other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastretina.errors import UsageError
from fastretina.grading import eye_of

Scores = TypeVar("Scores", npt.NDArray[np.floating], Tensor)


def partners(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """(N,) int64: the index of the same patient's other eye, of images named `<patient>_<left|right>`; the image's own index
    where there is none, or where the name is no eye's.

    UsageError where a patient has two images of one side: which of them belongs to the other side cannot be known.
    """
    indices: dict[tuple[str, str], int] = {}
    eyes = [eye_of(name) for name in names]
    for index, eye in enumerate(eyes):
        if eye is not None and (first := indices.setdefault(eye, index)) != index:
            raise UsageError(
                f"eyes cannot be fused: patient {eye[0]} has two images of the {eye[1]} eye, {names[first]} and {names[index]}; "
                "grade without fusion, or leave one of them out"
            )
    other = {"left": "right", "right": "left"}
    found = [index if eye is None else indices.get((eye[0], other[eye[1]]), index) for index, eye in enumerate(eyes)]
    return np.asarray(found, dtype=np.int64)


def check_weight(weight: float) -> None:
    """UsageError where the other eye would count more than the one graded, or less than nothing."""
    if not 0.0 <= weight <= 0.5:
        raise UsageError(f"--fuse-eyes {weight}: the weight of the other eye must be in 0-0.5: no eye counts more than its own")


def fuse_eyes(names: Sequence[str], scores: Scores, weight: float) -> Scores:
    """(1 - weight) times an eye's own scores plus `weight` times the other eye's; images without a partner stay as they are.

    Args:
        names: N images, see `partners`, which also says what is refused.
        scores: (N, C) finite floats, an array or a tensor on any device: probabilities stay probabilities. Not changed.
        weight: 0 (no fusion) to 0.5 (both eyes get the mean). UsageError outside.
    """
    check_weight(weight)
    if len(names) != len(scores):
        raise ValueError(f"{len(names)} names for {len(scores)} rows of scores")
    # The difference, not the sum of two products: an image that is its own partner then stays the same to the bit.
    return scores + weight * (scores[partners(names)] - scores)
