"""Every sample of a .beton read and decoded once: what no longer is what was packed is found before an epoch meets it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import simplejpeg

from fastretina.beton.format import MODE_RAW
from fastretina.beton.open import open_beton
from fastretina.beton.reader import Beton
from fastretina.errors import SampleError, UsageError, printable
from fastretina.system.progress import progress_bar

_CHUNK = 16  # samples a thread checks at a time


@dataclass(frozen=True)
class VerifyReport:
    """`bad`: (index, name, reason) of each bad sample, in order."""

    path: Path
    samples: int
    checksummed: bool
    bad: tuple[tuple[int, str, str], ...]
    seconds: float

    def __str__(self) -> str:
        path, throughput = (
            printable(str(self.path)),
            f"{self.seconds:.2f} s, {self.samples / max(self.seconds, 1e-9):,.0f} images/s",
        )
        if self.bad:
            lines = [f"{index}\t{printable(name)}\t{printable(reason)}" for index, name, reason in self.bad]
            return "\n".join([*lines, f"{path}: {len(self.bad):,} of {self.samples:,} samples are bad ({throughput})"])
        how = "checksums match and all decode" if self.checksummed else "all decode; this file has no checksums"
        return f"OK: {path}: {self.samples:,} samples, {how} ({throughput})"


def verify_beton(path: str | os.PathLike[str], *, workers: int | None = None, progress: bool = False) -> VerifyReport:
    """Checksum and full strict decode of every sample of a file, or of all shards that a pattern matches.

    workers: threads; default: the usable cores.

    Raises:
        BetonError: the file's tables are corrupt, so that there are no samples to name. UsageError: workers < 1.
    """
    if workers is not None and not 1 <= workers <= 1024:
        raise UsageError(f"--workers {workers}: from 1 to 1024")
    workers = workers or len(os.sched_getaffinity(0))
    started = time.perf_counter()
    bad: list[tuple[int, str, str]] = []
    with open_beton(path) as beton, progress_bar("verifying", len(beton), unit="image", shown=progress, lines=True) as bar:
        for index, reason in enumerate(_reasons(beton, workers)):
            if reason:
                at = beton.sample_error(index, reason)
                where = "" if at.path == beton.path else f" (sample {at.index} of {at.path})"
                bad.append((index, beton.names[index], reason + where))
            bar.update()
        return VerifyReport(beton.path, len(beton), beton.crcs is not None, tuple(bad), time.perf_counter() - started)


def _reasons(beton: Beton, workers: int) -> Iterator[str]:
    """What is wrong with each sample in order; "" for a good one."""

    left = threading.Event()

    def check(start: int) -> list[str]:
        return [_check(beton, index) for index in range(start, min(start + _CHUNK, len(beton))) if not left.is_set()]

    with ThreadPoolExecutor(workers, thread_name_prefix="fastretina-verify") as threads:
        try:
            for reasons in threads.map(check, range(0, len(beton), _CHUNK)):
                yield from reasons
        finally:
            left.set()  # whoever pressed Ctrl-C need not wait for sixteen of the largest images, nor for a server
            beton.interrupt()


def _check(beton: Beton, index: int) -> str:
    try:
        if beton.modes[index] == MODE_RAW:
            beton.pixels(index)
        else:
            simplejpeg.decode_jpeg(beton.jpeg(index), strict=True)
    except SampleError as error:
        return error.reason
    except ValueError as error:
        return f"cannot be decoded: {error}"
    return ""
