"""The device half piece by piece: the roofs of the device, the warp kernel, the decoders, the filling of resident memory.

    python benchmarks/device.py --data train.beton --json out.json

Medians with intervals (see measure.summary) of synchronised repeats after untimed ones. --device cpu runs all of it on a CPU
(with TRITON_INTERPRET=1), to see that it works: its figures say nothing.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measure import FULL_TRAIN_SET, hardware, summary, versions
from sides import cpu_seconds

from fastretina.augment import Augment, WarpParameters, cpu, draw
from fastretina.augment.parameters import IMAGENET_MEAN, IMAGENET_STD, affine_matrices
from fastretina.beton import Beton
from fastretina.cli import run
from fastretina.decode.cpu import decode
from fastretina.decode.gpu import DECODERS, make_decoder
from fastretina.errors import FastretinaError
from fastretina.precision import choose_device
from fastretina.streams import current_stream, mark

Piece = Literal["roof", "kernel", "decode", "fill"]


@dataclass(frozen=True)
class DeviceBenchmark:
    """The pieces of the device half, measured one by one."""

    data: Path = Path("data/train.beton")
    """The .beton to decode."""
    json: Path | None = None
    """Where to write the results."""
    device: Literal["cpu", "cuda"] = "cuda"
    only: Piece | None = None
    """One piece; default: all."""
    rounds: int = 7
    """Timed repeats, after two untimed ones."""
    batch_size: int = 256
    """Images at a time."""
    resolution: int = 512
    """Side of the warp's images, px."""


def timed(work: Callable[[], Any], device: torch.device, rounds: int, calls: int = 1) -> list[float]:
    """Seconds of one call of `work`, `rounds` times, each over so many calls."""

    def synchronised() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    found = []
    for number in range(rounds + 2):
        start = synchronised()
        for _ in range(calls):
            work()
        if number >= 2:
            found.append((synchronised() - start) / calls)
    return found


def roof(device: torch.device, rounds: int) -> dict[str, Any]:
    """The device's own limits: TFLOP/s of a square matrix product in bfloat16, GB/s of a copy (bytes read + bytes written)."""
    large = device.type == "cuda"
    side, size = (8192, 1 << 30) if large else (256, 1 << 22)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if large else torch.float32) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    product = timed(lambda: torch.matmul(a, b), device, rounds, 10)
    copy = timed(lambda: target.copy_(source), device, rounds, 10)
    return {
        "matmul_tflops": summary([2 * side**3 / seconds / 1e12 for seconds in product]),
        "copy_gb_per_second": summary([2 * size / seconds / 1e9 for seconds in copy]),
    }


def kernel(device: torch.device, config: DeviceBenchmark, copy_gb_per_second: float) -> dict[str, Any]:
    """The warp of a batch from resident uint8 to bfloat16, all of the augmentation: images/s, and bytes moved by copy bandwidth."""
    from fastretina.augment.gpu import warp

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
        for name, augment in (("turn and flip", Augment()), ("all", Augment.full()), ("none", Augment.none()))
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


def decoders(device: torch.device, config: DeviceBenchmark, workers: int = 0) -> dict[str, Any]:
    """Every device decoder alone: images/s, CPU cores busy, and how near its pixels are to the CPU's."""
    beton = Beton(config.data)
    batches = [
        range(first, min(first + config.batch_size, len(beton)))
        for first in range(0, min(len(beton), 8 * config.batch_size), config.batch_size)
    ]
    # Full batches only, so that a rate is one of the batch size named.
    batches = [batch for batch in batches if len(batch) == len(batches[0])]
    results: dict[str, Any] = {}
    for name in DECODERS:
        try:
            decoder = make_decoder(device, name, workers)
            near = agreement(decoder, beton, batches[0])
            turns = itertools.cycle(batches)

            def work() -> None:
                batch = next(turns)  # noqa: B023  # called before the next decoder's turn
                sizes = [(int(beton.heights[i]), int(beton.widths[i])) for i in batch]
                decoder.decode([beton.jpeg(i) for i in batch], sizes)  # noqa: B023
                decoder.release(mark(current_stream(device)))  # noqa: B023

            cpu_before, start = cpu_seconds(), time.perf_counter()
            seconds = timed(work, device, config.rounds, len(batches))
            busy = (cpu_seconds() - cpu_before) / (time.perf_counter() - start)
        except (FastretinaError, RuntimeError) as error:
            results[name] = {"failed": str(error).splitlines()[0]}
            continue
        results[name] = {"per_second": summary([len(batches[0]) / s for s in seconds]), "cpu_cores": busy} | near
    return results


def agreement(decoder: Any, beton: Beton, batch: range) -> dict[str, Any]:
    """How many of a batch it decodes, and the share of values within 3 grey levels of the CPU's."""
    sizes = [(int(beton.heights[i]), int(beton.widths[i])) for i in batch]
    decoded = decoder.decode([beton.jpeg(i) for i in batch], sizes)
    shares = []
    for index, size, image in zip(batch, sizes, decoded.images, strict=True):
        if image is None:
            continue
        expected = np.empty((*size, 3), np.uint8)
        decode(beton, index, max(size), expected, verify=False)
        found = (image.permute(1, 2, 0) if decoded.planar else image).cpu().numpy()
        shares.append(float((np.abs(found.astype(np.int16) - expected) <= 3).mean()))
    decoder.release(None)
    near = {"within_3_levels": statistics.fmean(shares), "worst": min(shares)} if shares else {}
    return {"decoded": len(shares), "of": len(batch)} | near


def fill(device: torch.device, config: DeviceBenchmark) -> dict[str, Any]:
    """Seconds until the whole file is resident, by who decodes; and what that is for 28,100 images."""
    from fastretina.loader import Loader

    class Resident(Loader):
        _makes_on_device = True

    results: dict[str, Any] = {}
    for where in ("cpu", "gpu"):
        seconds = []
        try:
            for _ in range(max(2, min(config.rounds, 5)) + 1):
                loader = Resident(
                    config.data, config.batch_size, resolution=config.resolution, device=device, decode=where, resident="on"
                )
                with loader:
                    start = time.perf_counter()
                    loader.fill()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - start)
                    samples, description = len(loader.beton), loader.description
        except (FastretinaError, RuntimeError) as error:
            results[where] = {"failed": str(error).splitlines()[0]}
            continue
        results[where] = {
            "seconds": summary(seconds[1:]), "samples": samples, "loader": description,
            "seconds_for_28100": summary([s * FULL_TRAIN_SET / samples for s in seconds[1:]]),
        }  # fmt: skip
    return results


def main(config: DeviceBenchmark) -> None:
    """The pieces of the device half, measured one by one."""
    device = choose_device(config.device)
    result: dict[str, Any] = {"benchmark": "device", "command": " ".join(["python", *sys.argv])}
    pieces: dict[Piece, Callable[[], dict[str, Any]]] = {
        "roof": lambda: roof(device, config.rounds),
        "kernel": lambda: kernel(device, config, roof(device, config.rounds)["copy_gb_per_second"]["median"]),
        "decode": lambda: decoders(device, config),
        "fill": lambda: fill(device, config),
    }
    for name, piece in pieces.items():
        if config.only in (None, name):
            result[name] = piece()
            print(f"{name}: {json.dumps(brief(result[name]), indent=2)}", flush=True)
    result |= {"batch_size": config.batch_size, "versions": versions(), "hardware": hardware()}
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(result, indent=2) + "\n")


def brief(value: Any) -> Any:
    """The same with medians in place of summaries."""
    if isinstance(value, dict):
        return f"{value['median']:,.4g}" if "median" in value else {key: brief(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    run(DeviceBenchmark, main)
