"""Decode one sample into memory that the caller owns, at the smallest size that still serves the resolution."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fastretina.beton.format import MODE_RAW
from fastretina.beton.reader import Beton

# libjpeg-turbo shrinks by these inside its inverse DCT, which is both a good low-pass filter and less work.
_DCT_FACTORS = (8, 4, 2)


def shrink_factor(width: int, height: int, resolution: int) -> int:
    """The largest whole factor by which width x height px may shrink before its longer side falls below `resolution`."""
    return max(1, max(width, height) // resolution)


@lru_cache  # asked for each image, of which most are of one size
def _after_dct(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) in px of what libjpeg-turbo makes of it."""
    shrink = shrink_factor(width, height, resolution)
    factor = next((factor for factor in _DCT_FACTORS if factor <= shrink), 1)
    return -(-width // factor), -(-height // factor)


def decoded_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) in px of what `decode` yields: shrunk by DCT scaling and averaging until less than twice `resolution`."""
    width, height = _after_dct(width, height, resolution)
    rest = shrink_factor(width, height, resolution)
    return (-(-width // rest), -(-height // rest)) if rest > 1 else (width, height)


def decode(beton: Beton, index: int, target: NDArray[np.uint8], resolution: int) -> None:
    """Decode sample `index` into `target` (h, w, 3) uint8 of `decoded_size`; releases the GIL while it works.

    Raises SampleError where `Beton.jpeg` or the decoder finds the sample bad; target is then undefined.
    """
    beton, index = beton.at(index)  # once, not for each question
    if beton.modes.item(index) == MODE_RAW:
        _fit(beton.pixels(index), target)
        return
    data = beton.jpeg(index)
    try:
        decode_jpeg(data, beton.widths.item(index), beton.heights.item(index), target, resolution)
    except ValueError as error:
        raise beton.sample_error(index, f"cannot be decoded: {error}") from error


def decode_jpeg(data: bytes | memoryview, width: int, height: int, target: NDArray[np.uint8], resolution: int) -> None:
    """The same of a JPEG of width x height px in memory. ValueError where it cannot be decoded."""
    width, height = _after_dct(width, height, resolution)
    direct = target.shape == (height, width, 3)
    pixels = target if direct else np.empty((height, width, 3), np.uint8)
    simplejpeg.decode_jpeg(data, buffer=pixels, min_height=height, min_width=width, min_factor=1)
    if not direct:
        _fit(pixels, target)


def _fit(pixels: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    if pixels.shape == target.shape:
        np.copyto(target, pixels)
    else:
        cv2.resize(pixels, (target.shape[1], target.shape[0]), dst=target, interpolation=cv2.INTER_AREA)


class Sizes:
    """Width and height of each sample of a file once it is decoded for a resolution, px. only: both, where all are equal."""

    def __init__(self, beton: Beton, resolution: int) -> None:
        sides = np.stack([beton.widths, beton.heights], axis=1)
        # Mostly all are of one size, and a million need not be sorted to see it.
        pairs, which = np.unique(sides if (sides != sides[0]).any() else sides[:1], axis=0, return_inverse=True)
        decoded = np.array([decoded_size(width, height, resolution) for width, height in pairs.tolist()])
        uniform = bool((decoded == decoded[0]).all())
        self.only = (int(decoded[0, 0]), int(decoded[0, 1])) if uniform else None
        self._all = decoded[:0] if uniform else decoded[which.reshape(-1)]  # (N, 2)

    @property
    def largest(self) -> tuple[int, int]:
        """The largest width and the largest height."""
        return self.only or (int(self._all[:, 0].max()), int(self._all[:, 1].max()))

    def of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Widths and heights (B,) int64 of these samples."""
        if self.only:
            return np.full(len(indices), self.only[0]), np.full(len(indices), self.only[1])
        return self._all[indices, 0], self._all[indices, 1]
