"""Photographs of any size as a network grades them: each prepared as the packer prepared the training images."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastretina.errors import JpegError, printable
from fastretina.models.checkpoint import Grader
from fastretina.packing.folder import walk
from fastretina.packing.inspect import read_file
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.packing.reencode import square

Pixels = npt.NDArray[np.uint8]


@dataclass
class Tally:
    """How many images were graded, how many could not be, and what lay beside them, by kind."""

    graded: int = 0
    bad: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.perf_counter)

    @property
    def throughput(self) -> float:
        """Images graded a second, since the start."""
        return self.graded / max(1e-9, time.perf_counter() - self.started)


class Photograph(NamedTuple):
    """Either `pixels`, (size, size, 3) uint8 RGB, and what was `done` to it; or an `error`, which prevents it."""

    path: Path
    pixels: Pixels | None = None
    done: tuple[str, ...] = ()
    error: str = ""


def photographs(given: Iterable[Path], tally: Tally, follow_links: bool = False) -> list[Photograph]:
    """Those to grade, without pixels, folder by folder in the order of names; a folder where there are none, with its error."""
    found = []
    for path in given:
        if not path.is_dir():
            found.append(Photograph(path))  # whatever it is called; reading it will tell
            continue
        folder = walk(path, follow_links)
        tally.left_out += folder.left_out
        found += [Photograph(Path(image)) for image in folder.images]
        found += [Photograph(place, error=f"cannot be searched: {reason}") for place, reason in folder.unlisted]
        if not folder.images and not folder.unlisted:
            found.append(Photograph(path, error="no photograph in this folder"))
    return found


def prepared(
    files: Iterable[Photograph], size: int, workers: int, ahead: int, tally: Tally, preparation: Preparation = UNPREPARED
) -> Generator[Photograph]:
    """Each with its pixels or its error, in order, at most `ahead` in memory. Bad ones are counted and reported."""
    waiting: deque[tuple[Photograph, Future[tuple[Pixels, tuple[str, ...]]] | None]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for one in files:
                waiting.append((one, None if one.error else pool.submit(prepare, one.path, size, preparation)))
                if len(waiting) >= ahead:
                    yield _first(waiting, tally)
            while waiting:
                yield _first(waiting, tally)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _first(waiting: deque[tuple[Photograph, Future[tuple[Pixels, tuple[str, ...]]] | None]], tally: Tally) -> Photograph:
    one, future = waiting.popleft()
    if future is not None:
        try:
            pixels, done = future.result()
            return one._replace(pixels=pixels, done=done)
        except (JpegError, OSError, MemoryError) as error:
            one = one._replace(error=str(error) or "not enough memory to decode it")
    tally.bad += 1
    print(printable(f"error: {one.path}: {one.error}"), file=sys.stderr, flush=True)
    return one


def prepare(path: Path, size: int, preparation: Preparation = UNPREPARED) -> tuple[Pixels, tuple[str, ...]]:
    """(size, size, 3) RGB pixels of an image file, as the packer would make them, and what was done to it.

    Where there is nothing to crop to the whole frame is shown, and said so. JpegError for undecodable and malicious files.
    """
    made = square(read_file(str(path)), size, preparation)
    return np.asarray(made.image), made.done + made.notes


def normalised(pixels: Sequence[Pixels], grader: Grader) -> Tensor:
    """(B, 3, R, R) float32 images of a batch."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (grader.mean, grader.std))
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255.0 - mean) / std
