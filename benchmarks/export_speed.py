"""Grading on a CPU: an exported file in onnxruntime beside the same network in torch, eagerly, interleaved in one process.

Both have the same random weights and threads, get the same uint8 pixels and give probabilities; so normalisation and head are
timed, decoding and preparation are not. See --help.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import brief, command, interleave, save, summary

from fastretina.cli import run
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.models.checkpoint import CheckpointInfo, save_checkpoint
from fastretina.models.exported import Exported, Pixels, Run, as_onnx, onnx_run, quantised, require_onnx, with_metadata
from fastretina.models.grader import Grader
from fastretina.models.resnet import build_model


@dataclass(frozen=True)
class ExportSpeed:
    """Images/s of onnxruntime, of its int8 and of torch eager on this CPU."""

    archs: tuple[str, ...] = ("resnet18", "resnet50")
    """Networks."""
    resolutions: tuple[int, ...] = (224, 512)
    """Side of the input in pixels."""
    batches: tuple[int, ...] = (1, 16)
    """Images at a time."""
    threads: int = 2
    """Of either side."""
    rounds: int = 7
    """Timed rounds, after an untimed one."""
    seconds: float = 1.0
    """Of calls in a round, at least; one call takes what it takes."""
    json: Path | None = None
    """Where to write the result."""


def main(config: ExportSpeed) -> None:
    """Images/s of onnxruntime, of its int8 and of torch eager on this CPU."""
    torch.set_num_threads(config.threads)
    require_onnx()
    found: list[dict[str, Any]] = []
    for arch in config.archs:
        for resolution in config.resolutions:
            pixels = np.random.default_rng(0).integers(0, 256, (max(config.batches), resolution, resolution, 3), dtype=np.uint8)
            grader = untrained(arch, resolution)
            network = Exported(grader)
            model = as_onnx(network.trace(), {})
            runs = {"torch": network.run, "onnxruntime": onnx_run(model, config.threads)}
            runs["int8"] = onnx_run(with_metadata(quantised(model), {}), config.threads)
            for count in config.batches:
                sides = {name: partial(images_per_second, run, pixels[:count], config.seconds) for name, run in runs.items()}
                rates = interleave(sides, config.rounds)
                ratios = {
                    name: [one / base for one, base in zip(rates[name], rates["torch"], strict=True)]
                    for name in runs
                    if name != "torch"
                }
                found.append({
                    "arch": arch, "resolution": resolution, "batch": count,
                    "images_per_second": {name: spread(samples) for name, samples in rates.items()},
                    "times_torch": {name: spread(samples) for name, samples in ratios.items()},
                })  # fmt: skip
                print(brief(found[-1]), flush=True)
                save(config.json, {"benchmark": "export_speed", "command": command(), "threads": config.threads, "found": found})


def spread(samples: list[float]) -> dict[str, float]:
    """Median with its interval, and the range."""
    return {**summary(samples), "least": min(samples), "most": max(samples)}


def images_per_second(run: Run, pixels: Pixels, seconds: float) -> float:
    """Of calls one after another, for so many seconds."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        run(pixels)
        calls += 1
    return calls * len(pixels) / (time.perf_counter() - start)


def untrained(arch: str, resolution: int) -> Grader:
    """A network with random weights, by way of a checkpoint, as an export has it."""
    torch.manual_seed(0)
    info = CheckpointInfo(arch, 5, resolution, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "val")
    with tempfile.TemporaryDirectory(prefix="fastretina-export-") as folder:
        save_checkpoint(Path(folder) / "best.safetensors", build_model(arch), info)
        return Grader.load(Path(folder) / "best.safetensors", device="cpu", amp="off")


if __name__ == "__main__":
    run(ExportSpeed, main)
