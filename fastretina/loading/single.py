"""One image as an evaluation's loader makes it, outside of any data set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, cpu, draw
from fastretina.loading.decode.cpu import decode_jpeg, decoded_size

_NORM = cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)


def network_image(jpeg: bytes, side: int, resolution: int) -> NDArray[np.float32]:
    """(R, R, 3) float32, normalised, of a JPEG file of side x side px: to the bit what the loader makes of it on a CPU without
    augmentation. ValueError where it cannot be decoded."""
    width, height = decoded_size(side, side, resolution)
    source = np.zeros(width * height * 3 + cpu.SOURCE_PADDING, np.uint8)
    decode_jpeg(jpeg, side, side, source[: width * height * 3].reshape(height, width, 3), resolution)
    one = np.zeros(1, np.int64)
    affine, colour = draw(Augment.none(), resolution, one + width, one + height, 0, 0, one)
    output = np.empty((resolution, resolution, 3), np.float32)
    cpu.warp(source, height, width, affine[0], cpu.kernel_colour(colour)[0], _NORM, False, output)
    return output
