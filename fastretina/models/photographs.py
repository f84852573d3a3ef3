"""Photographs of any size as a network grades them: each prepared as the packer prepared the training images."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastretina.errors import JpegError, printable
from fastretina.loading.pipeline import Pipeline
from fastretina.models.checkpoint import CheckpointInfo
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


class _Preparing:
    """A photograph that gets its pixels, or its error, on a thread; see fastretina.loading.pipeline.Job."""

    def __init__(self, photograph: Photograph, size: int, preparation: Preparation) -> None:
        self.photograph, self._size, self._preparation = photograph, size, preparation
        self.pieces = 0 if photograph.error else 1

    def run(self, piece: int) -> None:
        try:
            pixels, done = prepare(self.photograph.path, self._size, self._preparation)
            self.photograph = self.photograph._replace(pixels=pixels, done=done)
        except (JpegError, OSError, MemoryError) as error:
            self.photograph = self.photograph._replace(error=str(error) or "not enough memory to decode it")


def prepared(
    files: Iterable[Photograph], size: int, workers: int, ahead: int, tally: Tally, preparation: Preparation = UNPREPARED
) -> Generator[Photograph]:
    """Each with its pixels or its error, in order, at most `ahead` in memory. Bad ones are counted and reported."""
    pipeline = Pipeline(workers, ahead)
    try:
        pipeline.start(_Preparing(one, size, preparation) for one in files)
        while (job := pipeline.get()) is not None:
            assert isinstance(job, _Preparing)
            one = job.photograph
            if one.error:
                tally.bad += 1
                print(printable(f"error: {one.path}: {one.error}"), file=sys.stderr, flush=True)
            yield one
    finally:
        pipeline.close()


def prepare(path: Path, size: int, preparation: Preparation = UNPREPARED) -> tuple[Pixels, tuple[str, ...]]:
    """(size, size, 3) RGB pixels of an image file, as the packer would make them, and what was done to it.

    Where there is nothing to crop to the whole frame is shown, and said so. JpegError for undecodable and malicious files.
    """
    made = square(read_file(str(path)), size, preparation)
    return np.asarray(made.image), made.done + made.notes


def normalised(pixels: Sequence[Pixels], info: CheckpointInfo) -> Tensor:
    """(B, 3, R, R) float32 images of a batch."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255.0 - mean) / std
