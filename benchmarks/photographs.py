"""A data set of the real one's size for benchmarks, made in under a minute: 28,100 photographs of a retina, no two alike.

    python benchmarks/photographs.py --out /tmp/train.beton

One real photograph in many rotations and zooms; each sample is one of these with a brightness and a block of noise of its own,
encoded anew: no cache, and no decoder's luck, sees the same bytes twice. Labels have the real grades' proportions. Nothing can be
learnt.
"""

from __future__ import annotations

import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from measure import FULL_TRAIN_SET
from numpy.typing import NDArray

from fastretina.beton.writer import BetonWriter
from fastretina.cli import run

SHARES = np.array([20_655, 1_954, 4_209, 698, 581]) / 28_097  # grades 0-4 of the real train set
VIEWS = 64
QUALITY = 91  # about 43 KB at 512 px, as the real files
BLOCK = 32  # px
CHUNK = 256  # samples under way at a time


@dataclass(frozen=True)
class PhotographSet:
    """Write a .beton of photographs for benchmarks."""

    out: Path
    """The .beton to write."""
    count: int = FULL_TRAIN_SET
    """Samples."""
    size: int = 512
    """Side of the square images, px."""
    seed: int = 0


def views(size: int, seed: int) -> list[NDArray[np.uint8]]:
    """The photograph in 64 rotations and zooms, (size, size, 3) uint8 RGB each."""
    photograph = simplejpeg.decode_jpeg(resources.files("fastretina.sample").joinpath("retina_cc0.jpg").read_bytes())
    side, rng = photograph.shape[0], np.random.default_rng(seed)
    found = []
    for _ in range(VIEWS):
        scale = size / side * rng.uniform(1.0, 1.3)
        matrix = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-180, 180), scale)
        matrix[:, 2] += (size - side) / 2
        found.append(np.asarray(cv2.warpAffine(photograph, matrix, (size, size), flags=cv2.INTER_AREA), np.uint8))
    return found


def sample(number: int, seed: int, pictures: list[NDArray[np.uint8]]) -> bytes:
    """The JPEG of one sample: a pure function of its number and the seed."""
    rng = np.random.default_rng([seed, number])
    image = cv2.convertScaleAbs(pictures[number % VIEWS], alpha=float(rng.uniform(0.95, 1.0)))
    y, x = rng.integers(0, image.shape[0] - BLOCK, 2) if image.shape[0] > BLOCK else (0, 0)
    block = image[y : y + BLOCK, x : x + BLOCK]
    block[:] = np.clip(block + rng.integers(-8, 9, block.shape), 0, 255)
    jpeg: bytes = simplejpeg.encode_jpeg(image, quality=QUALITY, colorsubsampling="420")
    return jpeg


def main(config: PhotographSet) -> None:
    """Write a .beton of photographs for benchmarks."""
    start = time.perf_counter()
    pictures = views(config.size, config.seed)
    labels = np.random.default_rng(config.seed).choice(5, config.count, p=SHARES / SHARES.sum())
    written = 0
    with BetonWriter(config.out, config.count) as writer, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for first in range(0, config.count, CHUNK):
            numbers = range(first, min(first + CHUNK, config.count))
            for number, jpeg in zip(numbers, pool.map(lambda n: sample(n, config.seed, pictures), numbers), strict=True):
                name = f"{number // 2}_{'left' if number % 2 == 0 else 'right'}"
                writer.add(
                    jpeg, zlib.crc32(jpeg), name=name, label=int(labels[number]), id=number, width=config.size, height=config.size
                )
                written += len(jpeg)
        writer.finish({})
    seconds = time.perf_counter() - start
    print(
        f"{config.out}: {config.count:,} images of {config.size} px, {written / config.count / 1e3:.1f} KB each, in {seconds:.1f} s"
    )


if __name__ == "__main__":
    run(PhotographSet, main)
