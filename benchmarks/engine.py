"""The loader's promises that are numbers but not rates: how fast errors arrive, what memory and opening cost at scale.

    python benchmarks/engine.py --json out.json

Every figure is taken in a fresh process on files that this script makes in a temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from measure import save, summary

from fastretina.beton.writer import BetonWriter
from fastretina.cli import run

MEMORY = """
import os, sys
sys.path.insert(0, sys.argv[2])
from measure import private_bytes
from fastretina import Loader
with Loader(sys.argv[1], batch_size=64, resolution=128) as loader:
    for number, batch in enumerate(loader):
        if number == 60:
            break
    print(private_bytes(os.getpid()))
"""

OPENING = """
import sys, time
from fastretina.beton.reader import Beton
Beton(sys.argv[1])
for _ in range(7):
    start = time.perf_counter()
    beton = Beton(sys.argv[1])
    print(time.perf_counter() - start)
"""

ERRORS = """
import sys, time
import fastretina.loading.batches
from fastretina import Loader
from fastretina.errors import FastretinaError

decode = fastretina.loading.batches.decode
place, struck = -1, 0.0

def failing(beton, index, target, **options):
    global struck
    if index == place:
        struck = time.perf_counter()
        raise RuntimeError("a stage that fails")
    decode(beton, index, target, **options)

fastretina.loading.batches.decode = failing
for number in range(20):
    place, struck = 75 * number + 3, 0.0
    with Loader(sys.argv[1], batch_size=32, resolution=128, seed=number) as loader:
        try:
            for batch in loader:
                pass
        except RuntimeError:
            print(time.perf_counter() - struck)
"""


@dataclass(frozen=True)
class EngineBenchmark:
    """Error latency, memory and opening time of the loader."""

    json: Path | None = None
    """Where to write the results."""
    samples: int = 1_000_000
    """Samples of the large file."""


def write(path: Path, count: int, side: int) -> None:
    """`count` samples of `side` px; small ones share their bytes, which neither memory nor opening depends on."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(smooth), quality=80)
    crc = zlib.crc32(jpeg)
    with BetonWriter(path, count) as writer:
        for number in range(count):
            writer.add(jpeg, crc, name=f"{number // 2}_{'left' if number % 2 else 'right'}", label=number % 5, id=number,
                       width=side, height=side)  # fmt: skip
        writer.finish({})


def lines(code: str, path: Path) -> list[float]:
    """What a fresh process prints when it runs `code` on `path`."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parent)], check=True, capture_output=True, text=True
    )
    return [float(line) for line in done.stdout.split()]


def main(config: EngineBenchmark) -> None:
    """Error latency, memory and opening time of the loader."""
    with tempfile.TemporaryDirectory(prefix="fastretina-engine-") as name:
        folder = Path(name)
        small, large, million = folder / "small.beton", folder / "large.beton", folder / "million.beton"
        write(small, 4_000, 128)
        write(large, 40_000, 128)
        started = time.perf_counter()
        write(million, config.samples, 16)
        wrote = time.perf_counter() - started
        errors = lines(ERRORS, small)
        memory = {path.stem: [lines(MEMORY, path)[0] for _ in range(5)] for path in (small, large)}
        opening = lines(OPENING, million)
    ratio = summary([b / a for a, b in zip(memory["small"], memory["large"], strict=True)])
    result: dict[str, Any] = {
        "benchmark": "engine",
        "command": " ".join(["python", *sys.argv]),
        "seconds_until_an_error_arrives": {"places": len(errors), "worst": max(errors), **summary(errors)},
        "private_memory_ratio_40000_over_4000_samples": ratio,
        "private_memory_mb": {name: summary(values)["median"] / 1e6 for name, values in memory.items()},
        f"seconds_to_open_{config.samples}_samples": {"worst": max(opening), **summary(opening)},
        "seconds_to_write_them": wrote,
    }
    print(f"a stage that raises, at {len(errors)} places: at the consumer after {max(errors) * 1e3:.1f} ms at worst")
    print(f"private memory, 40,000 over 4,000 samples: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    print(f"opening {config.samples:,} samples: {summary(opening)['median'] * 1e3:.1f} ms (worst {max(opening) * 1e3:.1f} ms)")
    save(config.json, result)


if __name__ == "__main__":
    run(EngineBenchmark, main)
