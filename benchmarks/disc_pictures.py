"""Pictures with a retina's disc of known circle, as they reach a clinic's folder, and pictures that have none.

Each is a pure function of its kind and number. Retinas are the package's photograph, rotated and rescaled, and its sample's painted
ones behind an aperture of known circle; what is around them is drawn. All go through a JPEG once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fastretina.packing.fundus import Disc
from fastretina.sample.camera import CameraSettings, Eye, render
from fastretina.sample.lesions import LesionSettings

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]
Random = np.random.Generator

PHOTO = Disc(705, 705, 696)  # the retina of the package's photograph, as fastretina.sample.retina measured it
_PAINTED = 12  # eyes of the sample
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@cache
def photo() -> Pixels:
    """The real photograph, (1411, 1411, 3)."""
    encoded = (resources.files("fastretina.sample") / "retina_cc0.jpg").read_bytes()
    return np.asarray(simplejpeg.decode_jpeg(encoded), np.uint8)


@cache
def painted(patient: int) -> Pixels:
    """A painted retina that fills its (512, 512, 3), no rim in sight."""
    settings = CameraSettings(overflow=1.0, overflow_radius=(380.0, 380.0), cropped=0.0)
    return np.asarray(render(Eye(5, patient, "left", patient % 5), LesionSettings(), settings), np.uint8)


def retina(rng: Random, width: int, height: int, disc: Disc, surround: float = 0.0) -> Values:
    """A frame (height, width, 3), float32, with a retina at `disc`; around it there is `surround`, a grey level."""
    turn, gain = float(rng.uniform(-180, 180)), rng.uniform(0.55, 1.1)
    if rng.random() < 0.5:
        source, centre, radius = photo(), (PHOTO.x, PHOTO.y), PHOTO.radius
    else:
        source, centre, radius = painted(int(rng.integers(_PAINTED))), (255.5, 255.5), 255.5
    scale = disc.radius / radius
    # Area-averaged first: bilinear samples of a photograph twice as large alias.
    shrink = max(1, int(1 / scale))
    small = cv2.blur(source, (shrink, shrink)) if shrink > 1 else source
    matrix = cv2.getRotationMatrix2D(centre, turn, scale)
    matrix[:, 2] += np.array([disc.x - centre[0], disc.y - centre[1]])
    image = cv2.warpAffine(small, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    open_to = aperture(rng, width, height, disc, tab=source is photo())
    return np.asarray(image * (gain * open_to) + surround * (1 - open_to), np.float32)


def aperture(rng: Random, width: int, height: int, disc: Disc, tab: bool) -> Values:
    """1 inside the disc, 0 outside, (height, width, 1), with a rim of 1 to 3 px. tab: as wide as the photograph's own disc."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    away = np.hypot(x - disc.x, y - disc.y)
    inner = disc.radius * (0.999 if tab else 1.0)
    return np.asarray(((inner - away) / rng.uniform(1, 3) + 0.5).clip(0, 1)[..., None], np.float32)


def anywhere(rng: Random, width: int, height: int, least: float = 0.36, most: float = 0.55) -> Disc:
    """A disc near the middle of a frame; its radius is `least` to `most` of the shorter side: over 0.5 the frame cuts it."""
    radius = min(width, height) * rng.uniform(least, most)
    return Disc(width / 2 + rng.normal(0, 0.03) * width, height / 2 + rng.normal(0, 0.02) * height, radius)


def text(rng: Random, image: Values, x: int, y: int, width: int, height: int, colour: float, size: float) -> None:
    """Lines of letters over a part of an image."""
    step, ink = round(34 * size), np.zeros(image.shape[:2], np.uint8)
    for row in range(y + step, y + height, step):
        letters = "".join(rng.choice(list("abcdefghiklmnoprstuvwxyz 0123456789 OD OS"), max(1, round(width / (18 * size)))))
        cv2.putText(ink[:, x : x + width], letters, (2, row), _FONT, size, 255, max(1, round(2 * size)), cv2.LINE_AA)
    image += (ink[..., None] / np.float32(255)) * (np.float32(colour) - image)


def encoded(image: Values, rng: Random) -> Pixels:
    """What a JPEG of quality 75 to 95 makes of it."""
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.rint(image).clip(0, 255), np.uint8), quality=int(rng.integers(75, 96)), colorspace="RGB"
    )
    return np.asarray(simplejpeg.decode_jpeg(jpeg), np.uint8)


def _size(rng: Random) -> tuple[int, int]:
    width, height = ((800, 600), (900, 600), (640, 640), (1100, 800))[int(rng.integers(4))]
    return width, height


def _background(rng: Random, width: int, height: int) -> Values:
    """A slide or a screen: grey, white or coloured, even or with a gradient or a paper's grain."""
    colour = rng.choice([np.full(3, rng.uniform(40, 250)), rng.uniform(20, 250, 3), np.full(3, 255.0)])
    image = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    how = rng.integers(4)
    if how == 0:
        image = image * np.linspace(rng.uniform(0.6, 1), 1, height, dtype=np.float32)[:, None, None]
    if how == 1:
        image = image + rng.normal(0, rng.uniform(1, 4), (height, width, 1)).astype(np.float32)
    image = np.ascontiguousarray(image)
    if how == 2:  # windows, icons, bars
        for _ in range(rng.integers(2, 9)):
            wide, tall = int(rng.integers(20, width // 2)), int(rng.integers(10, height // 2))
            left, top = int(rng.integers(-20, width - 20)), int(rng.integers(-20, height - 10))
            image[max(0, top) : top + tall, max(0, left) : left + wide] = rng.uniform(0, 255, 3)
    return np.ascontiguousarray(image)


def frame_in_frame(rng: Random) -> tuple[Values, list[Disc]]:
    """A photograph on a slide or a screen, 45 to 92 % as high, with a caption or without."""
    width, height = (960, 540) if rng.random() < 0.5 else (800, 600)
    image = _background(rng, width, height)
    aspect, share = rng.choice([1.0, 4 / 3, 1.5]), rng.uniform(0.45, 0.92)
    high = round(share * height)
    wide = min(round(aspect * high), width - 20)
    left, top = int(rng.integers(5, width - wide - 4)), int(rng.integers(5, height - high - 4))
    disc = anywhere(rng, wide, high)
    image[top : top + high, left : left + wide] = retina(rng, wide, high, disc, rng.uniform(0, 12))
    if top > 60:
        text(rng, image, left, 0, wide, top - 10, float(rng.choice([0, 255])), rng.uniform(0.5, 1))
    return image, [Disc(disc.x + left, disc.y + top, disc.radius)]


def white_surround(rng: Random) -> tuple[Values, list[Disc]]:
    """A disc on white, or on a print's paper."""
    width, height = _size(rng)
    disc = anywhere(rng, width, height)
    paper = rng.uniform(225, 255)
    image = retina(rng, width, height, disc, float(paper))
    if rng.random() < 0.5:
        image += rng.normal(0, rng.uniform(1, 3), (height, width, 1)).astype(np.float32)
    return image, [disc]


def white_bar(rng: Random) -> tuple[Values, list[Disc]]:
    """A photograph with a strip of text at one side or two, 6 to 30 % of the picture, white or light grey."""
    width, height = _size(rng)
    disc = anywhere(rng, width, height)
    image = retina(rng, width, height, disc, rng.uniform(0, 12))
    for side in rng.permutation(4)[: rng.integers(1, 3)]:
        share, light = rng.uniform(0.06, 0.3), rng.choice([255.0, 255.0, rng.uniform(200, 255)])
        tall, wide = (
            (round(share * image.shape[0]), image.shape[1]) if side < 2 else (image.shape[0], round(share * image.shape[1]))
        )
        bar = np.full((tall, wide, 3), light, np.float32)
        if rng.random() < 0.7:
            text(rng, bar, 8, 2, wide - 16, tall - 4, float(rng.uniform(0, 90)), rng.uniform(0.4, 0.9))
        image = np.concatenate([bar, image] if side % 2 == 0 else [image, bar], axis=0 if side < 2 else 1)
        dx, dy = (0, tall if side == 0 else 0) if side < 2 else (wide if side == 2 else 0, 0)
        disc = Disc(disc.x + dx, disc.y + dy, disc.radius)
    return np.ascontiguousarray(image), [disc]


def dark(rng: Random) -> tuple[Values, list[Disc]]:
    """A badly lit eye: 4 to 20 grey levels over an uneven black, with a sensor's noise of 2 to 8."""
    width, height = _size(rng)
    disc = anywhere(rng, width, height)
    eye = retina(rng, width, height, disc)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    eye *= rng.uniform(4, 20) / np.median(eye.max(axis=2)[np.hypot(x - disc.x, y - disc.y) < 0.9 * disc.radius])
    slope = rng.normal(0, 2) * (x / width - 0.5) + rng.normal(0, 2) * (y / height - 0.5)
    eye += (rng.uniform(2, 10) + slope)[..., None]
    eye += rng.normal(0, rng.uniform(2, 8), eye.shape).astype(np.float32)
    return eye, [disc]


def captions(rng: Random) -> tuple[Values, list[Disc]]:
    """Names, dates and a mark in the corners; some reach into the disc."""
    width, height = _size(rng)
    disc = anywhere(rng, width, height)
    image = retina(rng, width, height, disc, rng.uniform(0, 12))
    for corner in rng.permutation(4)[: rng.integers(1, 5)]:
        wide, tall = round(rng.uniform(0.12, 0.3) * width), round(rng.uniform(0.06, 0.2) * height)
        x, y = (width - wide) * int(corner % 2), (height - tall) * int(corner // 2)
        if rng.random() < 0.3:
            image[y : y + tall, x : x + wide] = rng.uniform(0, 255, 3)
        text(rng, image, x, y, wide, tall, float(rng.uniform(120, 255)), rng.uniform(0.4, 0.9))
    return image, [disc]


def two_eyes(rng: Random) -> tuple[Values, list[Disc]]:
    """Two photographs side by side or one above the other, on black, white or a slide, or without any gap."""
    beside = rng.random() < 0.6
    side = int(rng.integers(260, 420))
    wide, tall = (side, round(side * rng.uniform(0.9, 1.1))) if rng.random() < 0.7 else (round(1.3 * side), side)
    gap, border = (int(rng.integers(0, 40)), int(rng.integers(0, 50))) if rng.random() < 0.7 else (0, 0)
    width, height = (2 * wide + gap, tall) if beside else (wide, 2 * tall + gap)
    width, height = width + 2 * border, height + 2 * border
    image = np.zeros((height, width, 3), np.float32) if rng.random() < 0.5 else _background(rng, width, height)
    white = rng.random() < 0.15
    discs = []
    for number in range(2):
        left, top = border + number * (wide + gap) * beside, border + number * (tall + gap) * (not beside)
        disc = anywhere(rng, wide, tall, 0.42, 0.53)
        image[top : top + tall, left : left + wide] = retina(rng, wide, tall, disc, 255.0 if white else rng.uniform(0, 12))
        discs.append(Disc(disc.x + left, disc.y + top, disc.radius))
    return image, discs


def no_rim(rng: Random) -> tuple[Values, list[Disc]]:
    """Nothing but retina, of the photograph or of the sample, in any light."""
    width, height = _size(rng)
    disc = Disc(width / 2, height / 2, 0.53 * float(np.hypot(width, height)))
    image = retina(rng, width, height, Disc(disc.x, disc.y, disc.radius + 0.05 * width)) * np.float32(rng.choice([1, 1, 0.4, 0.2]))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    beam = np.hypot(x - width * rng.uniform(0.2, 0.8), y - height * rng.uniform(0.2, 0.8)) / width
    image *= (1 - rng.uniform(0, 0.8) * beam**2).clip(0.1)[..., None]
    return image + rng.normal(0, rng.uniform(1, 4), image.shape).astype(np.float32), []


def short_arc(rng: Random) -> tuple[Values, list[Disc]]:
    """A corner or an edge of a disc: 60 to 110 degrees of its rim lie in the frame."""
    width, height = _size(rng)
    radius, half = rng.uniform(1.2, 2.0) * height, np.deg2rad(rng.uniform(60, 110)) / 2
    # The arc is seen from below: its chord is as wide as the picture, its height is what shows.
    width = round(2 * radius * np.sin(half))
    height = round(max(120.0, radius * (1 - np.cos(half)) * rng.uniform(1.0, 1.5)))
    scale = 900 / max(width, height)
    width, height, radius = round(width * scale), round(height * scale), radius * scale
    top = rng.uniform(0, 0.1) * height
    image = retina(rng, width, height, Disc(width / 2, radius + top, float(radius)), rng.uniform(0, 10))
    return np.ascontiguousarray(np.rot90(image, int(rng.integers(4)))), []


def landscape(rng: Random) -> tuple[Values, list[Disc]]:
    """Sky, hills, a house: an everyday picture."""
    width, height = _size(rng)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    image = np.array([120, 170, 235], np.float32) * (1 - 0.4 * y / height)[..., None]
    for depth in range(3):
        skyline = height * (0.35 + 0.2 * depth) + sum(
            rng.uniform(10, 60) * np.sin(x[0] / rng.uniform(40, 250) + rng.uniform(0, 6)) for _ in range(3)
        )
        ground = rng.uniform(20, 160, 3).astype(np.float32)
        grain = cv2.resize(rng.normal(1, 0.2, (30, 40)).astype(np.float32), (width, height))
        image = np.where((y > skyline)[..., None], ground * grain[..., None], image)
    wide, tall = int(rng.integers(60, 250)), int(rng.integers(60, 250))
    left, top = int(rng.integers(0, width - wide)), int(rng.integers(0, height - tall))
    image[top : top + tall, left : left + wide] = rng.uniform(60, 250, 3)
    return np.ascontiguousarray(image + rng.normal(0, 3, image.shape), np.float32), []


def page(rng: Random) -> tuple[Values, list[Disc]]:
    """A letter: black on white, with a heading and a box."""
    width, height = 700, 900
    image = np.full((height, width, 3), rng.uniform(230, 255), np.float32)
    text(rng, image, 60, 40, width - 120, int(rng.integers(300, 800)), float(rng.uniform(0, 80)), rng.uniform(0.5, 1.1))
    if rng.random() < 0.5:
        cv2.rectangle(
            image, (60, 600), (int(rng.integers(200, 640)), 850), rng.uniform(0, 255, 3).tolist(), int(rng.choice([-1, 3]))
        )
    return image, []


def tomography(rng: Random) -> tuple[Values, list[Disc]]:
    """A section through a macula: bright, curved layers on a dark, speckled ground."""
    width, height = (900, 400) if rng.random() < 0.5 else (700, 700)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    across = x / width - rng.uniform(0.4, 0.6)
    depth = height * 0.45 + rng.uniform(-200, 200) * across**2 + rng.uniform(0, 60) * np.exp(-((across / 0.08) ** 2))
    image = np.zeros((height, width), np.float32)
    for layer in range(5):
        image += rng.uniform(60, 200) * np.exp(-(((y - depth - layer * 22) / rng.uniform(4, 12)) ** 2))
    image = (image + rng.uniform(10, 40)) * rng.gamma(4, 0.25, image.shape).astype(np.float32)
    return np.repeat(image[..., None], 3, axis=2), []


def shapes(rng: Random) -> tuple[Values, list[Disc]]:
    """A rectangle, an ellipse or a blob, dark or light."""
    width, height = _size(rng)
    light, ground = rng.permutation([rng.uniform(0, 60), rng.uniform(90, 250)])
    image = np.full((height, width, 3), ground, np.float32)
    middle = (round(width / 2), round(height / 2))
    how = int(rng.integers(3))
    if how == 0:
        wide, tall = round(width * rng.uniform(0.25, 0.45)), round(height * rng.uniform(0.25, 0.45))
        cv2.rectangle(image, (middle[0] - wide, middle[1] - tall), (middle[0] + wide, middle[1] + tall), (light,) * 3, -1)
    elif how == 1:
        longer = round(height * rng.uniform(0.3, 0.45))
        cv2.ellipse(
            image, middle, (longer, round(longer * rng.uniform(0.5, 0.85))), float(rng.uniform(0, 180)), 0, 360, (light,) * 3, -1
        )
    else:
        blob = cv2.resize(rng.normal(0, 1, (5, 7)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        image = np.where(blob[..., None] > 0, np.float32(light), np.float32(ground)) * np.ones(3, np.float32)
    return np.ascontiguousarray(image + rng.normal(0, 2, image.shape), np.float32), []


def front_of_the_eye(rng: Random) -> tuple[Values, list[Disc]]:
    """Lids, the white of the eye, iris and pupil."""
    width, height = _size(rng)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    skin = np.array([rng.uniform(150, 230), rng.uniform(110, 160), rng.uniform(80, 130)], np.float32)
    white = np.array([rng.uniform(190, 250), rng.uniform(170, 225), rng.uniform(165, 225)], np.float32)
    iris = rng.choice([np.array([90, 60, 35]), np.array([100, 130, 150]), np.array([60, 40, 30])]).astype(np.float32)
    across, up = (x - width / 2) / (0.48 * width), (y - height / 2) / height
    image = np.where((np.abs(up) < rng.uniform(0.25, 0.45) * (1 - across**2))[..., None], white, skin)
    radius = rng.uniform(0.2, 0.36) * height
    away = np.hypot(x - width * rng.uniform(0.4, 0.6), y - height / 2)
    grain = cv2.resize(rng.normal(1, 0.15, (60, 80)).astype(np.float32), (width, height))[..., None]
    open_lids = (image == white).all(axis=2)
    image = np.where(((away < radius) & open_lids)[..., None], iris * grain, image)
    image = np.where(((away < rng.uniform(0.2, 0.6) * radius) & open_lids)[..., None], np.float32(12), image)
    return np.ascontiguousarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 3)), np.float32), []


WITH_DISC: dict[str, Callable[[Random], tuple[Values, list[Disc]]]] = {
    "frame in frame": frame_in_frame,
    "white surround": white_surround,
    "white bar": white_bar,
    "dark": dark,
    "captions": captions,
}
NO_DISC: dict[str, Callable[[Random], tuple[Values, list[Disc]]]] = {
    "no rim": no_rim,
    "short arc": short_arc,
    "landscape": landscape,
    "page": page,
    "tomography": tomography,
    "front of the eye": front_of_the_eye,
    "shapes": shapes,
}
KINDS = WITH_DISC | {"two eyes": two_eyes} | NO_DISC


def picture(kind: str, number: int) -> tuple[Pixels, list[Disc]]:
    """The picture, uint8 RGB (H, W, 3), and the discs that it shows: one, two or none."""
    rng = np.random.default_rng((number, list(KINDS).index(kind)))
    image, discs = KINDS[kind](rng)
    return encoded(image, rng), discs
