"""Who decodes for a device: the CPU's threads or a decoder on the device, by name or by a rule.

The pixels of the two differ by a few grey levels, so the rule knows no clock: the file, the settings and the number of threads
decide.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from fastretina.errors import FastretinaError, UsageError
from fastretina.loading.decode.gpu import DeviceDecoder, make_decoder

if TYPE_CHECKING:
    from fastretina.loading.batches import Feed

# What one of many threads needs for a JPEG: 15 on an Intel Xeon of 16 cores decoded 6,510 images a second of 45 KB and 512 x 512 px
# for a loader, 2.3 ms each. Alone a thread takes 1.1 ms; of 16 bare ones each takes 1.6. 55 % go by bytes (Huffman codes),
# the rest by pixels.
SECONDS_PER_BYTE, SECONDS_PER_PIXEL = 28e-9, 3.9e-9
# The fastest training step that was measured: 4,590 images a second of a ResNet18 at 512 px, 55.6 GFLOP each, on an H200.
FASTEST_FLOPS = 256e12  # a second
RESNET18_FLOPS_PER_PIXEL = 55.6e9 / 512**2
HEADROOM = 1.5  # that the CPU's threads must have over what is consumed, for slower cores and larger files


def default_workers(device: torch.device, loaders: int = 1) -> int:
    """Threads of a loader where nobody names a number: this process's cores, divided by so many loaders beside each other.

    On a GPU one fewer: with 16 on 16 cores (one run each, on an H200) a loader made 5,340 images a second, and with 15 6,510.
    """
    cores = len(os.sched_getaffinity(0)) // loaders
    return max(1, cores - (device.type == "cuda"))


def cpu_threads(workers: int) -> str:
    """`3 CPU threads`."""
    return f"{workers} CPU thread{'s' if workers > 1 else ''}"


def choose_decode(feed: Feed, device: torch.device, workers: int, batch: int) -> tuple[DeviceDecoder | None, str]:
    """What decodes on the device, None where the CPU does, and why, in words for the user; batch: as in make_decoder.

    Raises, for "gpu" alone, UsageError where the file needs another size than its own, LoaderError where no decoder starts.
    """
    config = feed.config
    mode, resolution = config.decode, config.resolution
    if mode == "cpu" or (mode == "auto" and config.decoder is None and device.type != "cuda"):
        return None, cpu_threads(workers)
    full = int(feed.beton.widths.max()), int(feed.beton.heights.max())
    if feed.sizes.largest != full:
        if mode == "gpu":
            raise UsageError(
                f"decode='gpu' decodes at full size, {full[0]} x {full[1]} px; for resolution {resolution} the CPU "
                "decodes at a fraction of it: use decode='auto'"
            )
        return None, f"{cpu_threads(workers)} (at a fraction of the files' size, which no GPU decoder does)"
    demand = FASTEST_FLOPS / (RESNET18_FLOPS_PER_PIXEL * resolution**2) if config.demand is None else config.demand
    throughput = workers / seconds_per_image(feed)
    why = f"{cpu_threads(workers)} may decode {throughput:,.0f} img/s, the step may take {demand:,.0f}"
    if mode == "auto" and throughput >= HEADROOM * demand:
        return None, f"{cpu_threads(workers)} ({why})"
    try:
        chosen = make_decoder(feed.beton, device, config.decoder, workers, batch)
    except FastretinaError as error:
        if mode == "gpu":
            raise
        return None, f"{cpu_threads(workers)} ({str(error).splitlines()[0]})"
    return chosen, f"the GPU ({chosen.name}{'' if mode == 'gpu' else f'; {why}'})"


def seconds_per_image(feed: Feed) -> float:
    """What one CPU thread may need to decode an image of this file at full size, by its mean bytes and pixels."""
    beton = feed.beton
    pixels = (beton.widths.astype(float) * beton.heights).mean()
    return float(SECONDS_PER_BYTE * beton.mean_bytes + SECONDS_PER_PIXEL * pixels)
