"""Photographs the painted retina: pose, field of view, pigment, light, focus, sensor, JPEG. One image from one seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from fastretina.sample.distractors import NO_DISTRACTORS, DistractorSettings, cross_lens, paint_on_retina
from fastretina.sample.lesions import LesionSettings, Range, View, paint_lesions
from fastretina.sample.retina import CENTRE, RADIUS, Image, healthy_retina

SIDE = 512  # of an image, px
SMALLEST, LARGEST = 20_000, 60_000  # bytes of a JPEG file
_GRID = 24  # side of the coarse grids of light, pigment and warp, which are enlarged to the image


@dataclass(frozen=True)
class CameraSettings:
    """How much photographs differ. Another difficulty or another clinic is another instance."""

    field_radius: Range = (238.0, 256.0)  # of the lit disc, image px
    overflow: float = 0.2  # share of photographs whose disc is wider than the image
    overflow_radius: Range = (256.0, 290.0)
    cropped: float = 0.2  # share with top and bottom cut to black, as by a wide sensor
    notch: float = 0.4  # share with the camera's orientation tab
    zoom: Range = (1.03, 1.3)  # radius of the photographed retina over that of the field
    tilt: float = 7.0  # standard deviation of the rotation, degrees
    any_angle: float = 0.1  # share rotated by anything up to 180 degrees
    elastic: float = 7.0  # standard deviation of the smooth warp that gives each eye its own vessels, canvas px
    red: Range = (118.0, 215.0)  # typical level of the red channel, grey levels
    green_of_red: Range = (0.32, 0.5)
    blue_of_green: Range = (0.3, 0.75)
    highlight: Range = (1.28, 1.5)  # level of white objects (exudates, optic disc) over the typical level of the red channel
    vignette: Range = (0.1, 0.45)  # light lost at the rim
    mottle: float = 0.035  # standard deviation of the patches of pigment
    blur: Range = (0.0, 1.0)  # standard deviation of the lens's blur, image px
    noise: Range = (1.5, 4.5)  # standard deviation of the sensor's noise, grey levels
    quality: tuple[int, int] = (86, 93)  # of the JPEG


@dataclass(frozen=True)
class Eye:
    """One photograph to make. Equal eyes give equal bytes."""

    seed: int
    patient: int
    side: str  # "left" or "right"
    grade: int  # 0-4

    @property
    def name(self) -> str:
        return f"{self.patient}_{self.side}"


def photograph(
    eye: Eye, lesions: LesionSettings, camera: CameraSettings, distractors: DistractorSettings = NO_DISTRACTORS
) -> bytes:
    """The eye's baseline JPEG, 512 x 512, 4:2:0, of 20,000 to 60,000 bytes as far as qualities 50-99 reach."""
    rgb = render(eye, lesions, camera, distractors)
    quality = int(_stream(eye, "jpeg").integers(*camera.quality, endpoint=True))
    while True:
        encoded: bytes = simplejpeg.encode_jpeg(rgb, quality=quality, colorspace="RGB", colorsubsampling="420")
        if SMALLEST <= len(encoded) <= LARGEST or not 50 < quality < 99:
            return encoded
        quality += 2 if len(encoded) < SMALLEST else -2


def render(eye: Eye, lesions: LesionSettings, camera: CameraSettings, distractors: DistractorSettings = NO_DISTRACTORS) -> Image:
    """The eye's photograph, uint8 RGB (512, 512, 3). Eyes that differ in grade alone differ in their lesions alone."""
    person = np.random.default_rng((eye.seed, eye.patient))
    pigment = _pigment(person, camera)
    shot = _stream(eye, "shot")
    radius = shot.uniform(*(camera.overflow_radius if shot.random() < camera.overflow else camera.field_radius))
    zoom = shot.uniform(*camera.zoom)
    heading, distance = shot.uniform(0, math.tau), RADIUS * (1 - 1 / zoom) * shot.random()
    view = View(CENTRE + distance * math.cos(heading), CENTRE + distance * math.sin(heading), RADIUS / zoom)

    ungraded = _stream(eye, "distractors")
    canvas = paint_on_retina(healthy_retina(), view, ungraded, distractors)
    if eye.grade > 0:
        canvas = paint_lesions(canvas, eye.grade, view, _stream(eye, "lesions"), lesions)
    x, y = _warp(shot, view, view.radius / radius, eye.side == "right", camera)
    rgb = cv2.remap(canvas, x, y, cv2.INTER_LINEAR)
    if (sigma := shot.uniform(*camera.blur)) > 0.3:  # narrower than that, the kernel is a single pixel
        rgb = cv2.GaussianBlur(rgb, (0, 0), sigma)
    rgb = cv2.LUT(rgb, _tone_curves(pigment * shot.uniform(0.9, 1.1), shot.uniform(*camera.highlight)))
    rgb = cv2.multiply(rgb, _light(shot, radius, camera), dtype=cv2.CV_32F)
    rgb = cross_lens(rgb, radius, ungraded, distractors)
    grain = shot.standard_normal((SIDE, SIDE), np.float32) * np.float32(shot.uniform(*camera.noise))
    rgb = cv2.add(rgb, cv2.merge([grain] * 3), dtype=cv2.CV_8U)
    return cv2.multiply(rgb, cv2.merge([_aperture(shot, radius, camera)] * 3), scale=1 / 255)


_STREAMS = {"shot": 1, "lesions": 2, "jpeg": 3, "distractors": 4}


def _stream(eye: Eye, name: str) -> np.random.Generator:
    """Random numbers of its own for each use, so that painting more lesions does not change the pose."""
    return np.random.default_rng((eye.seed, eye.patient, int(eye.side == "right"), _STREAMS[name]))


def _pigment(person: np.random.Generator, camera: CameraSettings) -> npt.NDArray[np.float64]:
    """The typical (R, G, B) of a person's retina in grey levels: both eyes share it."""
    red = person.uniform(*camera.red)
    green = red * person.uniform(*camera.green_of_red)
    return np.array([red, green, green * person.uniform(*camera.blue_of_green)])


def _tone_curves(typical: npt.NDArray[np.float64], highlight: float) -> Image:
    """Lookup table (1, 256, 3): power curves that take the photograph's own typical colour to `typical`, and white to cream.

    Through both points, because a gain alone turns the optic disc and exudates of dark retinas green.
    """
    own = np.array([202.0, 78.0, 57.0])  # median of the photograph's retina
    white = typical[0] * highlight * np.array([1, 0.88, 0.62])
    gamma = np.log(white / typical) / np.log(255 / own)
    curves: Image = np.rint(white * (np.arange(256)[None, :, None] / 255) ** gamma).clip(0, 255).astype(np.uint8)
    return curves


def _warp(shot: np.random.Generator, view: View, scale: float, flip: bool, camera: CameraSettings) -> tuple[Image, Image]:
    """For each image pixel the (x, y) of the canvas that it shows; two float32 (512, 512). `scale` is canvas px an image px."""
    angle = shot.uniform(-180, 180) if shot.random() < camera.any_angle else shot.normal(0, camera.tilt)
    cos, sin = scale * math.cos(math.radians(angle)), scale * math.sin(math.radians(angle))
    u, v = _pixels()
    if flip:
        u = -u
    # A grid of 6 x 6 bends whole vessels; a finer one would make them wriggle.
    bend = shot.normal(0, camera.elastic, (6, 6, 2)).astype(np.float32)
    elastic = cv2.resize(bend, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    x = np.float32(cos) * u - np.float32(sin) * v + elastic[..., 0] + np.float32(view.x)
    y = np.float32(sin) * u + np.float32(cos) * v + elastic[..., 1] + np.float32(view.y)
    return x, y


@cache
def _pixels() -> tuple[Image, Image]:
    """(u, v) of each pixel's centre from the image's centre."""
    v, u = np.mgrid[:SIDE, :SIDE].astype(np.float32) - np.float32((SIDE - 1) / 2)
    return u, v


def _light(shot: np.random.Generator, radius: float, camera: CameraSettings) -> Image:
    """What each pixel's colour is multiplied by: vignette, a beam off the axis, patches of pigment. float32 (512, 512, 3)."""
    v, u = (np.mgrid[:_GRID, :_GRID] + 0.5) * (SIDE / _GRID) - SIDE / 2
    beam = shot.normal(0, 0.18 * radius, 2)
    r = np.hypot(u - beam[0], v - beam[1]) / radius
    light = 1.06 - shot.uniform(*camera.vignette) * r**2.5
    patches = cv2.resize(shot.normal(0, camera.mottle, (8, 8)), (_GRID, _GRID), interpolation=cv2.INTER_CUBIC)
    # Melanin takes green and blue more than red.
    coarse = light[..., None] * np.exp(patches[..., None] * np.array([0.7, 1.3, 1.5]))
    return cv2.resize(np.asarray(coarse, np.float32), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)


def _aperture(shot: np.random.Generator, radius: float, camera: CameraSettings) -> Image:
    """Where light falls, uint8 (512, 512): the disc, perhaps cut at top and bottom, perhaps with an orientation tab."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    bits, middle = 4, (SIDE - 1) / 2
    cx, cy = middle + shot.normal(0, 1.5, 2)
    if shot.random() < camera.notch:
        angle = math.radians(shot.choice((-45, 0, 45)) + shot.normal(0, 2))
        at = (round(16 * (cx + radius * math.cos(angle))), round(16 * (cy + radius * math.sin(angle))))
        cv2.circle(mask, at, round(16 * 0.035 * radius), 255, cv2.FILLED, cv2.LINE_AA, bits)
    cv2.circle(mask, (round(16 * cx), round(16 * cy)), round(16 * radius), 255, cv2.FILLED, cv2.LINE_AA, bits)
    if shot.random() < camera.cropped:
        cut = round(middle - shot.uniform(0.78, 0.93) * radius)
        mask[: max(cut, 0)] = 0
        mask[SIDE - max(cut, 0) :] = 0
    return cv2.GaussianBlur(mask, (0, 0), 0.9)
