"""What N loaders in N processes on N cores reach together, beside what each of them reaches alone on its core.

    python benchmarks/processes.py --data data/train.beton --json out.json

Each process is pinned to a core and has a loader of its own, with one thread: all augmentation, 512 px. Cores of one chip are
slower together than alone whatever runs on them (shared caches, memory, power, the neighbours of a rented machine), so that the
same is measured for a loop that decodes one JPEG and shares nothing: that is what the machine gives.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from measure import interleave, save, summary

from fastretina import Loader
from fastretina.cli import run
from fastretina.errors import UsageError

KINDS = ("loader", "decode")
BATCH = 32
AHEAD = 6  # batches that are made before the clock starts: more than the loader keeps ready


@dataclass(frozen=True)
class ProcessesBenchmark:
    """N loaders on N cores beside one on each."""

    data: Path = Path("data/train.beton")
    """A .beton file."""
    json: Path | None = None
    """Where to write the results."""
    processes: int = 0
    """How many; 0: as many as there are cores for this process."""
    resolution: int = 512
    """Side of the images, px."""
    seconds: float = 2.0
    """Of one measurement."""
    rounds: int = 11
    """Interleaved rounds."""


def work(answers: Connection, data: Path, resolution: int, core: int) -> None:
    """One process: on (kind, seconds) answers images/s, until None."""
    os.sched_setaffinity(0, {core})  # before the loader starts its thread, which inherits it
    torch.set_num_threads(1)
    with Loader(data, batch_size=BATCH, resolution=resolution, workers=1) as loader:
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        jpeg = bytes(loader.dataset.jpeg(0))
        pixels = np.empty_like(simplejpeg.decode_jpeg(jpeg))

        def load() -> int:
            return len(next(batches).ids)

        def decode() -> int:
            simplejpeg.decode_jpeg(jpeg, buffer=pixels)
            return 1

        kinds: dict[str, Callable[[], int]] = {"loader": load, "decode": decode}
        answers.send(None)
        while (asked := answers.recv()) is not None:
            kind, seconds = asked
            answers.send(rate(kinds[kind], seconds))


def rate(make: Callable[[], int], seconds: float) -> float:
    """Images/s of so many seconds."""
    for _ in range(AHEAD):
        make()
    images, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        images += make()
    return images / (now - start)


@contextmanager
def started(config: ProcessesBenchmark, cores: list[int]) -> Iterator[list[Connection]]:
    """A process on each of these cores; their ends of the pipes."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in cores]
    processes = [spawn.Process(target=work, args=(theirs, config.data, config.resolution, core), daemon=True)
                 for (_, theirs), core in zip(pipes, cores, strict=True)]  # fmt: skip
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()  # so that ours ends when its process does
    ours = [mine for mine, _ in pipes]
    for one in ours:
        one.recv()
    try:
        yield ours
    finally:
        for one in ours:
            one.send(None)
        for process in processes:
            process.join()


def images_per_second(asked: list[Connection], kind: str, seconds: float) -> float:
    """Of these processes at the same time, their sum."""
    for one in asked:
        one.send((kind, seconds))
    rates: list[float] = [one.recv() for one in asked]
    return sum(rates)


def main(config: ProcessesBenchmark) -> None:
    """N loaders on N cores beside one on each."""
    if not config.data.is_file():
        raise UsageError(f"{config.data}: no such file; make data makes it")
    cores = sorted(os.sched_getaffinity(0))
    if not 0 <= config.processes <= len(cores):
        raise UsageError(f"--processes {config.processes}: there are {len(cores)} cores")
    cores = cores[: config.processes or len(cores)]
    with started(config, cores) as processes:
        groups = {**{f"core {core} alone": [one] for core, one in zip(cores, processes, strict=True)}, "together": processes}
        sides = {(kind, name): functools.partial(images_per_second, group, kind, config.seconds)
                 for kind in KINDS for name, group in groups.items()}  # fmt: skip
        rates = interleave(sides, config.rounds, pause=0)
    result: dict[str, Any] = {"benchmark": "processes", "command": " ".join(["python", *sys.argv]), "cores": cores}
    for kind in KINDS:
        alone = [sum(each) for each in zip(*(rates[kind, name] for name in groups if name != "together"), strict=True)]
        share = summary([all_ / sum_ for all_, sum_ in zip(rates[kind, "together"], alone, strict=True)])
        result[kind] = {"images_per_second": {name: summary(rates[kind, name]) for name in groups}, "share": share}
        print(f"{kind}: {len(cores)} together {result[kind]['images_per_second']['together']['median']:,.0f} img/s, "
              f"{share['median']:.3f} ({share['low']:.3f} to {share['high']:.3f}) of the sum of each alone")  # fmt: skip
    save(config.json, result)


if __name__ == "__main__":
    run(ProcessesBenchmark, main)
