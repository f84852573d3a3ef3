"""The retina in a fundus photograph: find its disc, crop to it, take the uneven light out of it.

A bounding box fails on what cameras do: a wide sensor cuts the disc at top and bottom, an orientation tab sticks out of it,
the black around it is noisy and uneven, a badly lit side fades away. A circle fitted to the part of the rim that can be seen
has the same centre and radius with and without each of these, so that a lesion keeps its size from one camera to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from cv2.typing import MatLike
from PIL import Image

from fastretina.errors import JpegError

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_LONGEST = 400  # px of the longer side on which the disc is looked for: within 0.5 % of its radius, in some milliseconds
_FLAT = 10  # grey levels that a side of one colour varies, by a JPEG and a paper's grain
_SIMILAR = 0.7  # radius of two eyes' discs, one over the other
_SEPARATIONS = (0.1, 0.2, 0.35, 0.5)  # thresholds tried, from the image's dark level (0) to its lit level (1)
_CONTRAST = 4  # grey levels from dark to lit; less cannot be told from noise
_DARK = 16  # grey levels: where nothing is brighter and no disc stands out, nothing was photographed
_TRIPLES = 300  # circles tried through 3 points of an outline; with 30 % of them on the rim, all 300 miss it once in 3,700 images
_POINTS = 200  # of an outline that they are compared with
_NEAR = 0.012  # of the radius: how far from a circle its points lie
_SMALLEST = 0.14  # radius over the frame's shorter side, as of a photograph on a slide ...
_SMALL = 0.2  # ... where an optic disc from nearby may be as large: below that ...
_SHARE_OF_SMALL = 0.8  # ... the rim must be so sharp and so round that this share of the rays meets it
_RAYS = 180  # from the centre across the rim, one every 2 degrees
_SAMPLES = 61  # of the light along a ray
_SEEN = _RAYS // 9  # rays that must meet the rim
_ENOUGH = 0.5  # share at which no other threshold need be tried

_BLUR = 1 / 30  # standard deviation of the local average, of the disc's radius
_GAIN = 4.0
_DEVIATION = 4.0  # px, of the local average as it is computed
_RIM = 0.985  # of the radius: outside lies the blurred rim, which would come out as a black ring


@dataclass(frozen=True)
class Disc:
    """A circle in an image, px; the centre of pixel (row 0, column 0) is x = y = 0."""

    x: float
    y: float
    radius: float


class NoDisc(JpegError):
    """There is no one disc to crop to. `word`: "two eyes", or "whole frame" where no rim is in sight."""

    def __init__(self, word: Literal["two eyes", "whole frame"]) -> None:
        super().__init__(_REASONS[word])
        self.word = word


_REASONS = {
    "two eyes": "this picture shows two eyes or more; cut it into one picture for each eye",
    "whole frame": "no rim of a retina is in sight: the retina fills the whole picture, or this is no fundus photograph",
}


class _Evidence(NamedTuple):
    """What a circle must have to be the retina's."""

    share: float  # of the rays that the frame does not cut: so many meet the rim
    gap: int  # rays in a row: no longer one may miss it


# A disc cut at 3/4 of its radius has 0.52, one with two sides black 0.45, a rectangle up to 0.37; few ellipses pass.
# Less than 120 degrees of arc do not fix a circle.
_OF_THE_LARGEST = _Evidence(0.42, 2 * _RAYS // 3)
# Among all outlines of a picture there soon is an arc that fits: a lid's, a hill's.
_OF_MANY = _Evidence(0.55, _RAYS // 2)


@dataclass(frozen=True)
class _View:
    """What of an image may be retina."""

    light: MatLike  # grey levels, (H, W)
    dark: float  # level of its darkest parts
    lit: float
    contrast: float  # grey levels from dark to lit at least; half of that is lost at a rim


class _Found(NamedTuple):
    disc: Disc
    met: int  # rays that meet the rim
    visible: int  # rays that the frame does not cut


def find_disc(pixels: Pixels) -> Disc:
    """The lit disc in a photograph, uint8 RGB (H, W, 3), which may leave the frame.

    Equal pixels have equal discs: nothing here is left to chance.

    Raises:
        NoDisc: its rim is out of sight, or there is more than one such disc.
        JpegError: there is no retina, the image is dark all over.
    """
    step = math.ceil(max(pixels.shape) / _LONGEST)  # whole, which makes the area filter six times as fast
    height, width = (max(1, side // step) for side in pixels.shape[:2])
    small = cv2.resize(pixels[: height * step, : width * step], (width, height), interpolation=cv2.INTER_AREA)
    plain = _light(small)
    view, found = plain, _search(plain, _largest, _OF_THE_LARGEST)
    if found is None:
        view = _apart_from_surround(small, plain.dark)
        found = _search(view, _large, _OF_MANY)
    if found is None:
        view, found = plain, _search(plain, _large, _OF_MANY)
    if found is None:
        if np.percentile(plain.light, 99) < _DARK:
            raise JpegError("no retina found: the image is dark all over")
        raise NoDisc("whole frame")
    if _shows_another(view, found.disc):
        raise NoDisc("two eyes")
    return Disc((found.disc.x + 0.5) * step - 0.5, (found.disc.y + 0.5) * step - 0.5, found.disc.radius * step)


def _light(pixels: MatLike) -> _View:
    """How light each pixel is, without the worst of the noise."""
    # Red is the retina's brightest and most even channel; red-free photographs have green alone.
    return _view(np.maximum(pixels[..., 0], pixels[..., 1]), _CONTRAST)


def _apart_from_surround(pixels: MatLike, dark: float) -> _View:
    """How far each pixel is from black, from white, and from the colour of each side of the frame that has one colour.

    In it a disc on paper, on a slide or beside a white bar is as lit on dark as on a sensor's black.
    """
    red, green, blue = cv2.split(pixels)
    brightest, dimmest = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    far = cv2.min(brightest, 255 - dimmest)
    for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        colour = np.median(side, axis=0).astype(np.uint8)
        if colour.max() > dark + _FLAT and (np.abs(side.astype(np.int16) - colour).max(axis=1) <= _FLAT).mean() > 0.8:
            red, green, blue = cv2.split(cv2.absdiff(pixels, np.broadcast_to(colour, pixels.shape)))
            far = cv2.min(far, cv2.max(cv2.max(red, green), blue))
    return _view(far, 3 * _CONTRAST)


def _view(values: MatLike, contrast: float) -> _View:
    light = cv2.GaussianBlur(values, (5, 5), 0)
    dark, lit = np.percentile(light, (0.5, 95)).tolist()
    return _View(light, dark, lit, contrast)


def _search(view: _View, outlines_of: Callable[[MatLike], list[Values]], least: _Evidence) -> _Found | None:
    """The circle that most of a rim supports, over the outlines of what is lit at several thresholds."""
    light, dark, best = view.light, view.dark, None
    for separation in _SEPARATIONS if view.lit - dark >= view.contrast else ():
        for outline in outlines_of((light > dark + separation * (view.lit - dark)).astype(np.uint8)):
            if (guess := _circle_of(outline, light.shape)) is None:
                continue
            circle, met, visible = _to_the_rim(view, guess)
            share = _SHARE_OF_SMALL if circle.radius < _SMALL * min(light.shape) else least.share
            if len(met) > share * visible and _longest_gap(met) <= least.gap and len(met) > (best.met if best else _SEEN):
                best = _Found(circle, len(met), visible)
        if best and best.met >= _ENOUGH * best.visible:
            break
    return best


def _shows_another(view: _View, disc: Disc) -> bool:
    """Whether beside `disc` there is another of similar size."""
    height, width = view.light.shape
    if max(disc.x, width - disc.x, disc.y, height - disc.y) < (1 + 1.6 * _SIMILAR) * disc.radius:
        return False  # no room for the smallest, a fifth of it cut by the frame
    light = view.light.copy()
    # Blanked with its rim, which would be a ring.
    cv2.circle(light, (round(disc.x), round(disc.y)), math.ceil(1.05 * disc.radius), view.dark, -1)
    other = _search(replace(view, light=light), _large, _OF_MANY)
    if other is None:
        return False
    apart = math.hypot(other.disc.x - disc.x, other.disc.y - disc.y) > 0.9 * (disc.radius + other.disc.radius)
    return apart and _SIMILAR < other.disc.radius / disc.radius < 1 / _SIMILAR


def _largest(lit: MatLike) -> list[Values]:
    """The outline of the largest region, as (n, 2) points x, y, as far as the frame does not cut it."""
    outlines, _ = cv2.findContours(_opened(lit), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [_uncut(max(outlines, key=cv2.contourArea), lit)] if outlines else []


def _large(lit: MatLike) -> list[Values]:
    """The outlines of the largest regions and of the largest holes in regions."""
    outlines, _ = cv2.findContours(_opened(lit), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    least = 2 * (_SMALLEST * min(lit.shape)) ** 2  # a circle of that radius has 3.1 times its square, one cut at 3/4 has 2.6
    return [_uncut(o, lit) for o in sorted(outlines, key=cv2.contourArea, reverse=True)[:4] if cv2.contourArea(o) > least]


def _opened(lit: MatLike) -> MatLike:
    # Specks of noise are not regions, and a hair over the rim does not tear one apart.
    return cv2.morphologyEx(lit, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))


def _uncut(outline: MatLike, frame: MatLike) -> Values:
    height, width = frame.shape
    points: Values = outline[:, 0].astype(np.float64)
    return points[((points > 2) & (points < (width - 3, height - 3))).all(axis=1)]


def _circle_of(outline: Values, frame: tuple[int, ...]) -> Disc | None:
    """The circle that passes near most points of an outline (RANSAC, Fischler and Bolles 1981), None without points."""
    if len(outline) < 3:
        return None
    points = outline[:: max(1, len(outline) // _POINTS)]
    a, b, c = points[np.random.default_rng(0).integers(len(points), size=(3, _TRIPLES))]
    (bx, by), (cx, cy) = (b - a).T, (c - a).T
    double = 2 * (bx * cy - by * cx)
    drawn = np.abs(double) > 1e-6  # three points on a line have no circle
    (bx, by, cx, cy, double), a = np.stack([bx, by, cx, cy, double])[:, drawn], a[drawn]
    b_square, c_square = bx**2 + by**2, cx**2 + cy**2
    x, y = (cy * b_square - by * c_square) / double, (bx * c_square - cx * b_square) / double
    radius = np.hypot(x, y)
    plausible = (radius > _SMALLEST * min(frame)) & (radius < max(frame))
    if not plausible.any():
        return None
    x, y, radius = (a[:, 0] + x)[plausible], (a[:, 1] + y)[plausible], radius[plausible]
    near = np.abs(np.hypot(points[:, :1] - x, points[:, 1:] - y) - radius) < _NEAR * radius
    best = int(near.sum(axis=0).argmax())
    return Disc(float(x[best]), float(y[best]), float(radius[best]))


def _to_the_rim(view: _View, circle: Disc) -> tuple[Disc, npt.NDArray[np.intp], int]:
    """`circle` moved to where the light falls; the rays that meet the rim there; how many rays the frame does not cut."""
    light, dark, met, visible = view.light, view.dark, np.empty(0, np.intp), 0
    for reach in (0.08, 0.04):  # of the radius, to either side
        angles = np.arange(_RAYS) * (2 * np.pi / _RAYS)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        along = np.linspace(1 - reach, 1 + reach, _SAMPLES) * circle.radius
        x, y = (circle.x + cos * along).astype(np.float32), (circle.y + sin * along).astype(np.float32)
        profile = cv2.remap(light, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float64)
        framed = ((x >= 1) & (x <= light.shape[1] - 2) & (y >= 1) & (y <= light.shape[0] - 2)).all(axis=1)
        visible = int(framed.sum())
        inside, outside = profile[:, : _SAMPLES // 5].mean(axis=1), profile[:, -_SAMPLES // 5 :].mean(axis=1)
        # More than half of the light is lost at a rim; from the middle to a shaded side it falls ten times as gently.
        falls = framed & (inside - outside > view.contrast / 2) & (outside - dark < 0.5 * (inside - dark))
        met = np.flatnonzero(falls)
        if len(met) <= _SEEN:
            break
        # The lit share of a ray ends where the light has fallen to half, however blurred the rim and bright the retina.
        share = ((profile - outside[:, None])[met] / (inside - outside)[met, None]).clip(0, 1).mean(axis=1)
        edge = along[0] + share * (along[-1] - along[0])
        circle, near = _fit(circle, circle.x + cos[met, 0] * edge, circle.y + sin[met, 0] * edge)
        met = met[near]
    return circle, met, visible


def _fit(circle: Disc, x: Values, y: Values) -> tuple[Disc, Flags]:
    """The circle of least squared distances to points, outliers weighted down (Tukey's biweight), and which points are on it."""
    unknowns = np.array([circle.x, circle.y, circle.radius])
    for _ in range(6):  # of Gauss and Newton; the third already changes less than 0.01 px
        dx, dy = x - unknowns[0], y - unknowns[1]
        distance = np.hypot(dx, dy)
        residual = distance - unknowns[2]
        weight = (1 - (residual / max(1.5, 5 * np.median(np.abs(residual)))) ** 2).clip(0)
        jacobian = np.stack([dx / distance, dy / distance, np.ones_like(dx)], axis=1)
        unknowns += np.linalg.lstsq(jacobian * weight[:, None], residual * weight, rcond=None)[0]
    near: Flags = np.abs(np.hypot(x - unknowns[0], y - unknowns[1]) - unknowns[2]) < _NEAR * unknowns[2]
    return Disc(*unknowns.tolist()), near


def _longest_gap(rays: npt.NDArray[np.intp]) -> int:
    if not len(rays):
        return _RAYS
    return int(np.diff(np.append(rays, rays[0] + _RAYS)).max())


def crop_to_disc(pixels: Pixels, disc: Disc, size: int) -> Pixels:
    """The disc's square, uint8 (size, size, 3), scaled with Lanczos; black where it leaves the frame."""
    height, width = pixels.shape[:2]
    scale = size / (2 * disc.radius)
    spans = []
    for middle, side in ((disc.x, width), (disc.y, height)):
        start = middle + 0.5 - disc.radius  # of the square, in px from the frame's edge
        first, end = max(0, math.ceil(-start * scale)), min(size, math.floor((side - start) * scale))
        # The rounding of a product must not take Pillow's box out of the image.
        spans.append((first, max(end, first + 1), max(0.0, start + first / scale), min(float(side), start + end / scale)))
    (left, right, x0, x1), (top, bottom, y0, y1) = spans
    part = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.LANCZOS, box=(x0, y0, x1, y1))
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[top:bottom, left:right] = np.asarray(part)
    return canvas


def local_contrast(pixels: Pixels, disc: Disc | None) -> Pixels:
    """The local average colour subtracted, the rest enlarged 4 times around grey 128; uint8 RGB (H, W, 3), black outside.

    disc: where the retina is; None where it fills the frame.

    B. Graham, "Kaggle Diabetic Retinopathy Detection competition report", University of Warwick, 2015: the solution that won
    it, with its Gaussian of radius / 30 and its gain. It takes out what differs between cameras and people and is no disease:
    the colour of light and pigment, and how it changes across the retina. (Not the exposure: dark photographs stay low in
    contrast.) Two things differ. The average is one of the retina's pixels alone (normalised convolution), so that the rim
    has no bright ring and the outer tenth of the disc, which may hold lesions, need not be cut off. And the outside is black,
    not grey, as are the corners that a rotation turns in.

    Not CLAHE, which equalises histograms tile by tile: what it makes of a lesion depends on where the tiles lie, so that it
    does not commute with a rotation, and it brings out the noise of dark tiles.
    """
    field = _field_of_view(pixels, disc)
    average = _local_average(pixels, field, (disc.radius if disc else max(pixels.shape) / 2) * _BLUR)
    difference = cv2.subtract(pixels, average, dtype=cv2.CV_32F)
    contrast = cv2.addWeighted(difference, _GAIN, difference, 0.0, 128.0, dtype=cv2.CV_8U)  # rounds, and stops at 0 and 255
    contrast[~field] = 0
    return contrast.astype(np.uint8, copy=False)


def _local_average(pixels: Pixels, field: Flags, deviation: float) -> MatLike:
    """(H, W, 3) float32: the average of the field's pixels alone, by a Gaussian of this deviation, px.

    It is too smooth to need every pixel: computed on every second (512 px) it takes a fifth of the time, and what is made of it
    differs by one grey level at most.
    """
    step = max(1, int(deviation / _DEVIATION))
    height, width = field.shape
    shown = field.view(np.uint8)
    values = cv2.merge([*cv2.split(cv2.bitwise_and(pixels, pixels, mask=shown)), shown * np.uint8(255)])
    margin = step * math.ceil(4 * deviation / step)  # beyond it nothing counts; so that the edge is where it was, it comes first
    edges = margin, margin + -height % step, margin, margin + -width % step
    wide = cv2.copyMakeBorder(values, *edges, cv2.BORDER_REFLECT_101).astype(np.float32)
    size = wide.shape[1], wide.shape[0]
    small = cv2.resize(wide, (size[0] // step, size[1] // step), interpolation=cv2.INTER_AREA)
    # Both resizings blur, too: by the variance of a box of `step`, and of a triangle of twice that.
    small = cv2.GaussianBlur(small, (0, 0), math.sqrt(deviation**2 - (step**2 - 1) / 4) / step)
    average = small[..., :3] * (255 / np.maximum(small[..., 3:], 0.255))
    return cv2.resize(average, size, interpolation=cv2.INTER_LINEAR)[margin : margin + height, margin : margin + width]


def _field_of_view(pixels: Pixels, disc: Disc | None) -> Flags:
    """The pixels that show retina, (H, W): those in the disc, apart from what the camera left black of it."""
    view = _light(pixels)
    light, dark, lit = view.light, view.dark, view.lit
    field: MatLike = np.zeros(light.shape, np.uint8)
    above = (light > dark + _SEPARATIONS[0] * (lit - dark)).astype(np.uint8)
    outlines, _ = cv2.findContours(above, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if outlines:
        # Convex: dark lesions and vessels are not holes. Eroded: light leaks over a cut edge, by filtering here and in scaling.
        cv2.fillConvexPoly(field, cv2.convexHull(np.concatenate(outlines)), 1)
        field = cv2.erode(field, np.ones((7, 7), np.uint8))
    if disc is None:
        return field.astype(np.bool_)
    y, x = np.ogrid[: light.shape[0], : light.shape[1]]
    return field.astype(np.bool_) & ((x - disc.x) ** 2 + (y - disc.y) ** 2 < (_RIM * disc.radius) ** 2)
