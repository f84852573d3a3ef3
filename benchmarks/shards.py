"""What a million samples in 64 shards cost beside a thousand in one file: opening, the epoch's shuffle, the work per batch.

    python benchmarks/shards.py --json out.json
    python benchmarks/shards.py --remote --json out.json     # instead: the same shards through a cache, filled, beside local files

Made in a temporary folder (2 GB): small JPEGs, all the same. Opening is measured in
fresh processes, warm (the files in the page cache) and cold (each file's pages dropped by posix_fadvise first, which asks the
kernel and cannot make the disk's own cache forget). Batches are measured on one core, from the page cache: a thousand samples are
always in it, and what a million cost beyond that is the disk's.
"""

from __future__ import annotations

import functools
import itertools
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
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import simplejpeg
import torch
from measure import interleave, save, summary
from numpy.typing import NDArray

from fastretina import Loader
from fastretina.beton.open import open_beton
from fastretina.beton.paths import shard_path, shard_rows
from fastretina.beton.remote import Cache
from fastretina.beton.shards import ShardedBeton
from fastretina.beton.writer import BetonWriter
from fastretina.cli import run
from fastretina.loading.augment import Augment
from fastretina.loading.sampler import Sampling, epoch_order

BATCHES = 150  # of 64, one measurement
OPENING = """
import sys, time
from fastretina.beton.shards import open_beton
start = time.perf_counter()
with open_beton(sys.argv[1]) as beton:
    print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class ShardsBenchmark:
    """Opening, shuffle and work per batch of many shards, beside one small file."""

    json: Path | None = None
    """Where to write the results."""
    samples: int = 1_000_000
    """Samples of the large set."""
    shards: int = 64
    """Files of the large set."""
    side: int = 128
    """Side of the images, px: a million of 512 px would need 40 GB of disk, and hide what a batch costs besides decoding."""
    remote: bool = False
    """Measure only what reading through a filled cache costs beside reading the same files directly."""
    rounds: int = 15
    """Interleaved rounds."""


def write(out: Path, samples: int, shards: int, side: int) -> None:
    """Shards as tools/write_beton.py makes them, of `samples` equal images of `side` px; one file if `shards` is 1."""
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


def opening(pattern: Path, files: list[Path], *, cold: bool) -> float:
    """Seconds to open a set in a fresh process, its imports not counted."""
    for path in files if cold else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    done = subprocess.run([sys.executable, "-c", OPENING, str(pattern)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def through_cache(config: ShardsBenchmark) -> dict[str, Any]:
    """Images/s of 512 px of whole epochs from 8 shards, read directly and by file:// through a cache that holds them."""
    settings: dict[str, Any] = {"batch_size": 64, "resolution": 512, "dtype": torch.uint8, "augment": Augment.none()}
    with tempfile.TemporaryDirectory(prefix="fastretina-shards-") as name:
        folder = Path(name)
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
            rates = interleave(sides, config.rounds, pause=0)
    ratio = [cached / local for cached, local in zip(rates["cached"], rates["local"], strict=True)]
    return {**{name: summary(values) for name, values in rates.items()}, "ratio": summary(ratio)}


def batches(epochs: Iterator[Any]) -> float:
    """Seconds of CPU per batch, all threads together: what the machine's other tenants do changes that less than the clock."""
    start = time.process_time()
    for _ in range(BATCHES):
        next(epochs)
    return (time.process_time() - start) / BATCHES


@contextmanager
def one_core() -> Iterator[None]:
    """This process and the threads that it starts on one core: the cores of a rented machine can differ by half."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def into_page_cache(files: list[Path]) -> None:
    """Read these files."""
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def per_batch(small: Path, large: Path, config: ShardsBenchmark) -> dict[str, Any]:
    """CPU of a batch of 64 from either set, interleaved, and their ratio."""
    settings: dict[str, Any] = {"batch_size": 64, "resolution": config.side, "workers": 1}
    with one_core(), Loader(small, **settings) as thousand, Loader(large, **settings) as million:
        loaders = {"thousand": thousand, "million": million}
        streams = {name: itertools.chain.from_iterable(itertools.repeat(loader)) for name, loader in loaders.items()}
        sides = {name: functools.partial(batches, stream) for name, stream in streams.items()}
        seconds = interleave(sides, config.rounds, pause=0)
    ratio = [large / small for large, small in zip(seconds["million"], seconds["thousand"], strict=True)]
    return {**{name: summary(times) for name, times in seconds.items()}, "ratio": summary(ratio)}


def without_decoding(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The same, but samples are found and not read: a million of them do not fit into a cache as a thousand do."""
    with mock.patch("fastretina.loading.batches.decode", lambda beton, index, target, **options: beton.at(index)):
        return measure(*given)


def shuffle(labels: NDArray[np.int64], sampling: Sampling, shards: NDArray[np.uint32]) -> dict[str, Any]:
    """Wall and CPU seconds, and peak bytes, of one epoch's order; the peak as numpy reports its allocations."""
    wall, cpu = [], []
    for epoch in range(21):
        started, busy = time.perf_counter(), time.process_time()
        epoch_order(labels, sampling, 0, epoch, shards)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - busy)
    tracemalloc.start()
    epoch_order(labels, sampling, 0, 0, shards)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": {"best": min(wall[1:]), **summary(wall[1:])}, "cpu_seconds": summary(cpu[1:]), "peak_bytes": peak}


def main(config: ShardsBenchmark) -> None:
    """Opening, shuffle and work per batch of many shards, beside one small file."""
    result: dict[str, Any] = {"benchmark": "shards", "command": " ".join(["python", *sys.argv])}
    if config.remote:
        found = through_cache(config)
        ratio = found["ratio"]
        print(f"images/s through a filled cache, over local: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
        save(config.json, result | {"images_per_second": found})
        return
    with tempfile.TemporaryDirectory(prefix="fastretina-shards-") as name:
        folder = Path(name)
        write(folder / "million.beton", config.samples, config.shards, config.side)
        write(folder / "thousand.beton", 1_000, 1, config.side)
        pattern = shard_path(folder / "million.beton", "*", config.shards)
        files = sorted(folder.glob("million-*.beton"))
        sides = {state: functools.partial(opening, pattern, files, cold=state == "cold") for state in ("warm", "cold")}
        result["seconds_to_open"] = {state: {"worst": max(times), **summary(times)}
                                     for state, times in interleave(sides, config.rounds, pause=0).items()}  # fmt: skip
        with open_beton(pattern) as beton:
            assert isinstance(beton, ShardedBeton)
            shards = np.repeat(np.arange(config.shards, dtype=np.uint32), [len(shard) for shard in beton.shards])
            result["shuffle"] = {sampling: shuffle(beton.labels, sampling, shards) for sampling in ("shuffle", "shards")}
        into_page_cache(files)
        result["cpu_seconds_per_batch"] = {
            "with decoding": per_batch(folder / "thousand.beton", pattern, config),
            "without decoding": without_decoding(per_batch, folder / "thousand.beton", pattern, config),
        }
    result |= {"samples": config.samples, "shards": config.shards, "side": config.side}
    for state, times in result["seconds_to_open"].items():
        print(f"opening {config.samples:,} samples, {state}: {times['median']:.3f} s (worst {times['worst']:.3f} s)")
    for sampling, found in result["shuffle"].items():
        print(f"{sampling}: {found['seconds']['median'] * 1e3:.1f} ms (CPU {found['cpu_seconds']['median'] * 1e3:.1f} ms), "
              f"peak {found['peak_bytes'] / 1e6:.1f} MB")  # fmt: skip
    for kind, found in result["cpu_seconds_per_batch"].items():
        ratio = found["ratio"]
        low, high = ratio["low"], ratio["high"]
        print(f"CPU a batch {kind}, million over thousand samples: {ratio['median']:.3f} ({low:.3f} to {high:.3f})")
    save(config.json, result)


if __name__ == "__main__":
    run(ShardsBenchmark, main)
