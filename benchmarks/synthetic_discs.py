"""Photographs of a synthetic disc of known circle, with what cameras do to it: dark, off-centre, cut, notched, banded, noisy."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from fastretina.packing.fundus import Disc

KINDS = ("plain", "dark", "off-centre", "overflow", "wide sensor", "notch", "bands", "uneven noise")


def synthetic(kind: str, seed: int) -> tuple[NDArray[np.uint8], Disc]:
    """A photograph of a disc with vignette, mottle, optic disc and haemorrhages, and the circle that it was drawn with."""
    rng = np.random.default_rng((seed, KINDS.index(kind)))
    width, height = [(480, 360), (600, 400), (420, 420), (400, 600)][rng.integers(4)]
    radius = min(width, height) * rng.uniform(0.3, 0.49)
    if kind == "overflow":
        radius = min(width, height) * rng.uniform(0.505, 0.58)
    if kind == "wide sensor":
        radius = height * rng.uniform(0.55, 0.7)
        width = round(2.2 * radius)
    cx, cy = width / 2 + rng.normal(0, 2), height / 2 + rng.normal(0, 2)
    if kind == "off-centre":
        cx, cy = cx + rng.uniform(-0.3, 0.3) * width, cy + rng.uniform(-0.3, 0.3) * height
    y, x = np.mgrid[:height, :width].astype(np.float32)
    away = np.hypot(x - cx, y - cy)
    beam = np.hypot(x - cx - rng.normal(0, 0.15 * radius), y - cy - rng.normal(0, 0.15 * radius)) / radius
    mottle = cv2.resize(rng.normal(0, 0.06, (24, 24)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    level = rng.uniform(14, 40) if kind == "dark" else rng.uniform(60, 200)
    light = level * (1 - rng.uniform(0.1, 0.5) * beam**2.5).clip(0.15) * (1 + mottle)

    def at(distance: float) -> NDArray[np.float64]:
        turn = rng.uniform(0, 2 * np.pi)
        return np.asarray(np.hypot(x - cx - distance * np.cos(turn), y - cy - distance * np.sin(turn)))

    light = np.where(at(0.45 * radius) < 0.13 * radius, (1.7 * light).clip(0, 250), light)
    for _ in range(rng.integers(6)):
        light = np.where(at(radius * np.sqrt(rng.random())) < rng.uniform(0.02, 0.1) * radius, 0.35 * light, light)
    aperture = ((radius - away) / rng.uniform(0.5, 3) + 0.5).clip(0, 1)
    if kind == "notch":
        aperture = np.maximum(aperture, (0.04 * radius - at(radius) + 0.5).clip(0, 1))
    if kind == "bands":
        aperture = aperture * (np.abs(y - cy) < rng.uniform(0.75, 0.95) * radius)
    black = np.zeros_like(light)
    if kind == "uneven noise":
        slope = (x / width - 0.5) * rng.normal() + (y / height - 0.5) * rng.normal()
        black = rng.uniform(0, 8) + rng.uniform(0, 14) * (0.5 + 0.5 * slope).clip(0, 1)
    pixels = (light * aperture)[..., None] * [1, 0.45, 0.25] + black[..., None]
    pixels += rng.normal(0, rng.uniform(1, 8 if kind == "uneven noise" else 4), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8), Disc(cx, cy, radius)
