"""Photographs of any size as a network grades them: each prepared as the packer prepared the training images."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastretina.beton.jpeg import read_header, verdict
from fastretina.errors import JpegError
from fastretina.models.checkpoint import Grader
from fastretina.packing.inspect import read_file
from fastretina.packing.kinds import EXTENSIONS
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.packing.reencode import square

Pixels = npt.NDArray[np.uint8]


@dataclass
class Tally:
    """How many images were graded, and how many could not be."""

    graded: int = 0
    bad: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def throughput(self) -> float:
        """Images graded a second, since the start."""
        return self.graded / max(1e-9, time.perf_counter() - self.started)

    def reject(self, path: Path, reason: str) -> None:
        """Count and report a bad image."""
        self.bad += 1
        print(f"error: {path}: {reason}", file=sys.stderr, flush=True)


def photographs(given: Iterable[Path], tally: Tally) -> Iterator[Path]:
    """The images to grade, folder by folder in the order of names; hidden files and folders are left out."""
    for path in given:
        if not path.is_dir():
            yield path  # whatever it is called; reading it will tell
            continue
        found = False
        walk = os.walk(path, onerror=lambda error: tally.reject(Path(error.filename), error.strerror or "cannot be listed"))
        for folder, folders, names in walk:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    found = True
                    yield Path(folder, name)
        if not found:
            tally.reject(path, f"no image in this folder (looked for {', '.join(EXTENSIONS)})")


def prepared(
    files: Iterable[Path], size: int, workers: int, ahead: int, tally: Tally, preparation: Preparation = UNPREPARED
) -> Iterator[tuple[Path, Pixels]]:
    """(size, size, 3) pixels of each good image, in order, at most `ahead` in memory. Bad ones are reported and left out."""
    waiting: deque[tuple[Path, Future[Pixels]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for path in files:
                waiting.append((path, pool.submit(prepare, path, size, preparation)))
                if len(waiting) >= ahead:
                    yield from _first(waiting, tally)
            while waiting:
                yield from _first(waiting, tally)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _first(waiting: deque[tuple[Path, Future[Pixels]]], tally: Tally) -> Iterator[tuple[Path, Pixels]]:
    path, future = waiting.popleft()
    try:
        yield path, future.result()
    except (JpegError, OSError, MemoryError) as error:
        tally.reject(path, str(error) or "not enough memory to decode it")


def prepare(path: Path, size: int, preparation: Preparation = UNPREPARED) -> Pixels:
    """(size, size, 3) RGB pixels of an image file, as the packer would make them. JpegError for undecodable and malicious ones."""
    data = read_file(str(path))
    if data[:2] == b"\xff\xd8":
        found = verdict(read_header(data), size)
        if found.action == "reject":
            raise JpegError(found.reason)
    return np.asarray(square(data, size, preparation))


def normalised(prepared: Iterator[tuple[Path, Pixels]], grader: Grader, batch_size: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Paths and (B, 3, R, R) float32 images, batch by batch."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (grader.mean, grader.std))
    while batch := list(islice(prepared, batch_size)):
        paths, pixels = zip(*batch, strict=True)
        yield list(paths), (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255.0 - mean) / std
