"""Paints the lesions of diabetic retinopathy, by grade, onto the retina's canvas.

All lesions are vector shapes drawn into four uint8 layers, then composed in one pass each: blood darkens by
Beer-Lambert (green and blue far more than red), exudates and cotton-wool spots cover. Painting on the canvas, before
the camera's warp, makes the lesions follow pose, flip, colour, focus and exposure by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from fastretina.sample.retina import ARCADES, CANVAS, DISC_DIAMETER, OPTIC_DISC, Image

Range = tuple[float, float]
Counts = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
Point = tuple[float, float]


@dataclass(frozen=True)
class LesionSettings:
    """How many lesions of each kind a grade has, how large and how plain. Another difficulty is another instance.

    Counts are inclusive ranges for the grades 0-4. Lengths are canvas px (about 16 µm each, see `fastretina.sample.retina`).
    """

    microaneurysms: Counts = ((0, 0), (7, 13), (9, 18), (15, 28), (12, 24))
    haemorrhages: Counts = ((0, 0), (0, 0), (5, 10), (20, 32), (12, 24))  # dot and blot
    flames: Counts = ((0, 0), (0, 0), (0, 2), (6, 11), (3, 8))
    exudates: Counts = ((0, 0), (0, 0), (2, 4), (2, 5), (2, 4))  # clusters and circinate rings
    cotton_wool: Counts = ((0, 0), (0, 0), (0, 0), (4, 7), (1, 4))
    tufts: Counts = ((0, 0), (0, 0), (0, 0), (0, 0), (3, 6))  # neovascular
    preretinal: Counts = ((0, 0), (0, 0), (0, 0), (0, 0), (1, 2))  # boat-shaped haemorrhages

    microaneurysm_radius: Range = (2.5, 3.9)  # up to 125 µm across
    haemorrhage_radius: Range = (4.0, 13.0)
    flame_length: Range = (22.0, 52.0)
    exudate_flecks: Range = (14, 34)  # number in one cluster
    exudate_radius: Range = (1.2, 4.4)  # of one fleck
    exudate_spread: Range = (11.0, 26.0)  # standard deviation of a cluster; a circinate ring is wider
    cotton_wool_radius: Range = (11.0, 21.0)
    tuft_radius: Range = (28.0, 55.0)
    preretinal_radius: Range = (42.0, 80.0)

    tuft_density: Range = (0.4, 0.7)  # the next four: share of the optical density of thick blood
    microaneurysm_density: Range = (0.75, 1.0)
    preretinal_density: Range = (0.85, 1.0)
    blood_density: Range = (0.55, 1.0)  # of all other blood
    exudate_alpha: Range = (0.6, 0.95)  # share of the retina that a fleck hides
    cotton_wool_alpha: Range = (0.5, 0.8)
    softness: float = 1.4  # standard deviation of the blur of blood's edges, px


@dataclass(frozen=True)
class View:
    """The circle of the retina that the camera sees: lesions are painted here and nowhere else. Canvas px."""

    x: float
    y: float
    radius: float

    def holds(self, point: Point, margin: float) -> bool:
        return math.hypot(point[0] - self.x, point[1] - self.y) <= self.radius - margin


def paint_lesions(canvas: Image, grade: int, view: View, rng: np.random.Generator, settings: LesionSettings) -> Image:
    """A copy of `canvas`, uint8 RGB (768, 768, 3), with the lesions of `grade` (0-4) inside `view`."""
    painter = _Painter(rng, view, settings)
    painter.draw(grade)
    return painter.compose(canvas)


# Natural-log optical density of thick blood over R, G, B: haemoglobin takes green and blue and lets red through.
_BLOOD_DENSITY = np.array([0.32, 1.25, 0.75])
_TRANSMISSION = np.rint(255 * np.exp(-np.arange(256)[None, :, None] / 255 * _BLOOD_DENSITY)).astype(np.uint8)
_EXUDATE_RGB = (252, 226, 140)  # on the canvas, whose healthy retina is about (205, 80, 58)
_COTTON_WOOL_RGB = (245, 205, 170)

_BITS = 4  # cv2 draws at 1/16 px
_THETA = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_HARMONICS = np.arange(2, 6)


class _Painter:
    """Four uint8 layers (768, 768) of opacity, and one method a kind of lesion that draws into them."""

    def __init__(self, rng: np.random.Generator, view: View, settings: LesionSettings) -> None:
        self.rng, self.view, self.settings = rng, view, settings
        self.blood, self.vessels, self.exudate, self.cotton = (np.zeros((CANVAS, CANVAS), np.uint8) for _ in range(4))
        self.phase = rng.uniform(0, math.tau)

    def draw(self, grade: int) -> None:
        s = self.settings
        for counts, draw_one in (
            (s.exudates, self.draw_exudates),
            (s.cotton_wool, self.draw_cotton_wool),
            (s.microaneurysms, self.draw_microaneurysm),
            (s.haemorrhages, self.draw_haemorrhage),
            (s.flames, self.draw_flame),
            (s.tufts, self.draw_tuft),
            (s.preretinal, self.draw_preretinal),
        ):
            for i in range(int(self.rng.integers(*counts[grade], endpoint=True))):
                draw_one(i)

    def compose(self, canvas: Image) -> Image:
        grain = cv2.resize(self.rng.normal(1, 0.13, (CANVAS // 6, CANVAS // 6)).astype(np.float32), (CANVAS, CANVAS))
        blood = cv2.multiply(cv2.GaussianBlur(self.blood, (0, 0), self.settings.softness), grain, dtype=cv2.CV_8U)
        if self.vessels.any():
            blood = cv2.max(blood, cv2.GaussianBlur(self.vessels, (0, 0), 0.5))
        if self.exudate.any():
            # Exudates lie deep in the retina: blood hides them.
            canvas = cover(canvas, cv2.subtract(cv2.GaussianBlur(self.exudate, (0, 0), 0.7), blood), _EXUDATE_RGB)
        if self.cotton.any():
            fluff = cv2.multiply(cv2.GaussianBlur(self.cotton, (0, 0), 5), grain, dtype=cv2.CV_8U)
            canvas = cover(canvas, fluff, _COTTON_WOOL_RGB)
        return cv2.multiply(canvas, cv2.LUT(cv2.merge([blood] * 3), _TRANSMISSION), scale=1 / 255)

    def draw_microaneurysm(self, i: int) -> None:
        at, radius, opacity = self.place(i), self.uniform("microaneurysm_radius"), self.opacity("microaneurysm_density")
        fill_blob(self.blood, self.rng, at, radius, opacity, roughness=0.1)

    def draw_haemorrhage(self, i: int) -> None:
        low, high = self.settings.haemorrhage_radius
        radius = low + (high - low) * self.rng.random() ** 1.7  # small dots are commoner than large blots
        at, opacity = self.place(i), self.opacity("blood_density")
        fill_blob(self.blood, self.rng, at, radius, opacity, roughness=0.4, stretch=self.rng.uniform(1, 1.6))

    def draw_flame(self, i: int) -> None:
        """Blood between nerve fibres: a sheaf of tapered streaks along the fibres, which fan out from the optic disc."""
        x, y = self.place(i)
        fibre = math.atan2(y - OPTIC_DISC[1], x - OPTIC_DISC[0]) + self.rng.normal(0, 0.2)
        length, opacity = self.uniform("flame_length"), self.opacity("blood_density")
        for _ in range(11):
            along, across = self.rng.normal(0, 0.15) * length, self.rng.normal(0, 0.07) * length
            at = (x + along * math.cos(fibre) - across * math.sin(fibre), y + along * math.sin(fibre) + across * math.cos(fibre))
            half = length * self.rng.uniform(0.2, 0.45)
            heading = fibre + self.rng.normal(0, 0.07)
            fill_blob(self.blood, self.rng, at, 0.08 * half, opacity, roughness=0.2, stretch=12, angle=heading)

    def draw_exudates(self, i: int) -> None:
        """A cluster of waxy flecks, or (one in three) a circinate ring of them around a leaking vessel."""
        x, y = self.place(i, margin=40)
        spread = self.uniform("exudate_spread")
        flecks = int(self.uniform("exudate_flecks"))
        radius = spread * self.rng.uniform(0.2, 1.8, flecks)
        angle = self.rng.uniform(0, math.tau, flecks)
        if self.rng.random() < 1 / 3:
            radius = 1.6 * spread * self.rng.normal(1, 0.1, flecks)
            angle = self.rng.uniform(0, math.tau) + self.rng.uniform(0, 5, flecks)  # an arc of 5 rad: rings are seldom closed
        low, high = self.settings.exudate_radius
        size = low + (high - low) * self.rng.random(flecks) ** 2
        for r, a, s in zip(radius, angle, size, strict=True):
            at = (x + r * math.cos(a), y + r * math.sin(a))
            fill_blob(self.exudate, self.rng, at, s, self.opacity("exudate_alpha"), roughness=0.6, stretch=self.rng.uniform(1, 1.8))

    def draw_cotton_wool(self, i: int) -> None:
        """A swollen patch of the nerve-fibre layer: white, fluffy, two or three lobes."""
        x, y = self.place(i, margin=25)
        radius = self.uniform("cotton_wool_radius")
        for _ in range(3):
            at = (x + self.rng.normal(0, 0.4) * radius, y + self.rng.normal(0, 0.4) * radius)
            fill_blob(self.cotton, self.rng, at, 0.75 * radius, self.opacity("cotton_wool_alpha"), roughness=0.4, stretch=1.4)

    def draw_tuft(self, i: int) -> None:
        """New vessels: fine, curling, branching, from the optic disc (the first, if in view) or from an arcade."""
        sites = [site for site in (OPTIC_DISC, *ARCADES) if self.view.holds(site, margin=20)] or [(self.view.x, self.view.y)]
        x, y = sites[0] if i == 0 else sites[int(self.rng.integers(len(sites)))]
        radius, opacity = self.uniform("tuft_radius"), self.opacity("tuft_density")
        step = radius / 14
        # A sea fan: stems leave a short piece of the parent vessel, mostly to one side of it.
        fan = self.rng.uniform(0, math.tau)
        roots = self.rng.normal(0, 0.22 * radius, (12, 2)) + np.array((x, y))
        shoots = [(*root, fan + self.rng.normal(0, 1.1), int(self.rng.integers(8, 20))) for root in roots]
        while shoots:
            x, y, heading, left = shoots.pop()
            bend, path = self.rng.normal(0, 0.2), [(x, y)]
            while left > 0:
                heading += bend + self.rng.normal(0, 0.35)
                x, y, left = x + step * math.cos(heading), y + step * math.sin(heading), left - 1
                path.append((x, y))
                if self.rng.random() < 0.1:
                    shoots.append((x, y, heading + self.rng.choice((-0.8, 0.8)), left - 1))
            thickness = 2 if self.rng.random() < 0.25 else 1
            cv2.polylines(self.vessels, [_fixed_point(path)], False, opacity, thickness, cv2.LINE_AA, _BITS)

    def draw_preretinal(self, i: int) -> None:
        """Blood before the retina, settled by gravity: a boat with a level top and a rounded keel."""
        x, y = self.place(i, margin=60)
        radius, depth = self.uniform("preretinal_radius"), self.rng.uniform(0.4, 0.75)
        theta = np.linspace(0, np.pi, 40)
        wobble = 1 + 0.03 * np.cos(_HARMONICS[:, None] * theta + self.rng.uniform(0, math.tau, (4, 1))).sum(0)
        keel = np.stack([x + wobble * radius * np.cos(theta), y + wobble * depth * radius * np.sin(theta)], 1)
        _fill_polygon(self.blood, keel, self.opacity("preretinal_density"))

    def uniform(self, name: str) -> float:
        return float(self.rng.uniform(*getattr(self.settings, name)))

    def opacity(self, name: str) -> int:
        return round(255 * self.uniform(name))

    def place(self, i: int, margin: float = 14.0) -> Point:
        """A point in view, off the optic disc; successive i take successive quadrants, so that many lesions reach all four."""
        while True:
            angle = self.phase + (i + self.rng.random()) * math.pi / 2
            r = (self.view.radius - margin) * math.sqrt(self.rng.random())
            x, y = self.view.x + r * math.cos(angle), self.view.y + r * math.sin(angle)
            if math.hypot(x - OPTIC_DISC[0], y - OPTIC_DISC[1]) > 0.65 * DISC_DIAMETER:
                return x, y


def fill_blob(
    layer: Image,
    rng: np.random.Generator,
    at: Point,
    radius: float,
    opacity: int,
    roughness: float,
    stretch: float = 1,
    angle: float | None = None,
) -> None:
    """Fill a blob: a circle whose radius wobbles by `roughness`, made `stretch` times as long in direction `angle` (any)."""
    angle = rng.uniform(0, math.tau) if angle is None else angle
    waves = np.cos(_HARMONICS[:, None] * _THETA + rng.uniform(0, math.tau, (4, 1))) / _HARMONICS[:, None]
    r = radius * (1 + roughness * waves.sum(0))
    along, across = stretch * r * np.cos(_THETA), r * np.sin(_THETA)
    x, y = along * math.cos(angle) - across * math.sin(angle), along * math.sin(angle) + across * math.cos(angle)
    _fill_polygon(layer, np.stack([at[0] + x, at[1] + y], 1), opacity)


def _fill_polygon(layer: Image, outline: npt.NDArray[np.float64], opacity: int) -> None:
    cv2.fillPoly(layer, [_fixed_point(outline)], opacity, cv2.LINE_AA, _BITS)


def _fixed_point(points: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Points (n, 2) in px as cv2 draws them with `_BITS` bits below the point."""
    return np.rint(np.asarray(points, np.float64) * (1 << _BITS)).astype(np.int32)


def cover(canvas: Image, alpha: Image, rgb: tuple[int, int, int]) -> Image:
    """`canvas` under a paint of one colour; alpha uint8 (768, 768). In uint8 throughout: 5 times as fast as in float."""
    paint = np.rint(np.arange(256)[None, :, None] / 255 * np.array(rgb)).astype(np.uint8)
    opacity = cv2.merge([alpha] * 3)
    return cv2.add(cv2.multiply(canvas, cv2.bitwise_not(opacity), scale=1 / 255), cv2.LUT(opacity, paint))
