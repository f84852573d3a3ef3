"""Photographs of any size as a network grades them: each prepared as the packer prepared the training images."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastretina.errors import JpegError
from fastretina.loading.pipeline import Pipeline
from fastretina.loading.single import network_image
from fastretina.packing.folder import walk
from fastretina.packing.inspect import read_file
from fastretina.packing.payload import payload, payload_of
from fastretina.packing.preprocessing import Preparation
from fastretina.packing.reencode import QUALITY, SUBSAMPLING

Picture = npt.NDArray[np.uint8] | Image.Image
_IN_WORDS = {
    "none": "scaled with Lanczos until the longer side is {size} px, centred on a black square of {size} x {size} px",
    "fundus": "cropped to the square around the retina's disc and scaled with Lanczos to {size} x {size} px; where the disc's rim "
    "is out of sight, scaled until the longer side is {size} px and centred on black",
    "local": "the local average colour subtracted, within the disc (local_contrast in fastretina/packing/fundus.py)",
}
Images = dict[int, npt.NDArray[np.float32]]  # by resolution R: (R, R, 3), normalised


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
    """Either its `images`, and what was `done` to it; or an `error`, which prevents them. given: a path, the bytes of a file, or a
    picture in memory; name: what it is called."""

    given: Path | bytes | Picture
    name: str
    images: Images | None = None
    done: tuple[str, ...] = ()
    error: str = ""


def photographs(given: Iterable[Path], tally: Tally, follow_links: bool = False) -> list[Photograph]:
    """Those to grade, without pixels, folder by folder in the order of names; a folder where there are none, with its error."""
    found = []
    for path in given:
        if not path.is_dir():
            found.append(_at(path))  # whatever it is called; reading it will tell
            continue
        folder = walk(path, follow_links)
        tally.left_out += folder.left_out
        found += [_at(Path(image)) for image in folder.images]
        found += [_at(place, f"cannot be searched: {reason}") for place, reason in folder.unlisted]
        if not folder.images and not folder.unlisted:
            found.append(_at(path, "no photograph in this folder"))
    return found


def _at(path: Path, error: str = "") -> Photograph:
    return Photograph(path, str(path), error=error)


class _Preparing:
    """A photograph that gets its images, or its error, on a thread; see fastretina.loading.pipeline.Job."""

    def __init__(self, photograph: Photograph, size: int, preparation: Preparation, resolutions: Collection[int]) -> None:
        self.photograph, self._how = photograph, (size, preparation, resolutions)
        self.pieces = 0 if photograph.error else 1

    def run(self, piece: int) -> None:
        try:
            images, done = prepare(self.photograph.given, *self._how)
            self.photograph = self.photograph._replace(images=images, done=done)
        except (JpegError, OSError, MemoryError) as error:
            self.photograph = self.photograph._replace(error=str(error) or "not enough memory to decode it")


def prepared(
    photographs: Iterable[Photograph],
    size: int,
    preparation: Preparation,
    resolutions: Collection[int],
    workers: int,
    ahead: int,
) -> Generator[Photograph]:
    """Each with its images or its error, in order, at most `ahead` in memory; the rest as of `prepare`."""
    pipeline = Pipeline(workers, ahead)
    try:
        pipeline.start(_Preparing(one, size, preparation, resolutions) for one in photographs)
        while (job := pipeline.get()) is not None:
            assert isinstance(job, _Preparing)
            yield job.photograph
    finally:
        pipeline.close()


def prepare(
    given: Path | bytes | Picture, size: int, preparation: Preparation, resolutions: Collection[int]
) -> tuple[Images, tuple[str, ...]]:
    """What networks of these resolutions are shown of a photograph, and what was done to it.

    It becomes the JPEG of size x size px that the packer would have put into a .beton, and that is read as an evaluation's loader
    reads it on a CPU: so its answer is that of the packed photograph, to the bit. JpegError for undecodable and malicious files.
    """
    if isinstance(given, bytes | Path):
        found = payload(given if isinstance(given, bytes) else read_file(str(given)), size, preparation)
    else:
        found = payload_of(given, size, preparation)
    try:
        return {resolution: network_image(found.jpeg, size, resolution) for resolution in resolutions}, found.done
    except ValueError as error:
        raise JpegError(f"cannot be decoded: {error}") from None


def rules(preparation: Preparation, size: int, resolution: int) -> list[str]:
    """What `prepare` does, in words and in order."""
    found = [
        "upright by its EXIF orientation, in sRGB by its colour profile, 16 bits scaled to 8, transparency on black",
        _IN_WORDS[preparation.crop].format(size=size),
    ]
    if preparation.contrast != "none":
        found.append(_IN_WORDS[preparation.contrast])
    found.append(
        f"encoded as a JPEG of quality {QUALITY}, {SUBSAMPLING}, and decoded; a JPEG that was {size} x {size} px is left as it is"
    )
    if size != resolution:
        found.append(
            f"scaled from {size} to {resolution} px: decoded at 1/2, 1/4 or 1/8 where that leaves {resolution} px or more, then "
            "bilinear between the centres of pixels, without a filter"
        )
    return found
