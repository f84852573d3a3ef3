"""The device half piece by piece: the roofs of the device, the warp kernel, the decoders, the filling of resident memory.

    python benchmarks/device.py --data train.beton --json out.json [--only roof kernel]

Medians with intervals (see measure.summary) of synchronised repeats after untimed ones. --device cpu runs all of it on a CPU
(with TRITON_INTERPRET=1), to see that it works: its numbers say nothing.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measure import FULL_TRAIN_SET, brief, command, cpu_seconds, roof, save, summary, timed
from torch import Tensor
from training_step import DeviceLoader

from fastretina.beton.reader import Beton
from fastretina.cli import run
from fastretina.errors import FastretinaError
from fastretina.loading.augment import Augment, WarpParameters, cpu, draw
from fastretina.loading.augment.parameters import IMAGENET_MEAN, IMAGENET_STD, affine_matrices
from fastretina.loading.decode.cpu import decode
from fastretina.loading.decode.gpu import DECODERS, CodecSettings, DeviceDecoder, NvImageCodec
from fastretina.models.precision import choose_device
from fastretina.system.cuda import current_stream, mark

Piece = Literal["roof", "kernel", "decode", "shares", "fill"]
SHARES = (0.1, 0.25, 0.5, 0.75)
Keep = Callable[[dict[str, Any]], None]  # is given the part of a piece's result that is there by now
Decode = Callable[[list[memoryview], list[tuple[int, int]]], list[Tensor | None]]  # JPEGs, (height, width) -> (H, W, 3) each


@dataclass(frozen=True)
class DeviceBenchmark:
    """The pieces of the device half, measured one by one."""

    data: Path = Path("data/train.beton")
    """The .beton to decode."""
    json: Path | None = None
    """Where to write the results."""
    device: Literal["cpu", "cuda"] = "cuda"
    only: tuple[Piece, ...] = ()
    """These pieces; default: all."""
    rounds: int = 7
    """Timed repeats, after two untimed ones."""
    batch_size: int = 256
    """Images at a time."""
    resolution: int = 512
    """Side of the warp's images, px."""


def kernel(device: torch.device, config: DeviceBenchmark, copy_gb_per_second: float) -> dict[str, Any]:
    """The warp of a batch from resident uint8 to bfloat16, all of the augmentation: images/s, and bytes moved by copy bandwidth."""
    from fastretina.loading.augment.gpu import warp

    count, side = config.batch_size, config.resolution
    sources = torch.randint(0, 255, (count, side, side, 3), dtype=torch.uint8, device=device)
    addresses = sources.data_ptr() + torch.arange(count, device=device) * sources[0].numel()
    sides = torch.full((count,), side, dtype=torch.int32, device=device)
    norm = torch.from_numpy(np.ascontiguousarray(cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)[:, :3])).to(device)
    output = torch.empty((count, side, side, 3), dtype=torch.bfloat16, device=device)
    results: dict[str, Any] = {}
    sizes, one = np.full(count, side), np.ones(count)
    quarter = affine_matrices(side, sizes, sizes, np.full(count, np.pi / 2), one, one, one, np.zeros((2, count)))
    cases = [
        (name, draw(augment, side, sizes, sizes, 0, 0, np.arange(count)), augment.brightness > 0)
        for name, augment in (("rotate and flip", Augment()), ("all", Augment.full()), ("none", Augment.none()))
    ]
    # A row's source is a column then: the most cache lines that a row can lie across.
    cases.append(("a quarter turn", WarpParameters(quarter, cases[0][1].colour), False))
    for name, drawn, recolour in cases:
        affine, colour = (torch.from_numpy(part.astype(np.float32)).to(device) for part in drawn)

        def work(affine: torch.Tensor = affine, colour: torch.Tensor = colour, recolour: bool = recolour) -> None:
            warp(addresses, sides, sides, affine, colour, norm, recolour, output)

        seconds = timed(work, device, config.rounds, 10 if device.type == "cuda" else 1)
        moved = sources.numel() + output.numel() * output.element_size()
        results[name] = {
            "per_second": summary([count / s for s in seconds]),
            "gb_per_second": summary([moved / s / 1e9 for s in seconds]),
            "share_of_copy_bandwidth": summary([moved / s / 1e9 / copy_gb_per_second for s in seconds]),
        }
    return results


def ours(device: torch.device, beton: Beton, batch: int, make: Callable[[CodecSettings], NvImageCodec]) -> Decode:
    """A codec as the loader uses it, with the proof that it wrote."""
    settings = CodecSettings(device, 0, int(beton.heights.max()), int(beton.widths.max()), batch)
    decoder = DeviceDecoder(make(settings), device, int((beton.heights.astype(np.int64) * beton.widths).min()) * 3)

    def decode(jpegs: list[memoryview], sizes: list[tuple[int, int]]) -> list[Tensor | None]:
        decoded = decoder.decode(jpegs, sizes)
        decoder.release(mark(current_stream(device)))
        if decoded.unwritten:
            raise RuntimeError(
                f"{decoder.name} did not write {len(decoded.unwritten)} of {len(jpegs)} images, and said that it did"
            )
        return [decoded.image(n) if done else None for n, done in enumerate(decoded.done)]

    return decode


def torchvision(device: torch.device) -> Decode:
    """The peer: torchvision's nvJPEG."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(jpegs: list[memoryview], sizes: list[tuple[int, int]]) -> list[Tensor | None]:
        sources = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from 0.29 on it points to torchcodec
            images: list[Tensor] = decode_jpeg(sources, mode=ImageReadMode.RGB, device=device)
        return [image.permute(1, 2, 0) for image in images]

    return decode


def decoders(config: DeviceBenchmark, beton: Beton, contestants: dict[str, Callable[[], Decode]], keep: Keep) -> dict[str, Any]:
    """Every device decoder alone: images/s, CPU cores busy, and how near its pixels are to the CPU's."""
    device, size = choose_device(config.device), min(config.batch_size, len(beton))
    # Full batches only, so that a throughput is one of the batch size named.
    batches = [range(first, first + size) for first in range(0, min(len(beton), 8 * size) - size + 1, size)]
    results: dict[str, Any] = {}
    for name, contestant in contestants.items():
        try:
            decode, turns = contestant(), itertools.cycle(batches)

            def work() -> list[Tensor | None]:
                batch = next(turns)  # noqa: B023  # called before the next decoder's turn
                sizes = [(int(beton.heights[i]), int(beton.widths[i])) for i in batch]
                return decode([beton.jpeg(i) for i in batch], sizes)  # noqa: B023

            near = agreement(beton, batches[0], work())
            cpu_before, start = cpu_seconds(), time.perf_counter()
            seconds = timed(work, device, config.rounds, len(batches))
            busy = (cpu_seconds() - cpu_before) / (time.perf_counter() - start)
            results[name] = {"per_second": summary([size / s for s in seconds]), "cpu_cores": busy} | near
        except (FastretinaError, RuntimeError, ImportError) as error:
            results[name] = {"failed": str(error).splitlines()[0]}
        keep(results)
    return results


def agreement(beton: Beton, batch: range, images: list[Tensor | None]) -> dict[str, Any]:
    """How many of a batch are there, and the share of values within 3 grey levels of the CPU's."""
    shares = []
    for index, image in zip(batch, images, strict=True):
        if image is None:
            continue
        expected = np.empty(tuple(image.shape), np.uint8)
        decode(beton, index, expected, max(image.shape))
        shares.append(float((np.abs(image.cpu().numpy().astype(np.int16) - expected) <= 3).mean()))
    near = {"within_3_levels": statistics.fmean(shares), "worst": min(shares)} if shares else {}
    return {"decoded": len(shares), "of": len(batch)} | near


def all_decoders(device: torch.device, beton: Beton, batch: int) -> dict[str, Callable[[], Decode]]:
    """Those that a loader may use, the first of them without interpolated chroma, and the peer."""
    nearest = partial(NvImageCodec, fancy_upsampling=False)
    makers = dict(DECODERS) | {"nvimgcodec, nearest chroma": nearest}
    found: dict[str, Callable[[], Decode]] = {name: partial(ours, device, beton, batch, make) for name, make in makers.items()}
    return found | {"torchvision": partial(torchvision, device)}


def all_shares(device: torch.device, beton: Beton, batch: int) -> dict[str, Callable[[], Decode]]:
    """A share of each batch for the hardware engine, the rest for CUDA."""
    return {
        f"hardware {share:.0%}": partial(ours, device, beton, batch, partial(NvImageCodec, engines=engines))
        for share in SHARES
        for engines in [(("HW_GPU_ONLY", share), ("HYBRID_CPU_GPU", 1.0))]
    }


def fill(device: torch.device, config: DeviceBenchmark, keep: Keep) -> dict[str, Any]:
    """Seconds until the whole file is resident, by who decodes; and what that is for 28,100 images."""
    results: dict[str, Any] = {}
    for where in ("cpu", "gpu"):
        seconds = []
        try:
            for _ in range(max(2, min(config.rounds, 5)) + 1):
                loader = DeviceLoader(
                    config.data, config.batch_size, resolution=config.resolution, device=device, decode=where, resident="on"
                )
                with loader:
                    start = time.perf_counter()
                    loader.fill()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - start)
                    samples, description = len(loader.dataset), loader.description
        except (FastretinaError, RuntimeError) as error:
            results[where] = {"failed": str(error).splitlines()[0]}
            continue
        results[where] = {
            "seconds": summary(seconds[1:]), "samples": samples, "loader": description,
            "seconds_for_28100": summary([s * FULL_TRAIN_SET / samples for s in seconds[1:]]),
        }  # fmt: skip
        keep(results)
    return results


def main(config: DeviceBenchmark) -> int:
    """The pieces of the device half, measured one by one. 1 where one fails."""
    device = choose_device(config.device)
    result: dict[str, Any] = {"benchmark": "device", "command": command(), "batch_size": config.batch_size}
    limits = cache(lambda: roof(device, config.rounds))
    opened = cache(lambda: Beton(config.data))  # roofs and kernel need none
    where = torch.empty(0, device=device).device  # with its number

    def keep(name: Piece, found: dict[str, Any]) -> None:
        result[name] = found
        save(config.json, result)

    pieces: dict[Piece, Callable[[], dict[str, Any]]] = {
        "roof": limits,
        "kernel": lambda: kernel(device, config, limits()["copy_gb_per_second"]["median"]),
        "decode": lambda: decoders(config, opened(), all_decoders(where, opened(), config.batch_size), partial(keep, "decode")),
        "shares": lambda: decoders(config, opened(), all_shares(where, opened(), config.batch_size), partial(keep, "shares")),
        "fill": lambda: fill(device, config, partial(keep, "fill")),
    }
    failed = 0
    for name, piece in pieces.items():
        if config.only and name not in config.only:
            continue
        try:
            keep(name, piece())
        except Exception as error:
            traceback.print_exc()
            failed = 1
            keep(name, result.get(name, {}) | {"failed": f"{type(error).__name__}: {error}"})
        print(f"{name}: {json.dumps(brief(result[name]), indent=2)}", flush=True)
    return failed


if __name__ == "__main__":
    run(DeviceBenchmark, main)
