"""What the tests of the Loader are made with."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from fastretina.beton.writer import BetonWriter
from fastretina.loading.batches import Batch
from fastretina.loading.loader import Loader

SIDE, COUNT = 64, 150


def write(path: Path, count: int = COUNT, side: int = SIDE, width: int | None = None, seed: int = 0) -> Path:
    """A .beton of `count` images of coloured noise; sample n's id is 3 n + 1."""
    rng = np.random.default_rng(seed)
    with BetonWriter(path, count) as writer:
        for n in range(count):
            coarse = rng.integers(0, 255, (side // 8, (width or side) // 8, 3), dtype=np.uint8)
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(np.kron(coarse, np.ones((8, 8, 1), np.uint8))), quality=90)
            writer.add(jpeg, zlib.crc32(jpeg), name=f"{n}_left", label=n % 5, id=3 * n + 1, width=width or side, height=side)
        writer.finish({})
    return path


def threads() -> int:
    """Of this process, those that Python does not know among them."""
    return len(list(Path("/proc/self/task").iterdir()))


def settled(count: int) -> bool:
    """Whether there are no more threads than these soon: those of a forgotten loader end by themselves."""
    deadline = time.monotonic() + 30
    while threads() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads() <= count


def kwargs(**changes):
    return {"batch_size": 16, "resolution": SIDE, "workers": 2, "seed": 5} | changes


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.ids, b.ids)


def epoch(path: Path, **changes) -> list[Batch]:
    with Loader(path, **kwargs(**changes)) as loader:
        return list(loader)
