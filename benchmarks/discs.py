"""How often and how exactly the retina's disc is found: pictures of many kinds, each with a disc of known circle, two, or none.

    python benchmarks/discs.py --count 200

An error is the worst of centre (x, y) and radius, in % of the radius. A disc is false where it is more than 3 % off, and where the
picture has none, or two.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import synthetic_discs
from disc_pictures import KINDS, picture
from numpy.typing import NDArray

from fastretina.cli import run
from fastretina.errors import JpegError
from fastretina.packing.fundus import Disc, NoDisc, find_disc

FALSE = 3.0  # % of the radius


@dataclass(frozen=True)
class DiscsConfig:
    """Find the discs of pictures made for it, and print a table."""

    count: int = 200
    """Pictures of each kind, the first row apart: that has 30 of each of 8 kinds of camera."""
    json: Path | None = None
    """Where to write the numbers, too."""


@dataclass(frozen=True)
class Row:
    """What came of the pictures of one kind."""

    kind: str
    pictures: int
    right: int  # found, or said to be two eyes, or refused, as it should be
    median_error: float | None  # % of the radius; None where there is no disc to find
    worst_error: float | None
    false_discs: int
    milliseconds: float  # median


def measure(kind: str, pictures: Iterator[tuple[NDArray[np.uint8], list[Disc]]]) -> Row:
    """Looks for the disc in each picture, whose true discs come with it."""
    right, false, errors, seconds = 0, 0, [], []
    for pixels, true in pictures:
        start = time.perf_counter()
        word: str | None = None
        found = None
        try:
            found = find_disc(pixels)
        except NoDisc as none:
            word = none.word
        except JpegError:
            word = "dark"
        seconds.append(time.perf_counter() - start)
        if found is None:
            right += word == {0: "whole frame", 1: None, 2: "two eyes"}[len(true)]
        elif len(true) == 1 and (error := 100 * error_of(found, true[0])) <= FALSE:
            right += 1
            errors.append(error)
        else:
            false += 1
    median, worst = (statistics.median(errors), max(errors)) if errors else (None, None)
    return Row(kind, len(seconds), right, median, worst, false, 1000 * statistics.median(seconds))


def error_of(found: Disc, true: Disc) -> float:
    """The worst of centre and radius, in radii."""
    return max(abs(found.x - true.x), abs(found.y - true.y), abs(found.radius - true.radius)) / true.radius


def synthetic() -> Iterator[tuple[NDArray[np.uint8], list[Disc]]]:
    """The 240 of `synthetic_discs`."""
    for kind in synthetic_discs.KINDS:
        for seed in range(30):
            pixels, disc = synthetic_discs.synthetic(kind, seed)
            yield pixels, [disc]


def main(config: DiscsConfig) -> None:
    """Find the discs of pictures made for it, and print a table."""
    print("| pictures | n | right | median error | worst error | false discs | ms |\n|---|---|---|---|---|---|---|")
    rows = []
    for kind in ("synthetic cameras", *KINDS):
        row = measure(kind, synthetic() if kind not in KINDS else (picture(kind, n) for n in range(config.count)))
        rows.append(row)
        errors = (f"{e:.2f} %" if e is not None else "" for e in (row.median_error, row.worst_error))
        share = f"{100 * row.right / row.pictures:.1f} %"
        print(
            f"| {kind} | {row.pictures} | {share} |",
            " | ".join(errors),
            f"| {row.false_discs} | {row.milliseconds:.1f} |",
            flush=True,
        )
    if config.json:
        config.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    run(DiscsConfig, main)
