"""A timeline of a few training steps, streaming: what runs beside what on the device.

    python benchmarks/timeline.py --data train.beton --decode gpu --out DIR

Leaves DIR/profile.json.gz (for chrome://tracing or Perfetto) and DIR/profile.txt: time by span, how much of each stream ran beside
the busiest one, and the kernels that took most of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from measure import hardware
from sides import Task, train_fastretina

from fastretina.cli import run
from fastretina.models.precision import choose_device
from fastretina.training.profiler import StepProfiler


@dataclass(frozen=True)
class TimelineBenchmark:
    """A timeline of a few training steps."""

    data: Path = Path("data/train.beton")
    """The .beton to train on."""
    out: Path = Path("runs/timeline")
    """The folder to write to."""
    device: Literal["cpu", "cuda"] = "cuda"
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    resident: Literal["on", "off"] = "off"
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    batch_size: int = 128
    resolution: int = 512
    """px"""
    steps: int = 5
    """Steps to record, after ten others."""


def main(config: TimelineBenchmark) -> None:
    """A timeline of a few training steps."""
    choose_device(config.device)
    config.out.mkdir(parents=True, exist_ok=True)
    workers = int(str(hardware()["cores"]))
    task = Task(str(config.data), "train", config.resolution, config.batch_size, workers, config.device, config.arch)
    training = train_fastretina(task, decode=config.decode, resident=config.resident)
    with StepProfiler(config.out, config.steps) as profiler:
        for _ in training():
            profiler.step()
            if profiler.table:
                break
    if config.device == "cuda":
        torch.cuda.synchronize()
    print(profiler.table)


if __name__ == "__main__":
    run(TimelineBenchmark, main)
