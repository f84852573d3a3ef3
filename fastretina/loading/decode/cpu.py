"""Decode one sample into memory that the caller owns, at the smallest size that still serves the resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton

_RAW = 1  # Beton.modes: pixels instead of a JPEG

# libjpeg-turbo shrinks by these inside its inverse DCT, which is both a good low-pass filter and less work.
_DCT_FACTORS = (8, 4, 2)


def shrink_factor(width: int, height: int, resolution: int) -> int:
    """The largest whole factor by which width x height px may shrink before its longer side falls below `resolution`."""
    return max(1, max(width, height) // resolution)


def _dct_factor(width: int, height: int, resolution: int) -> int:
    shrink = shrink_factor(width, height, resolution)
    return next((factor for factor in _DCT_FACTORS if factor <= shrink), 1)


def decoded_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) in px of what `decode` yields: shrunk by DCT scaling and averaging until less than twice `resolution`."""
    factor = _dct_factor(width, height, resolution)
    width, height = -(-width // factor), -(-height // factor)
    rest = shrink_factor(width, height, resolution)
    return (-(-width // rest), -(-height // rest)) if rest > 1 else (width, height)


def decode(beton: Beton, index: int, target: NDArray[np.uint8], resolution: int, verify: bool = True) -> None:
    """Decode sample `index` into `target` (h, w, 3) uint8 of `decoded_size`; releases the GIL while it works.

    Raises SampleError where the checksum (if `verify`) or the decoder finds the sample bad; target is then undefined.
    """
    beton, index = beton.at(index)  # once, not for each question
    width, height = int(beton.widths[index]), int(beton.heights[index])
    factor = 1 if beton.modes[index] == _RAW else _dct_factor(width, height, resolution)
    scaled = (-(-height // factor), -(-width // factor))
    if beton.modes[index] == _RAW:
        pixels = beton.pixels(index, verify)
    else:
        data = beton.jpeg(index, verify)
        direct = scaled == target.shape[:2]
        pixels = target if direct else np.empty((*scaled, 3), np.uint8)
        try:
            decoded = simplejpeg.decode_jpeg(data, buffer=pixels, min_height=scaled[0], min_width=scaled[1], min_factor=1)
        except ValueError as error:
            raise beton.sample_error(index, f"cannot be decoded: {error}") from error
        if decoded.shape[:2] != scaled:
            raise beton.sample_error(
                index, f"decodes to {decoded.shape[1]} x {decoded.shape[0]} px, its entry says {width} x {height}"
            )
        if direct:
            return
    if pixels.shape == target.shape:
        np.copyto(target, pixels)
    else:
        cv2.resize(pixels, (target.shape[1], target.shape[0]), dst=target, interpolation=cv2.INTER_AREA)


class Sizes:
    """Decoded width and height of each sample: one pair where all are equal, else two (N,) arrays."""

    def __init__(self, widths: NDArray[np.int64], heights: NDArray[np.int64]) -> None:
        uniform = bool((widths == widths[0]).all() and (heights == heights[0]).all())
        self.only = (int(widths[0]), int(heights[0])) if uniform else None
        self._widths, self._heights = (widths[:0], heights[:0]) if uniform else (widths, heights)

    @property
    def largest(self) -> tuple[int, int]:
        """The largest width and the largest height."""
        return self.only or (int(self._widths.max()), int(self._heights.max()))

    def of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Widths and heights (B,) int64 of these samples."""
        if self.only:
            return np.full(len(indices), self.only[0]), np.full(len(indices), self.only[1])
        return self._widths[indices], self._heights[indices]


def decoded_sizes(beton: Beton, resolution: int) -> Sizes:
    """The size that each sample has after decoding for `resolution`."""
    widths, heights = np.asarray(beton.widths, np.int64), np.asarray(beton.heights, np.int64)
    if (widths == widths[0]).all() and (heights == heights[0]).all():
        width, height = decoded_size(int(widths[0]), int(heights[0]), resolution)
        return Sizes(np.full(1, width), np.full(1, height))
    pairs, which = np.unique(np.stack([widths, heights], axis=1), axis=0, return_inverse=True)
    decoded = np.array([decoded_size(int(w), int(h), resolution) for w, h in pairs])[which.reshape(-1)]
    return Sizes(decoded[:, 0], decoded[:, 1])
