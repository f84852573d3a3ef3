"""One photograph as a .beton would hold it, for grading: prepared by the code that prepared those that a network learned from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastretina.errors import JpegError
from fastretina.packing.decode import of_image
from fastretina.packing.inspect import look
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.packing.reencode import Square, encode, square, squared

AS_IT_WAS = "as it was"


class Payload(NamedTuple):
    """`jpeg`: a JPEG file of size x size pixels. done: what was done to the photograph, and what else is to be told of it, in words
    that are always the same."""

    jpeg: bytes
    done: tuple[str, ...]


def payload(data: bytes, size: int, preparation: Preparation = UNPREPARED) -> Payload:
    """Of a file of any kind that can be read: its own bytes where they would pass through, else what `square` makes of it, encoded.

    Where there is nothing to crop to, which the packer refuses, the whole frame is shown, and said so. Raises as `square` does.
    """
    found = look(data, size, preparation=preparation)
    if found.payload is not None:
        return Payload(found.payload, (AS_IT_WAS, *found.notes))
    return _encoded(square(data, size, preparation))


def payload_of(picture: npt.NDArray[np.uint8] | Image.Image, size: int, preparation: Preparation = UNPREPARED) -> Payload:
    """The same of a picture in memory: an image of Pillow's, turned upright as its EXIF says, or (H, W, 3) uint8 RGB pixels, or
    (H, W) of grey. Raises JpegError, TypeError for an array of another kind."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)):
            raise TypeError(
                f"an array of {picture.dtype}, {' x '.join(map(str, picture.shape))}: (height, width, 3) uint8 RGB is needed"
            )
        if not picture.size:
            raise JpegError("an array without a pixel")
        picture = Image.fromarray(picture)
    return _encoded(squared(of_image(picture), size, preparation))


def _encoded(made: Square) -> Payload:
    return Payload(encode(made.image), made.done + made.notes)
