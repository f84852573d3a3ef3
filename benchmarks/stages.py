"""What one image costs by stage, and how near the Loader comes to what the machine can do.

    python benchmarks/stages.py --data data/train.beton --json out.json

First the stages, each alone on one thread. Then two limits, on as many threads as the Loader has: no loader of JPEGs is faster than
their decoding, and none that delivers float32 is faster than memory takes it. Then the Loader, as a share of both and of what its
own stages allow. All of it is interleaved, round by round.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import command, hardware, interleave, save, summary
from side_process import measure_epoch
from sides import Task, fastretina

from fastretina.beton.reader import Beton
from fastretina.cli import run
from fastretina.errors import UsageError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, cpu, draw
from fastretina.loading.config import KERNEL_DTYPES
from fastretina.loading.decode.cpu import decode_jpeg

BATCH = 64  # rows
IMAGES = 64  # of one measurement of a stage, on each thread
SAMPLES = 256  # of the file, in turn: 200 MB of pixels at 512 px, more than caches hold
READ, DECODE, FULL = "read and checksum", "decode to RGB", "warp, all augmentations, float32"
WARPS = {
    "warp, rotation and flips, float32": (Augment(), torch.float32),
    FULL: (Augment.full(), torch.float32),
    "warp, all augmentations, bfloat16": (Augment.full(), torch.bfloat16),
    "warp, all augmentations, uint8": (Augment.full(), torch.uint8),
}
DECODING, STORING = "decoding alone", "storing float32 alone"
LOADERS = {"Loader, decode": "decode", "Loader, all augmentations, float32": "augment"}

Stage = Callable[[int], object]  # does its work for one image, by number


@dataclass(frozen=True)
class StagesBenchmark:
    """Microseconds of one image by stage, and the Loader beside what the machine can do."""

    data: Path = Path("data/train.beton")
    """The .beton to read: square images of one size."""
    json: Path | None = None
    """Where to write the results."""
    rounds: int = 7
    """Timed rounds, after an untimed one."""
    workers: int = 0
    """Threads of the limits and of the Loader; 0: one for each core."""


class Thread:
    """What a thread works on. pixels: (S, S, 3) uint8, its decoded image. rows: (R, S, S, 3) float32, which take what it stores in
    turn: too many for the caches, as a loader's batches are."""

    def __init__(self, files: list[bytes], side: int, rows: int) -> None:
        size = side * side * 3
        memory = np.zeros(size + cpu.SOURCE_PADDING + 32, np.uint8)
        start = (16 - memory.ctypes.data) % 32  # where the Loader's begins: libjpeg-turbo then stores through the cache
        self.source = memory[start : start + size + cpu.SOURCE_PADDING]
        self.pixels = self.source[:size].reshape(side, side, 3)
        self.rows = torch.zeros((rows, side, side, 3)).numpy()  # by torch, as the Loader's: it begins at a cache line
        self._files, self._side = files, side
        self.decode(0)

    def decode(self, number: int) -> None:
        decode_jpeg(self._files[number % len(self._files)], self._side, self._side, self.pixels, self._side)

    def store(self, number: int) -> None:
        self.rows[number % len(self.rows)].fill(0.5)

    def warp(self, augment: Augment, dtype: torch.dtype) -> Stage:
        """From its decoded image into its rows, as the Loader warps for batches of this dtype."""
        side, sides = self._side, np.full(BATCH, self._side)
        affine, colour = draw(augment, side, sides, sides, 0, 0, np.arange(BATCH))
        columns, recolours = cpu.kernel_colour(colour), augment.recolours
        norm = cpu.kernel_norm() if dtype == torch.uint8 else cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)
        rows = self.rows.view(KERNEL_DTYPES[dtype]).reshape(-1, side, side, 3)  # of a narrower type the more

        def stage(number: int) -> None:
            row = number % BATCH
            cpu.warp(self.source, side, side, affine[row], columns[row], norm, recolours, rows[number % len(rows)])

        return stage


def microseconds(stage: Stage, numbers: itertools.count[int]) -> float:
    """Of an image."""
    start = time.perf_counter()
    for number in itertools.islice(numbers, IMAGES):
        stage(number)
    return (time.perf_counter() - start) / IMAGES * 1e6


def together(stages: list[Stage]) -> float:
    """Images a second of these, each on a thread of its own."""
    count = 4 * IMAGES
    with ThreadPoolExecutor(len(stages)) as pool:
        start = time.perf_counter()
        list(pool.map(lambda stage: deque(map(stage, range(count)), maxlen=0), stages))
        return len(stages) * count / (time.perf_counter() - start)


def epoch_throughput(epoch: Callable[[], Any]) -> float:
    """Images a second of the Loader."""
    found = measure_epoch(epoch, "cpu")
    return float(found["images"] / found["wall"])


def measure(data: Path, workers: int, rounds: int) -> dict[str, Any]:
    """Stages in microseconds, limits and Loader in images/s, and the shares; medians with intervals."""
    with Beton(data) as beton:
        side = beton.side
        if side is None:
            raise UsageError(f"{data}: square images of one size are needed")
        files = [bytes(beton.jpeg(index)) for index in range(min(SAMPLES, len(beton)))]
        alone = Thread(files, side, 2 * BATCH)
        resident = np.repeat(alone.pixels[None], len(files), 0)
        stages: dict[str, Stage] = {
            READ: lambda number: beton.jpeg(number % len(files)),
            "of which the checksum": lambda number: zlib.crc32(files[number % len(files)]),
            DECODE: alone.decode,
            "copy a resident image": lambda number: np.copyto(alone.pixels, resident[number % len(files)]),
            **{name: alone.warp(*what) for name, what in WARPS.items()},
            "store a float32 row alone": alone.store,
        }
        threads = [Thread(files, side, max(16, 2 * BATCH // workers)) for _ in range(workers)]
        loaders = {name: fastretina(Task(str(data), work, side, BATCH, workers)) for name, work in LOADERS.items()}
        numbers = itertools.count()
        sides: dict[str, Callable[[], float]] = {
            **{name: lambda stage=stage: microseconds(stage, numbers) for name, stage in stages.items()},  # type: ignore[misc]
            DECODING: lambda: together([thread.decode for thread in threads]),
            STORING: lambda: together([thread.store for thread in threads]),
            **{name: lambda epoch=epoch: epoch_throughput(epoch) for name, epoch in loaders.items()},  # type: ignore[misc]
        }
        found = interleave(sides, rounds, pause=0.05)
    decode, full = LOADERS
    own = [workers * 1e6 / sum(times) for times in zip(found[READ], found[DECODE], found[FULL], strict=True)]
    shares = {
        decode: {DECODING: found[DECODING]},
        full: {DECODING: found[DECODING], STORING: found[STORING], "its stages alone": own},
    }
    return {
        "resolution": side,
        "workers": workers,
        "microseconds": {name: summary(found[name]) for name in stages},
        "per_second": {name: summary(found[name]) for name in (DECODING, STORING, *LOADERS)},
        "shares": {
            loader: {of: summary([a / b for a, b in zip(found[loader], limit, strict=True)]) for of, limit in limits.items()}
            for loader, limits in shares.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """For a person to read."""

    def line(name: str, found: dict[str, float]) -> str:
        return f"  {name:<40}{found['median']:8,.0f}  {found['low']:7,.0f}-{found['high']:7,.0f}"

    head = f"one image of {result['resolution']} px, one thread"
    lines = [f"\n{head:<42}{'µs':>8}  {'interval':>15}"]
    lines += [line(name, found) for name, found in result["microseconds"].items()]
    head = f"all at once, {result['workers']} threads"
    lines += [f"\n{head:<42}{'img/s':>8}  {'interval':>15}"]
    for name, found in result["per_second"].items():
        lines.append(line(name, found))
        if shares := [f"{share['median']:.0%} of {of}" for of, share in result["shares"].get(name, {}).items()]:
            lines.append(f"  {'':<4}{', '.join(shares)}")
    return "\n".join(lines)


def main(config: StagesBenchmark) -> None:
    """Microseconds of one image by stage, and the Loader beside what the machine can do."""
    if not config.data.exists():
        raise UsageError(f"{config.data}: not there. Make it with: make data, or name another with --data")
    hard = hardware()
    print(f"{hard['cpu']}, {hard['cores']} cores; {config.rounds} rounds")
    result = measure(config.data, config.workers or int(str(hard["cores"])), config.rounds)
    print(table(result))
    save(config.json, {"benchmark": "stages", "command": command()} | result)


if __name__ == "__main__":
    run(StagesBenchmark, main)
