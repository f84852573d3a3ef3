"""Who decodes for a device: the CPU's threads or a decoder on the device, by name or by a short trial on the file itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastretina.beton_format import MODE_JPEG
from fastretina.decode.gpu import Backend, make_decoder
from fastretina.errors import FastretinaError, LoaderError, SampleError, UsageError
from fastretina.streams import current_stream, mark

if TYPE_CHECKING:
    from fastretina.feed import Feed

TRIAL_SECONDS = 0.3  # for each side, after a first batch that is not timed
TRIAL_BATCH = 256  # at most; a device wants many at a time
# The device must win clearly: what it decodes with, it does not train with, and the CPU's threads have nothing else to do.
GPU_MUST_WIN_BY = 1.1


@dataclass(frozen=True)
class DecodeChoice:
    """backend: what decodes on the device; None: the CPU does. note: where decoding happens and why, for the user."""

    backend: Backend | None
    note: str


def cpu_threads(workers: int) -> str:
    """`3 CPU threads`."""
    return f"{workers} CPU thread{'s' if workers > 1 else ''}"


def choose_decode(feed: Feed, device: torch.device, mode: str, decoder: str | None, workers: int) -> DecodeChoice:
    """Decide for `mode` ("auto", "cpu" or "gpu"); `decoder` as in make_decoder.

    Raises, for "gpu" alone, UsageError where the file needs another size than its own, LoaderError where no decoder starts.
    """
    if mode == "cpu":
        return DecodeChoice(None, cpu_threads(workers))
    if decoder is None and mode == "auto" and device.type != "cuda":
        return DecodeChoice(None, cpu_threads(workers))
    full = int(feed.beton.widths.max()), int(feed.beton.heights.max())
    if feed.sizes.largest != full:
        if mode == "gpu":
            raise UsageError(
                f"decode='gpu' decodes at full size, {full[0]} x {full[1]} px; for resolution {feed.settings.resolution} the CPU "
                "decodes at a fraction of it: use decode='auto'"
            )
        return DecodeChoice(None, f"{cpu_threads(workers)} (at a fraction of the files' size, which no GPU decoder does)")
    try:
        backend = make_decoder(device, decoder, workers)
        if mode == "gpu":
            return DecodeChoice(backend, f"the GPU ({backend.name})")
        on_device, on_cpu = device_rate(feed, device, backend), cpu_rate(feed, workers)
    except (FastretinaError, RuntimeError) as error:
        if mode == "gpu":
            raise
        return DecodeChoice(None, f"{cpu_threads(workers)} ({str(error).splitlines()[0]})")
    rates = f"trial: {backend.name} {on_device:,.0f} img/s, {cpu_threads(workers)} {on_cpu:,.0f}"
    if on_device > GPU_MUST_WIN_BY * on_cpu:
        return DecodeChoice(backend, f"the GPU ({rates})")
    return DecodeChoice(None, f"{cpu_threads(workers)} ({rates})")


def _until(seconds: float, work: Callable[[], int], finish: Callable[[], None] = lambda: None) -> float:
    """Images per second of calling `work`, which returns how many it made, for so long; the first call is not timed."""
    work()
    finish()
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += work()
    finish()
    return images / (time.perf_counter() - start)


def device_rate(feed: Feed, device: torch.device, backend: Backend, seconds: float = TRIAL_SECONDS) -> float:
    """Images per second that a device decoder makes of the file's first samples. LoaderError where it makes none of most."""
    beton = feed.beton
    indices = [i for i in range(min(len(beton), TRIAL_BATCH)) if beton.modes[i] == MODE_JPEG]
    jpegs = [beton.jpeg(i) for i in indices]
    sizes = [(int(beton.heights[i]), int(beton.widths[i])) for i in indices]

    def work() -> int:
        images = backend.decode(jpegs, sizes).images
        backend.release(mark(current_stream(device)))
        made = sum(image is not None for image in images)
        if 2 * made <= len(jpegs):
            raise LoaderError(f"{backend.name} decoded {made} of the first {len(jpegs)} samples")
        return made

    if device.type != "cuda":
        return _until(seconds, work)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        return _until(seconds, work, stream.synchronize)


def cpu_rate(feed: Feed, workers: int, seconds: float = TRIAL_SECONDS) -> float:
    """Images per second that so many threads decode, checksums included."""
    samples = itertools.cycle(range(min(len(feed.beton), TRIAL_BATCH)))
    largest = feed.sizes.largest
    memory = [np.empty((largest[1], largest[0], 3), np.uint8) for _ in range(workers)]

    def decode_some(job: tuple[int, list[int]]) -> int:
        thread, indices = job
        for index in indices:
            width, height = feed.sizes[index]
            try:
                feed.decode(index, memory[thread].reshape(-1)[: width * height * 3].reshape(height, width, 3))
            except SampleError:  # its turn to be reported comes in the epoch
                continue
        return len(indices)

    with ThreadPoolExecutor(workers) as pool:

        def work() -> int:
            jobs = [(thread, list(itertools.islice(samples, 8))) for thread in range(workers)]
            return sum(pool.map(decode_some, jobs))

        return _until(seconds, work)
