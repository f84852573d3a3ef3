"""Where the batches of headline.py come from, and one round of training steps on them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_step import TrainingStep

from fastretina.errors import UsageError
from fastretina.loading.loader import Loader
from fastretina.system.cuda import DataWait, current_stream

CLONES = 8  # batches that the side "clone" has, in rotation
ENOUGH_STEPS = 20  # for a round that its deadline cuts short
# What each side asks of the Loader. The decoder that has never been tried comes last, and the resident side does without it.
LOADERS: dict[str, dict[str, Any]] = {
    "cpu-decode": {"decode": "cpu"},
    "resident": {"decode": "cpu", "resident": "on"},
    "gpu-decode": {"decode": "gpu"},
}


class DeviceLoader(Loader):
    """The device makes its batches, on a CPU too: with Triton's interpreter, for a rehearsal."""

    _makes_on_device = True


@dataclass(frozen=True)
class Source:
    """batches: images and labels on the device, without end. description: where they come from."""

    batches: Iterator[tuple[Tensor, Tensor]]
    description: str
    close: Callable[[], None] = lambda: None


def open_loader(
    side: str, data: Path, batch_size: int, resolution: int, device: torch.device, dtype: torch.dtype, decoder: str | None
) -> Source:
    """Epoch after epoch of full batches, turned and flipped. What is resident is there, and a first batch has been made."""
    settings = LOADERS[side] | ({"decoder": decoder} if side == "gpu-decode" else {})
    loader = DeviceLoader(data, batch_size, resolution=resolution, device=device, dtype=dtype, drop_last=True, **settings)
    try:
        if not len(loader):
            raise UsageError(f"{data}: {len(loader.dataset)} samples are no batch of {batch_size}")
        loader.fill()
        batches = ((batch.images, batch.labels) for _ in itertools.count() for batch in loader)
        next(batches)
    except BaseException:
        loader.close()
        raise
    return Source(batches, loader.description, loader.close)


def clones_of(source: Source, step: TrainingStep) -> Source:
    """A few of its batches over and over, which cost nothing: the model's own limit on real images."""
    taken = [(step.laid_out(images).clone(), labels.clone()) for images, labels in itertools.islice(source.batches, CLONES)]
    return Source(itertools.cycle(taken), f"{CLONES} batches of: {source.description}")


def random_images(step: TrainingStep, why: str) -> Source:
    """Where there are no real ones."""
    return Source(itertools.cycle([step.random_batch() for _ in range(CLONES)]), f"{CLONES} batches of random images: {why}")


def one_round(step: TrainingStep, source: Source, untimed: int, steps: int, seconds: float) -> dict[str, Any]:
    """So many steps, by the clock from one synchronisation to another. RuntimeError where `seconds` pass before there are enough.

    host_wait_s: in which the host waited for batches. idle_s, on CUDA: in which the training stream stood still for want of one.
    loss: of the last step, to see that what was timed was training.
    """
    cuda = step.device.type == "cuda"
    begun = time.perf_counter()
    wait, host_wait, done = DataWait(), 0.0, -untimed
    start, loss = begun, torch.zeros(())
    while done < steps and time.perf_counter() - begun < seconds:
        if done == 0:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            wait.read()
            start, host_wait = time.perf_counter(), 0.0
        asked = time.perf_counter()
        wait.begin(current_stream(step.device))
        images, labels = next(source.batches)
        wait.end()
        host_wait += time.perf_counter() - asked
        loss = step(images, labels)
        done += 1
    if cuda:
        torch.cuda.synchronize()
    timed = time.perf_counter() - start
    if done < min(steps, ENOUGH_STEPS):
        raise RuntimeError(f"{max(0, done)} timed steps in {time.perf_counter() - begun:.0f} s")
    record: dict[str, Any] = {
        "per_second": done * len(labels) / timed, "steps": done, "seconds": timed, "host_wait_s": host_wait,
        "loss": float(loss), "took_s": time.perf_counter() - begun,
    }  # fmt: skip
    if done < steps:
        record["partial"] = True
    if cuda:
        free, total = torch.cuda.mem_get_info()
        record |= {
            "idle_s": wait.read(),
            "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
            "device_memory_gb": (total - free) / 1e9,
        }
    return record
