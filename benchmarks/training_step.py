"""One training step of a ResNet as the trainer takes it, where headline.py's batches come from, and one round of steps on them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastretina.errors import UsageError
from fastretina.loading.loader import Loader
from fastretina.models.precision import Precision, choose_precision
from fastretina.models.resnet import build_model
from fastretina.system.cuda import DataWait, Pace, current_stream
from fastretina.system.tracing import span
from fastretina.training.compile import StepForward, training_flops

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CLONES = 8  # batches that the side "clone" has, in rotation
ENOUGH_STEPS = 20  # for a round that its deadline cuts short
# What each side asks of the Loader. The decoder that has never been tried comes last, and the resident side does without it.
LOADERS: dict[str, dict[str, Any]] = {
    "cpu-decode": {"decode": "cpu"},
    "resident": {"decode": "cpu", "resident": "on"},
    "gpu-decode": {"decode": "gpu"},
}


class TrainingStep:
    """bfloat16 autocast on CUDA, float32 on a CPU; SGD with momentum, fused.

    Attributes:
        dtype: of the images that it is to be given.
    """

    def __init__(
        self,
        arch: str,
        batch_size: int,
        resolution: int,
        device: torch.device,
        mode: str | None,
        memory_format: str = "channels_last",
        precision: Precision | None = None,
        plain_stem: bool = False,
    ) -> None:
        """mode: torch.compile's, None: eager. memory_format: of weights and images; a key of FORMATS. precision: another than
        the device's. plain_stem: torchvision's own, on CUDA too."""
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.device, self._format = device, FORMATS[memory_format]
        self._precision = precision or choose_precision(device.type == "cuda", device, "bfloat16")
        # On a CPU the trainer's loader makes float32 too, which autocast converts.
        self.dtype = (self._precision.dtype if device.type == "cuda" else None) or torch.float32
        self.model = build_model(arch).to(device=device, memory_format=self._format)  # type: ignore[call-overload]
        if device.type == "cuda" and not plain_stem:
            from fastretina.models.stem import accelerate_stem

            accelerate_stem(self.model)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self._forward = StepForward(self.model, mode, batch_size)
        self._pace = Pace(device)
        self._shape = batch_size, 3, resolution, resolution

    def warm_up(self) -> float:
        """Compile; the seconds that it took."""
        if self._format == torch.channels_last:
            return self._forward.warm_up(self._shape, self.dtype, self.device, self._precision.autocast)
        # StepForward's images are channels-last, and it would compile once more for others.
        batch, start = self.random_batch(), time.perf_counter()
        self(*batch).item()
        return time.perf_counter() - start

    def flops(self) -> int:
        """Floating-point operations of training on one image, counted without a device."""
        return training_flops(self.model, self._shape[-1])

    def laid_out(self, images: Tensor) -> Tensor:
        """The images in its memory format: themselves where they are."""
        return images.contiguous(memory_format=self._format)

    def random_batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the right shape."""
        images = torch.randn(self._shape, device=self.device, dtype=self.dtype)
        return self.laid_out(images), torch.randint(0, 5, self._shape[:1], device=self.device)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Queue one step; its loss, which nothing has waited for."""
        self._optimizer.zero_grad(set_to_none=True)
        with span("forward"), self._precision.autocast():
            loss = torch.nn.functional.cross_entropy(self._forward(self.laid_out(images)), labels)
        with span("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with span("optimizer"):
            self._optimizer.step()
        self._pace.step()
        return loss.detach()


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
    """Epoch after epoch of full batches, rotated and flipped. What is resident is there, and a first batch has been made."""
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
