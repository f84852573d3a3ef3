"""The loader's promises that are numbers, but no throughput beside peers.

    python benchmarks/engine.py --json out.json                 # errors, memory, opening
    python benchmarks/engine.py --only shards                   # or remote, processes

errors: how fast one reaches the consumer. memory, opening: what they cost where there are many samples; in fresh processes. shards:
what a million samples in 64 files cost beside a thousand in one: opening, warm (the files in the page cache) and cold (each file's
pages dropped by posix_fadvise first, which asks the kernel and cannot make the disk's own cache forget), the epoch's shuffle, the
work of a batch on one core (from the page cache: a thousand samples are always in it, and what a million cost beyond that is the
disk's). remote: shards read through a filled cache beside the same files read directly. processes: N loaders in N processes on N
cores beside each alone on its core. Cores of one chip are slower together than alone whatever runs on them (shared caches, memory,
power, the neighbours of a rented machine), so that the same is measured for a loop that decodes one JPEG and shares nothing.

All but processes, which reads --data, make their files in a temporary folder (shards: 2 GB).
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import simplejpeg
import torch
from measure import brief, command, interleave, save, summary
from numpy.typing import NDArray

from fastretina import Loader
from fastretina.beton.open import open_beton
from fastretina.beton.paths import shard_path, shard_rows
from fastretina.beton.remote import Cache
from fastretina.beton.shards import ShardedBeton
from fastretina.beton.writer import BetonWriter
from fastretina.cli import run
from fastretina.errors import UsageError
from fastretina.loading.augment import Augment
from fastretina.loading.sampler import Sampling, epoch_order

Piece = Literal["errors", "memory", "opening", "shards", "remote", "processes"]
SHARDS = 64
SIDE = 128  # px: a million images of 512 px would need 40 GB of disk, and hide what a batch costs besides decoding
AHEAD = 6  # batches that a process makes before the clock starts: more than the loader keeps ready

MEMORY = """
import sys
sys.path.insert(0, sys.argv[2])
from measure import private_mb
from fastretina import Loader
with Loader(sys.argv[1], batch_size=64, resolution=128) as loader:
    for number, batch in enumerate(loader):
        if number == 60:
            break
    print(private_mb())
"""

OPENING = """
import sys, time
from fastretina.beton.open import open_beton
for _ in range(8):
    start = time.perf_counter()
    with open_beton(sys.argv[1]) as beton:
        print(time.perf_counter() - start)
"""

ERRORS = """
import sys, time
import fastretina.loading.batches
from fastretina import Loader
from fastretina.errors import FastretinaError

decode = fastretina.loading.batches.decode
failing_index, struck = -1, 0.0

def failing(beton, index, target, **options):
    global struck
    if index == failing_index:
        struck = time.perf_counter()
        raise RuntimeError("a stage that fails")
    decode(beton, index, target, **options)

fastretina.loading.batches.decode = failing
for number in range(20):
    failing_index, struck = 75 * number + 3, 0.0
    with Loader(sys.argv[1], batch_size=32, resolution=128, seed=number) as loader:
        try:
            for batch in loader:
                pass
        except RuntimeError:
            print(time.perf_counter() - struck)
"""


@dataclass(frozen=True)
class EngineBenchmark:
    """Error latency, memory and opening time of the loader; what shards, a cache and several processes cost."""

    json: Path | None = None
    """Where to write the results."""
    only: tuple[Piece, ...] = ("errors", "memory", "opening")
    """What to measure."""
    samples: int = 1_000_000
    """Samples of the large file or set."""
    data: Path = Path("data/train.beton")
    """What the processes read."""
    rounds: int = 15
    """Interleaved rounds of shards, remote and processes; fresh processes whose memory is looked at, 5 at most."""
    batches: int = 150
    """Of 64, in one measurement of a batch's work."""
    seconds: float = 2.0
    """Of one measurement of the processes."""


def write(out: Path, samples: int, shards: int = 1, side: int = SIDE) -> None:
    """Shards as tools/write_beton.py makes them, of `samples` equal images of `side` px; one file if `shards` is 1.

    They share their bytes, which neither memory nor opening depends on.
    """
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(smooth), quality=80)
    crc = zlib.crc32(jpeg)
    for number in range(shards):
        rows = shard_rows(samples, number, shards)
        with BetonWriter(shard_path(out, number, shards) if shards > 1 else out, len(rows)) as writer:
            for row in rows:
                writer.add(jpeg, crc, name=f"{row // 2}_{'left' if row % 2 else 'right'}", label=row % 5, id=row,
                           width=side, height=side)  # fmt: skip
            writer.finish({"shard": {"number": number, "of": shards}} if shards > 1 else {})


def lines(code: str, path: Path) -> list[float]:
    """What a fresh process prints when it runs `code` on `path`."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parent)], check=True, capture_output=True, text=True
    )
    return [float(line) for line in done.stdout.split()]


def errors(config: EngineBenchmark, folder: Path) -> dict[str, Any]:
    """Seconds from a stage that raises, at 20 samples in turn, to the consumer."""
    write(folder / "small.beton", 4_000)
    seconds = lines(ERRORS, folder / "small.beton")
    return {"seconds_until_an_error_arrives": {"errors": len(seconds), "worst": max(seconds), **summary(seconds)}}


def memory(config: EngineBenchmark, folder: Path) -> dict[str, Any]:
    """Private memory of a process that loads, with ten times the samples over with 4,000."""
    found = {}
    for samples in (4_000, 40_000):
        write(folder / f"{samples}.beton", samples)
        found[samples] = [lines(MEMORY, folder / f"{samples}.beton")[0] for _ in range(min(5, config.rounds))]
    ratio = summary([large / small for small, large in zip(*found.values(), strict=True)])
    return {"private_memory_ratio": ratio, "private_mb": {samples: summary(values) for samples, values in found.items()}}


def opening(config: EngineBenchmark, folder: Path) -> dict[str, Any]:
    """Seconds to open one file of so many samples, again and again."""
    write(folder / "large.beton", config.samples, side=16)
    seconds = lines(OPENING, folder / "large.beton")[1:]
    return {"samples": config.samples, "seconds_to_open": {"worst": max(seconds), **summary(seconds)}}


def fresh_opening(pattern: Path, files: list[Path], *, cold: bool) -> float:
    """Seconds to open a set in a fresh process, its imports not counted."""
    for path in files if cold else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return lines(OPENING, pattern)[0]


def shards(config: EngineBenchmark, folder: Path) -> dict[str, Any]:
    """Opening, shuffle and work of a batch of many shards, beside one small file."""
    write(folder / "million.beton", config.samples, SHARDS)
    write(folder / "thousand.beton", 1_000)
    pattern = shard_path(folder / "million.beton", "*", SHARDS)
    files = sorted(folder.glob("million-*.beton"))
    sides = {state: functools.partial(fresh_opening, pattern, files, cold=state == "cold") for state in ("warm", "cold")}
    seconds = interleave(sides, config.rounds, pause=0)
    result: dict[str, Any] = {"samples": config.samples, "shards": SHARDS, "side": SIDE}
    result["seconds_to_open"] = {state: {"worst": max(times), **summary(times)} for state, times in seconds.items()}
    with open_beton(pattern) as beton:
        assert isinstance(beton, ShardedBeton)
        numbers = np.repeat(np.arange(SHARDS, dtype=np.uint32), [len(shard) for shard in beton.shards])
        result["shuffle"] = {sampling: shuffle(beton.labels, sampling, numbers) for sampling in ("shuffle", "shards")}
    for path in files:
        path.read_bytes()  # into the page cache
    result["cpu_seconds_per_batch"] = {"with decoding": per_batch(folder / "thousand.beton", pattern, config)}
    # The same, but samples are found and not read: a million of them do not fit into a cache as a thousand do.
    with mock.patch("fastretina.loading.batches.decode", lambda beton, index, target, **options: beton.at(index)):
        result["cpu_seconds_per_batch"]["without decoding"] = per_batch(folder / "thousand.beton", pattern, config)
    return result


def shuffle(labels: NDArray[np.int64], sampling: Sampling, numbers: NDArray[np.uint32]) -> dict[str, Any]:
    """Wall and CPU seconds, and peak bytes, of one epoch's order; the peak as numpy reports its allocations."""
    wall, cpu = [], []
    for epoch in range(21):
        started, busy = time.perf_counter(), time.process_time()
        epoch_order(labels, sampling, 0, epoch, numbers)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - busy)
    tracemalloc.start()
    epoch_order(labels, sampling, 0, 0, numbers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": {"best": min(wall[1:]), **summary(wall[1:])}, "cpu_seconds": summary(cpu[1:]), "peak_bytes": peak}


def cpu_per_batch(stream: Iterator[Any], batches: int) -> float:
    """Seconds of CPU per batch, all threads together: what the machine's other tenants do changes that less than the clock."""
    start = time.process_time()
    for _ in range(batches):
        next(stream)
    return (time.process_time() - start) / batches


@contextmanager
def one_core() -> Iterator[None]:
    """This process and the threads that it starts on one core: the cores of a rented machine can differ by half."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def paired(found: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    """Medians of two sides, and of their ratio round by round."""
    ratio = [a / b for a, b in zip(found[over], found[under], strict=True)]
    return {side: summary(values) for side, values in found.items()} | {"ratio": summary(ratio)}


def per_batch(small: Path, large: Path, config: EngineBenchmark) -> dict[str, Any]:
    """CPU of a batch of 64 from either set, interleaved, and their ratio."""
    settings: dict[str, Any] = {"batch_size": 64, "resolution": SIDE, "workers": 1}
    with one_core(), Loader(small, **settings) as thousand, Loader(large, **settings) as million:
        loaders = {"thousand": thousand, "million": million}
        streams = {name: itertools.chain.from_iterable(itertools.repeat(loader)) for name, loader in loaders.items()}
        sides = {name: functools.partial(cpu_per_batch, stream, config.batches) for name, stream in streams.items()}
        return paired(interleave(sides, config.rounds, pause=0), "million", "thousand")


def remote(config: EngineBenchmark, folder: Path) -> dict[str, Any]:
    """Images/s of 512 px of whole epochs from 8 shards, read directly and by file:// through a cache that holds them."""
    settings: dict[str, Any] = {"batch_size": 64, "resolution": 512, "dtype": torch.uint8, "augment": Augment.none()}
    write(folder / "set.beton", 1_600, 8, 512)
    cache = Cache(folder / "cache", limit=1 << 40)
    with (
        Loader(folder / "set-*.beton", **settings) as local,
        Loader(f"file://{folder}/set-*.beton", cache=cache, **settings) as cached,
    ):

        def epoch(loader: Loader) -> float:
            started = time.perf_counter()
            images = sum(len(batch.ids) for batch in loader)
            return images / (time.perf_counter() - started)

        sides = {"local": lambda: epoch(local), "cached": lambda: epoch(cached)}
        return paired(interleave(sides, config.rounds, pause=0), "cached", "local")


def one_process(answers: Connection, data: Path, core: int) -> None:
    """One process: on (kind, seconds) answers images/s, until None."""
    os.sched_setaffinity(0, {core})  # before the loader starts its thread, which inherits it
    torch.set_num_threads(1)
    with Loader(data, batch_size=32, resolution=512, workers=1) as loader:
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
            answers.send(throughput(kinds[kind], seconds))


def throughput(make: Callable[[], int], seconds: float) -> float:
    """Images/s, over so many seconds."""
    for _ in range(AHEAD):
        make()
    images, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        images += make()
    return images / (now - start)


@contextmanager
def started(data: Path, cores: list[int]) -> Iterator[list[Connection]]:
    """A process on each of these cores; their ends of the pipes."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in cores]
    processes = [spawn.Process(target=one_process, args=(theirs, data, core), daemon=True)
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


def together(asked: list[Connection], kind: str, seconds: float) -> float:
    """Images/s of these processes at the same time, their sum."""
    for one in asked:
        one.send((kind, seconds))
    answers: list[float] = [one.recv() for one in asked]
    return sum(answers)


def processes(config: EngineBenchmark, folder: Path) -> dict[str, Any]:
    """Images/s of a loader on each core, pinned there and with one thread, alone and all together; all augmentation at 512 px."""
    if not config.data.is_file():
        raise UsageError(f"{config.data}: no such file; make data makes it")
    cores = sorted(os.sched_getaffinity(0))
    kinds = ("loader", "decode")
    with started(config.data, cores) as pipes:
        groups = {f"core {core} alone": [one] for core, one in zip(cores, pipes, strict=True)} | {"together": pipes}
        sides = {(kind, name): functools.partial(together, group, kind, config.seconds)
                 for kind in kinds for name, group in groups.items()}  # fmt: skip
        found = interleave(sides, config.rounds, pause=0)
    result: dict[str, Any] = {"cores": cores}
    for kind in kinds:
        alone = [sum(each) for each in zip(*(found[kind, name] for name in groups if name != "together"), strict=True)]
        share = summary([all_ / sum_ for all_, sum_ in zip(found[kind, "together"], alone, strict=True)])
        result[kind] = {"images_per_second": {name: summary(found[kind, name]) for name in groups}, "share": share}
    return result


PIECES: dict[Piece, Callable[[EngineBenchmark, Path], dict[str, Any]]] = {
    "errors": errors, "memory": memory, "opening": opening, "shards": shards, "remote": remote, "processes": processes,
}  # fmt: skip


def main(config: EngineBenchmark) -> None:
    """Error latency, memory and opening time of the loader; what shards, a cache and several processes cost."""
    result: dict[str, Any] = {"benchmark": "engine", "command": command()}
    for piece in config.only:
        with tempfile.TemporaryDirectory(prefix="fastretina-engine-") as name:
            result[piece] = PIECES[piece](config, Path(name))
        save(config.json, result)
        print(f"{piece}: {json.dumps(brief(result[piece]), indent=2)}", flush=True)


if __name__ == "__main__":
    run(EngineBenchmark, main)
