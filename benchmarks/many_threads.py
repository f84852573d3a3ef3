"""What many decoding threads and a training step take from each other in one interpreter, on a machine without cores for them.

    python benchmarks/many_threads.py --data data/train.beton --json out.json [--threads 16]

Each thread sleeps for as long as a JPEG takes to decode, without Python's lock, as if it decoded on a core of its own; all else
about an image the Loader does as ever: reading, checking, headers, its Python. So few cores show what a machine of many would lose
to the lock. Meanwhile the main thread launches a step's operators, each of which gives the lock away and needs it back. Bare
threads, which do nothing but sleep, are the limit.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from measure import brief, command, interleave, save, summary
from stages import together

from fastretina.beton.reader import Beton
from fastretina.cli import run
from fastretina.errors import UsageError
from fastretina.loading.augment import Augment
from fastretina.loading.decode import cpu
from fastretina.loading.loader import Loader

BATCH = 128
WARM_UP = 8  # batches: more than a loader has ready
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class ManyThreadsBenchmark:
    """Images a second of threads that sleep where they would decode, and milliseconds of a step's launches beside them."""

    data: Path = Path("data/train.beton")
    """The .beton to read."""
    json: Path | None = None
    """Where to write the results."""
    threads: int = 16
    """Threads that decode."""
    decode_us: float = 1400.0
    """Microseconds that one image takes to decode."""
    operators: int = 600
    """Launched by a step."""
    batches: int = 80
    """Of 128 images, in one measurement."""
    rounds: int = 7
    """Timed rounds, after an untimed one."""


class Sleeper:
    """simplejpeg, but for the decoding itself."""

    def __init__(self, microseconds: float) -> None:
        self.seconds = microseconds / 1e6
        self._here = threading.local()

    def sleep(self) -> None:
        if sys.platform == "linux" and not hasattr(self._here, "punctual"):
            # A thread oversleeps by 50 us otherwise.
            self._here.punctual = ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        time.sleep(self.seconds)

    def decode_jpeg(self, data: memoryview, *, min_height: int, min_width: int, min_factor: float, **_: Any) -> None:
        simplejpeg.decode_jpeg_header(data, min_height, min_width, min_factor)
        self.sleep()


def main(config: ManyThreadsBenchmark) -> None:
    """What many decoding threads and a training step take from each other in one interpreter."""
    sleeper, small = Sleeper(config.decode_us), torch.zeros(64)

    def step() -> float:
        """Milliseconds that its launches take."""
        start = time.perf_counter()
        for _ in range(config.operators):
            small.add_(1)
        return (time.perf_counter() - start) * 1e3

    def loaded(work: Callable[[], object]) -> float:
        """Images a second, where the consumer does this with each batch."""
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        deque(itertools.islice(batches, WARM_UP), maxlen=0)
        start = time.perf_counter()
        for _ in itertools.islice(batches, config.batches):
            work()
        return config.batches * BATCH / (time.perf_counter() - start)

    beside: list[float] = []  # the median step of each measurement, the untimed one's too

    def loaded_beside_steps() -> float:
        taken: list[float] = []
        rate = loaded(lambda: taken.append(step()))
        beside.append(statistics.median(taken))
        return rate

    with Beton(config.data) as beton:
        side = beton.side
    if side is None:
        raise UsageError(f"{config.data}: square images of one size are needed")
    with Loader(
        config.data, BATCH, train=False, sampling="shuffle", augment=Augment.none(), dtype=torch.uint8, drop_last=True,
        resolution=side, workers=config.threads, resident="off",
    ) as loader:  # fmt: skip
        cpu.simplejpeg = sleeper  # type: ignore[attr-defined]
        sides = {
            "bare threads": lambda: together([lambda _: sleeper.sleep()] * config.threads),
            "loader": lambda: loaded(lambda: None),
            "loader beside steps": loaded_beside_steps,
            "step alone": lambda: statistics.median(step() for _ in range(config.batches)),
        }
        found = interleave(sides, config.rounds)
    alone = found.pop("step alone")
    limit = found["bare threads"]
    result = {
        "images_per_second": {name: summary(rates) for name, rates in found.items()},
        "of_bare_threads": {
            name: summary([mine / bound for mine, bound in zip(rates, limit, strict=True)])
            for name, rates in found.items()
            if rates is not limit
        },
        "step_ms": {"alone": summary(alone), "beside the loader": summary(beside[1:])},
    }
    save(
        config.json,
        {"benchmark": "many threads", "command": command(), "threads": config.threads, "decode_us": config.decode_us} | result,
    )
    print(json.dumps(brief(result), indent=2))


if __name__ == "__main__":
    run(ManyThreadsBenchmark, main)
