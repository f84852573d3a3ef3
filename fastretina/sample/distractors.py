"""What a clinician does not grade, in eyes of every grade: drusen, pigment, naevi; dust and reflections of the camera.

They look like lesions to a network that has not learned better: drusen and reflections like exudates and cotton-wool
spots, pigment and dust like haemorrhages. How many an eye has does not depend on its grade.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from fastretina.sample.lesions import Range, View, cover, fill_blob
from fastretina.sample.retina import CANVAS, DISC_DIAMETER, FOVEA, OPTIC_DISC, Image

Count = tuple[int, int]


@dataclass(frozen=True)
class DistractorSettings:
    """How many of each kind, as inclusive ranges, and how plain. By default none.

    Retinal lengths are canvas px (about 16 µm each, see `fastretina.sample.retina`), the camera's are image px.
    """

    drusen: Count = (0, 0)  # pale dots about the macula
    pigment: Count = (0, 0)  # brown specks of pigment epithelium
    naevi: Count = (0, 0)  # flat slate-grey spots of the choroid
    dust: Count = (0, 0)  # on the lens, out of focus
    reflections: Count = (0, 0)  # of the lens: milky patches near the rim

    drusen_radius: Range = (1.5, 5.5)  # soft drusen reach 125 µm across and more
    drusen_alpha: Range = (0.15, 0.45)
    pigment_radius: Range = (2.0, 6.0)
    pigment_alpha: Range = (0.2, 0.5)
    naevus_radius: Range = (18.0, 48.0)  # up to one disc diameter across
    naevus_alpha: Range = (0.12, 0.3)
    dust_radius: Range = (3.0, 11.0)
    dust_depth: Range = (0.06, 0.22)  # share of the light it takes
    reflection_radius: Range = (14.0, 60.0)
    reflection_level: Range = (8.0, 30.0)  # grey levels that it adds


NO_DISTRACTORS = DistractorSettings()

_DRUSEN_RGB = (238, 176, 104)  # duller than exudates; on the canvas, whose healthy retina is about (205, 80, 58)
_PIGMENT_RGB = (92, 36, 26)
_NAEVUS_RGB = (130, 72, 60)
_REFLECTION_RGB = (0.75, 1.0, 0.9)  # per grey level: the flash's light is cooler than the retina's


def paint_on_retina(canvas: Image, view: View, rng: np.random.Generator, settings: DistractorSettings) -> Image:
    """A copy of `canvas`, uint8 RGB (768, 768, 3), with drusen, pigment and naevi inside `view`; `canvas` where there are none."""

    def anywhere() -> tuple[float, float]:
        angle, r = rng.uniform(0, math.tau), (view.radius - 10) * math.sqrt(rng.random())
        return view.x + r * math.cos(angle), view.y + r * math.sin(angle)

    def macular() -> tuple[float, float]:
        return FOVEA[0] + rng.normal(0, 75), FOVEA[1] + rng.normal(0, 75)

    for count, at, radius, alpha, rgb, softness in (
        (settings.naevi, anywhere, settings.naevus_radius, settings.naevus_alpha, _NAEVUS_RGB, 5.0),
        (settings.drusen, macular, settings.drusen_radius, settings.drusen_alpha, _DRUSEN_RGB, 1.6),
        (settings.pigment, anywhere, settings.pigment_radius, settings.pigment_alpha, _PIGMENT_RGB, 1.0),
    ):
        layer = np.zeros((CANVAS, CANVAS), np.uint8)
        for _ in range(int(rng.integers(*count, endpoint=True))):
            place, opacity = at(), round(255 * rng.uniform(*alpha))
            if math.dist(place, OPTIC_DISC) > 0.65 * DISC_DIAMETER and view.holds(place, margin=8):
                fill_blob(layer, rng, place, rng.uniform(*radius), opacity, roughness=0.3, stretch=rng.uniform(1, 1.4))
        if layer.any():
            covered = cover(canvas, cv2.GaussianBlur(layer, (0, 0), softness), rgb)
            # Pigment lies under the vessels, which are darker in green: it must not pale them.
            canvas = covered if rgb is _DRUSEN_RGB else cv2.min(covered, canvas)
    return canvas


def cross_lens(rgb: Image, radius: float, rng: np.random.Generator, settings: DistractorSettings) -> Image:
    """Light `rgb`, float32 (S, S, 3), after dust took some and reflections added some; `radius` of the lit disc, image px."""
    side = len(rgb)
    dust, glare = np.zeros((side, side), np.uint8), np.zeros((side, side), np.float32)
    for _ in range(int(rng.integers(*settings.dust, endpoint=True))):
        angle, r = rng.uniform(0, math.tau), 0.95 * radius * math.sqrt(rng.random())
        at = (side / 2 + r * math.cos(angle), side / 2 + r * math.sin(angle))
        fill_blob(dust, rng, at, rng.uniform(*settings.dust_radius), round(255 * rng.uniform(*settings.dust_depth)), roughness=0.2)
    for _ in range(int(rng.integers(*settings.reflections, endpoint=True))):
        angle, r = rng.uniform(0, math.tau), radius * rng.uniform(0.55, 0.98)
        at = (side / 2 + r * math.cos(angle), side / 2 + r * math.sin(angle))
        patch = np.zeros((side, side), np.uint8)
        size = rng.uniform(*settings.reflection_radius)
        # Along the rim, as the edge of the pupil throws it.
        fill_blob(patch, rng, at, size / 2, 255, roughness=0.3, stretch=rng.uniform(1, 2.5), angle=angle + math.pi / 2)
        glare += cv2.GaussianBlur(patch, (0, 0), 0.3 * size) * np.float32(rng.uniform(*settings.reflection_level) / 255)
    if dust.any():
        rgb = rgb * (1 - cv2.GaussianBlur(dust, (0, 0), 2.0).astype(np.float32)[..., None] / 255)
    if glare.any():
        rgb = rgb + glare[..., None] * np.array(_REFLECTION_RGB, np.float32)
    return rgb
