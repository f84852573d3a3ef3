"""What an exported file's answers are worth: how far they are from torch's, what int8 costs, and how fast they come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastretina.beton.reader import Beton
from fastretina.loading.loader import Loader
from fastretina.metrics.predictions import grade_metrics
from fastretina.metrics.table import TITLES
from fastretina.models.exported import Pixels, Probabilities, Run
from fastretina.models.grader import Grader, mean_of
from fastretina.models.inference import view_outputs
from fastretina.models.precision import device_name

BATCH = 16
ROUNDS = 5
PAUSE = 0.25  # seconds before each timed call: the threads of the side before have stopped spinning (OpenMP's: 200 ms)


def batches(beton: Beton, resolution: int) -> Generator[tuple[Pixels, Tensor]]:
    """A data set's photographs as (B, R, R, 3) uint8, as a loader makes them for an evaluation, and their (B,) labels."""
    with Loader(beton, batch_size=BATCH, train=False, resolution=resolution, dtype=torch.uint8) as loader:
        for batch in loader:
            yield batch.images.permute(0, 2, 3, 1).contiguous().numpy(), batch.labels


def some_pixels(beton: Beton, resolution: int, count: int) -> Pixels:
    """(N, R, R, 3) uint8 of at most `count` photographs from all over a data set."""
    rows = np.unique(np.linspace(0, len(beton) - 1, min(count, len(beton))).astype(np.int64))
    with closing(batches(beton.select(rows), resolution)) as found:
        return np.concatenate([pixels for pixels, _ in found])


def difference(run: Run, grader: Grader, pixels: Pixels) -> float:
    """The largest between the probabilities of `run` and of the grader, for (N, R, R, 3) pixels: one by itself, then in batches.
    NaN where one of them is none."""
    starts = [0, 1, *range(1 + BATCH, len(pixels), BATCH), len(pixels)]
    parts = [pixels[start:end] for start, end in pairwise(starts) if end > start]
    return float(np.max([np.abs(run(part) - expected(grader, part)).max() for part in parts]))


def expected(grader: Grader, pixels: Pixels) -> Probabilities:
    """(B, C) probabilities of (B, R, R, 3) pixels by the grader's networks and heads, not by the graph that was made of them."""
    scaled, found = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, []
    with torch.no_grad():
        for model, info, _, precision in grader.members:
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
            found.append(info.grading.answer(view_outputs(model, (scaled - mean) / std, precision), info.decision))
    probabilities: Probabilities = mean_of(found).exp().numpy()
    return probabilities


@dataclass(frozen=True)
class Loss:
    """What int8 changes on graded photographs.

    Attributes:
        data: their digest (`Beton.digest`). images: how many. changed: those that get another class.
        metric: qwk, or accuracy where the classes have no order. before, after: its values; None where undefined.
    """

    data: str
    images: int
    metric: str
    before: float | None
    after: float | None
    changed: int

    @classmethod
    def of(cls, beton: Beton, grader: Grader, before: Run, after: Run) -> Self:
        """Of all photographs of a data set, each with a label."""
        answers: list[list[Tensor]] = [[], [], []]
        for pixels, labels in batches(beton, grader.members[0].info.resolution):
            for found, one in zip(
                answers, (labels, *(torch.from_numpy(run(pixels)).argmax(dim=1) for run in (before, after))), strict=True
            ):
                found.append(one)
        labels, first, second = (torch.cat(found) for found in answers)
        metric = "qwk" if grader.classes.ordinal else "accuracy"
        values = [grade_metrics(grades, labels, grader.classes).values[metric] for grades in (first, second)]
        return cls(beton.digest, len(labels), metric, values[0], values[1], int((first != second).sum()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """`QWK 0.8123, before 0.8200: a loss of 0.0077; 3 of 400 images get another class`."""
        if self.before is None or self.after is None:
            said = f"{TITLES[self.metric]} is undefined"
        else:
            said = f"{TITLES[self.metric]} {self.after:.4f}, before {self.before:.4f}: a loss of {self.before - self.after:.4f}"
        return f"{said}; another class for {self.changed:,} of the {self.images:,} images"


def timed(sides: Mapping[str, Run], pixels: Pixels, threads: int) -> list[str]:
    """Lines that say how many images/s each side answers, one at a time and 16; the first is what the others are compared with.

    The sides take turns; the median of their rounds counts.
    """
    lines = [f"images/s on {device_name(torch.device('cpu'))}:"]
    for count in (1, BATCH):
        batch = np.resize(pixels, (count, *pixels.shape[1:]))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(1 + ROUNDS):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                time.sleep(PAUSE)
                start = time.perf_counter()
                sides[name](batch)
                if number:
                    rates[name].append(count / (time.perf_counter() - start))
        (first, base), *others = ((name, statistics.median(found)) for name, found in rates.items())
        told = [f"{first} {base:,.1f}", *(f"{name} {rate:,.1f} ({rate / base:.2f} times as many)" for name, rate in others)]
        lines.append(f"  {f'{count} at a time' if count > 1 else 'one by one'}: {', '.join(told)}")
    return lines
