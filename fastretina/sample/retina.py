"""The healthy retina that every sample image is made of: one real photograph on a canvas, and where its landmarks lie.

Canvas coordinates are (x, y) in pixels of a 768 x 768 canvas showing a left eye upright. One optic disc diameter is
about 1.5 mm and 96 canvas px, so a canvas pixel is about 16 µm of retina: lesion sizes can be checked against a textbook.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import cv2
import numpy as np
import simplejpeg
from cv2.typing import MatLike

Image = MatLike  # cv2 does not type the dtype: docstrings give it

CANVAS = 768  # side, px
CENTRE = CANVAS / 2
RADIUS = 340.0  # of the photographed retina, canvas px; the rest of the canvas is a margin for the elastic warp
DISC_DIAMETER = 96.0  # of the optic disc, canvas px
OPTIC_DISC = (143.0, 358.0)
FOVEA = (386.0, 382.0)
# Points on the large temporal and nasal vessels: new vessels grow from these and from the optic disc.
ARCADES = ((188, 243), (247, 199), (432, 245), (577, 226), (181, 550), (267, 629), (426, 632), (247, 511))

# The photograph's retina, px: a circle, apart from the camera's orientation tab at the upper right.
_PHOTO_CENTRE, _PHOTO_RADIUS = 705.0, 696.0


@cache
def healthy_retina() -> Image:
    """The photograph as RGB uint8 (768, 768, 3), read-only, reflected outwards at its rim so that no black ever shows.

    The mirror starts at 0.985 of the radius, inside the dark, blurred rim; it also covers the camera's tab.
    """
    encoded = (resources.files("fastretina.sample") / "retina_cc0.jpg").read_bytes()
    photo: Image = simplejpeg.decode_jpeg(encoded)
    shrink = _PHOTO_RADIUS / RADIUS
    # Reducing by 2 with bilinear samples aliases the finest vessels into dots: filter first.
    photo = cv2.GaussianBlur(photo, (0, 0), 0.3 * shrink)
    y, x = np.mgrid[:CANVAS, :CANVAS].astype(np.float32) - np.float32(CENTRE - 0.5)
    r = np.maximum(np.hypot(x, y), 1e-3)
    rim = 0.985 * RADIUS
    reflect = np.where(r > rim, (2 * rim - r) / r, 1).astype(np.float32) * np.float32(shrink)
    canvas: Image = cv2.remap(photo, x * reflect + _PHOTO_CENTRE, y * reflect + _PHOTO_CENTRE, cv2.INTER_LINEAR)
    canvas.setflags(write=False)
    return canvas
