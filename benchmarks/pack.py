"""Packing 512 x 512 JPEGs into a .beton: fastretina beside FFCV's DatasetWriter, interleaved in one run.

Both read the same files from page cache with the same number of workers. FFCV decodes and re-encodes (quality 90);
fastretina keeps the bytes, and also decodes and looks at each (a third side does not: --no-check), checks headers, computes
checksums, fsyncs and verifies its tables. Throughput is images
by the time of the whole call, with the start of worker processes on FFCV's side, as a user has it. See --help.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from measure import command, interleave, save, summary
from photographs import sample, views
from PIL import Image

from fastretina.cli import run
from fastretina.errors import RunError
from fastretina.packing.pack import write_beton


@dataclass(frozen=True)
class PackBenchmark:
    """Packing throughput of fastretina and of stock FFCV on the same images."""

    count: int = 2000
    """Images."""
    images: Path | None = None
    """A folder of JPEGs of --size to take them from; default: made from the photograph in the package."""
    workers: int = 2
    """Workers of either side."""
    rounds: int = 5
    """Timed rounds, after an untimed one."""
    size: int = 512
    """Pixels a side."""
    json: Path | None = None
    """Where to write the result."""


def make_images(folder: Path, count: int, size: int) -> list[Path]:
    """`count` different JPEGs of some 43 KB (at 512 px), as photographs.py makes them."""
    pictures = views(size, seed=0)
    paths = [folder / f"{number // 2}_{'left' if number % 2 else 'right'}.jpeg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(sample(number, 0, pictures))
    return paths


class PillowDataset:
    """What FFCV's DatasetWriter is fed with: (PIL image, grade) by index."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self._paths[index]) as image:
            return image.convert("RGB"), index % 5


def main(config: PackBenchmark) -> None:
    """Packing throughput of fastretina and of stock FFCV (DatasetWriter, write_mode jpg) on the same images."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        raise RunError(f"FFCV cannot be imported ({error}); install it with: pip install -e '.[ffcv]'") from None

    with tempfile.TemporaryDirectory(prefix="fastretina-pack-") as name:
        folder = Path(name)
        paths = _paths(config, folder)
        labels = folder / "labels.csv"
        labels.write_text("image,level\n" + "".join(f"{path.name},{i % 5}\n" for i, path in enumerate(paths)))
        mean_kb = sum(path.stat().st_size for path in paths) / len(paths) / 1e3

        def ours(check: bool) -> float:
            out = folder / "ours.beton"
            out.unlink(missing_ok=True)
            started = time.perf_counter()
            done = write_beton(out, images=paths[0].parent, labels=labels, size=config.size, workers=config.workers, check=check)
            seconds = time.perf_counter() - started
            if done.passed != len(paths):
                raise RunError(f"only {done.passed} of {len(paths)} images pass through; give 512 x 512 baseline JPEGs")
            return len(paths) / seconds

        def ffcv() -> float:
            out = folder / "ffcv.beton"
            out.unlink(missing_ok=True)
            fields = {"image": RGBImageField(write_mode="jpg", max_resolution=config.size), "label": IntField()}
            started = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                DatasetWriter(str(out), fields, num_workers=config.workers).from_indexed_dataset(PillowDataset(paths))
            return len(paths) / (time.perf_counter() - started)

        sides: dict[str, Callable[[], float]] = {
            "fastretina": partial(ours, True),
            "fastretina_unchecked": partial(ours, False),
            "ffcv": ffcv,
        }
        found = interleave(sides, config.rounds)
    result: dict[str, Any] = {
        "benchmark": "pack",
        "command": command(),
        "images": len(paths),
        "mean_kb": round(mean_kb, 1),
        "workers": config.workers,
        "unit": "images/s",
        **{side: summary(throughput) for side, throughput in found.items()},
        "ratio": summary([a / b for a, b in zip(found["fastretina"], found["ffcv"], strict=True)]),
        "ratio_unchecked": summary([a / b for a, b in zip(found["fastretina_unchecked"], found["ffcv"], strict=True)]),
        "rounds": found,
    }
    for side in (*found, "ratio", "ratio_unchecked"):
        one = result[side]
        print(f"{side:>20}: {one['median']:,.1f} ({one['low']:,.1f} to {one['high']:,.1f}, n = {one['n']})")
    save(config.json, result)


def _paths(config: PackBenchmark, folder: Path) -> list[Path]:
    if config.images is None:
        made = folder / "images"
        made.mkdir()
        return make_images(made, config.count, config.size)
    found = sorted(path for path in config.images.iterdir() if path.suffix.lower() in (".jpeg", ".jpg"))[: config.count]
    if not found:
        raise RunError(f"{config.images}: holds no JPEGs")
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the peers' thread pools would spin on the cores that are measured
    run(PackBenchmark, main)
