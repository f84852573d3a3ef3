"""The warp in float64 and plain numpy: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def warp(
    image: NDArray[np.uint8], affine: NDArray[np.float64], colour: NDArray[np.floating], resolution: int
) -> NDArray[np.float64]:
    """Warp image (H, W, 3) uint8 by affine (2, 3) and recolour by colour (3, 4): (resolution, resolution, 3) float64 on 0-255.

    Bilinear; outside the image lies black, which is recoloured like any other pixel.
    """
    height, width, _ = image.shape
    y, x = np.mgrid[0:resolution, 0:resolution].astype(np.float64)
    source = np.einsum("ij,jhw->ihw", affine, np.stack([x, y, np.ones_like(x)]))
    corner = np.floor(source)
    fx, fy = (source - corner)[..., None]
    ix, iy = corner.astype(np.int64)

    def tap(dy: int, dx: int) -> NDArray[np.float64]:
        row, column = iy + dy, ix + dx
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return np.where(inside[..., None], image[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)], 0.0)

    top = tap(0, 0) * (1 - fx) + tap(0, 1) * fx
    bottom = tap(1, 0) * (1 - fx) + tap(1, 1) * fx
    pixel = top * (1 - fy) + bottom * fy
    recoloured: NDArray[np.float64] = pixel @ colour[:, :3].T.astype(np.float64) + colour[:, 3]
    return np.clip(recoloured, 0.0, 255.0)


def normalise(
    image: NDArray[np.floating], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> NDArray[np.float64]:
    """(image / 255 - mean) / std for image (..., 3) on 0-255; mean and std on 0-1."""
    result: NDArray[np.float64] = (np.asarray(image, np.float64) / 255 - np.asarray(mean)) / np.asarray(std)
    return result
