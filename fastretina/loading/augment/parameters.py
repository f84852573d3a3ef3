"""Augmentation parameters as a pure function of (seed, epoch, sample id): no state, no order, no worker count.

The random bits come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
counter-based generator: the counter is the sample, the key is the seed. Every sample owns twelve uniform numbers in each
epoch and each augmentation always uses the same one of them, so that switching one on does not change the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastretina.errors import UsageError

# Mean and standard deviation of ImageNet's RGB, scale 0-1: what torchvision's weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG's Y
_MID_GREY = 127.5
_BLOCKS = 3  # Philox blocks of four uniforms per sample


@dataclass(frozen=True)
class Augment:
    """What may be done to a training image. Every range is sampled uniformly (zoom: uniformly in its logarithm).

    The defaults rotate and flip: a fundus photograph has no up, and without rotation a ResNet on this data collapses.
    """

    rotate: float = 180.0  # degrees; the angle is drawn from [-rotate, rotate)
    flip_horizontal: float = 0.5  # probability
    flip_vertical: float = 0.5  # probability
    zoom: tuple[float, float] = (1.0, 1.0)  # magnification of the image content; > 1 is closer
    shift: float = 0.0  # fraction of the side; each axis is drawn from [-shift, shift)
    brightness: float = 0.0  # factor drawn from [1 - brightness, 1 + brightness)
    contrast: float = 0.0  # factor around mid-grey, from [1 - contrast, 1 + contrast)
    saturation: float = 0.0  # factor around the pixel's own grey, from [1 - saturation, 1 + saturation)

    def __post_init__(self) -> None:
        low, high = self.zoom
        if not 0 < low <= high:
            raise UsageError(f"Augment.zoom must be (low, high) with 0 < low <= high, not {self.zoom}")
        for name in ("flip_horizontal", "flip_vertical", "shift", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"Augment.{name} must lie in 0-1, not {getattr(self, name)}")

    @property
    def recolours(self) -> bool:
        """Whether any setting changes colours; the warps leave them alone where none does.

        Asked of the matrices, at both ends and in the midst of what may be drawn, so that no list of settings can lack one.
        """
        ends_and_midst = np.tile([0.0, 1 / 3, 1 - 2.0**-32], (4 * _BLOCKS, 1))
        return bool((_drawn_colours(self, ends_and_midst) != np.eye(3, 4)).any())

    @classmethod
    def none(cls) -> Augment:
        """Resize only: what evaluation sees."""
        return cls(rotate=0.0, flip_horizontal=0.0, flip_vertical=0.0)

    @classmethod
    def full(cls) -> Augment:
        """All of it, at the strengths of the best published ResNet-50 on EyePACS (Huang et al. 2023, Diagnostics 13(10):1664)."""
        return cls(zoom=(0.87, 1.15), shift=0.05, brightness=0.2, contrast=0.2, saturation=0.1)


class WarpParameters(NamedTuple):
    """One image's row of each array tells a warp all it needs; B images, pixel centres at whole numbers.

    affine: (B, 2, 3) float64, output (x, y, 1) -> source (x, y).
    colour: (B, 3, 4) float32, source (r, g, b, 1) on 0-255 -> (r, g, b) on 0-255, to be clamped to 0-255.
    """

    affine: NDArray[np.float64]
    colour: NDArray[np.float32]


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: counter (4, ...) uint32 and two 32-bit key words -> (4, ...) uint32 random bits."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def uniforms(seed: int, epoch: int, ids: NDArray[np.int64], repeats: NDArray[np.uint32] | None = None) -> NDArray[np.float64]:
    """Twelve uniform numbers in [0, 1) for each of B samples: (12, B) float64.

    ids: (B,) int64. repeats: (B,), how often the sample has come before in this epoch (None: never), below 2^24.
    """
    wide = ids.astype(np.uint64)
    counter = np.empty((4, _BLOCKS, len(ids)), np.uint32)
    counter[0] = np.arange(_BLOCKS, dtype=np.uint32)[:, None]
    if repeats is not None:
        counter[0] |= repeats.astype(np.uint32) << np.uint32(8)
    counter[1] = (wide & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    counter[2] = (wide >> np.uint64(32)).astype(np.uint32)
    counter[3] = np.uint32(epoch & 0xFFFFFFFF)
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return bits.transpose(1, 0, 2).reshape(4 * _BLOCKS, len(ids)).astype(np.float64) * 2.0**-32


def draw(
    augment: Augment,
    resolution: int,
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    seed: int,
    epoch: int,
    ids: NDArray[np.int64],
    repeats: NDArray[np.uint32] | None = None,
) -> WarpParameters:
    """Draw the warp of B images of widths x heights (B,) px onto squares of `resolution` px.

    At rest (no augmentation) the longer side of the source fills the square and the image is centred.
    """
    u = uniforms(seed, epoch, ids, repeats)
    angle = np.deg2rad((2 * u[0] - 1) * augment.rotate)
    flip_x = np.where(u[1] < augment.flip_horizontal, -1.0, 1.0)
    flip_y = np.where(u[2] < augment.flip_vertical, -1.0, 1.0)
    log_low, log_high = np.log(augment.zoom)
    zoom = np.exp(log_low + u[3] * (log_high - log_low))
    shift = (2 * u[4:6] - 1) * augment.shift * resolution  # output px
    affine = affine_matrices(resolution, widths, heights, angle, flip_x, flip_y, zoom, shift)
    return WarpParameters(affine, _drawn_colours(augment, u))


def _drawn_colours(augment: Augment, u: NDArray[np.float64]) -> NDArray[np.float32]:
    """(B, 3, 4) matrices of the uniforms u (12, B): saturation around the pixel's grey, brightness, contrast around mid-grey."""
    brightness, contrast, saturation = (
        1 + (2 * u[6 + k, :, None, None] - 1) * strength
        for k, strength in enumerate((augment.brightness, augment.contrast, augment.saturation))
    )
    matrix = (saturation * np.eye(3) + (1 - saturation) * _LUMA) * (brightness * contrast)
    offset = np.repeat((1 - contrast) * _MID_GREY, 3, axis=1)
    return np.concatenate([matrix, offset], axis=2).astype(np.float32)


def affine_matrices(
    resolution: int,
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    angle: NDArray[np.float64],
    flip_x: NDArray[np.float64],
    flip_y: NDArray[np.float64],
    zoom: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(B, 2, 3) maps of output to source pixels, for an image that is flipped, rotated counter-clockwise by angle (radians),
    magnified by zoom about its centre, and shifted.

    flip_x, flip_y: (B,) of +1, or -1 for a flipped one. zoom: (B,). shift: (2, B) in output px.
    """
    widths, heights = np.asarray(widths, np.float64), np.asarray(heights, np.float64)
    scale = np.maximum(widths, heights) / resolution / zoom  # source px per output px
    # Rounded, so that cos(90 deg) is 0 and not 6e-17: right angles then hit pixel centres exactly.
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    linear = np.empty((len(widths), 2, 2))
    linear[:, 0, 0], linear[:, 0, 1] = flip_x * cos * scale, -flip_x * sin * scale
    linear[:, 1, 0], linear[:, 1, 1] = flip_y * sin * scale, flip_y * cos * scale
    centre_out = (resolution - 1) / 2 + shift.T
    centre_in = np.stack([(widths - 1) / 2, (heights - 1) / 2], axis=1)
    offset = centre_in - np.einsum("bij,bj->bi", linear, centre_out)
    return np.concatenate([linear, offset[:, :, None]], axis=2)
