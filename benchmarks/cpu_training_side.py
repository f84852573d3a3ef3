"""One side of cpu_training.py's epochs in a process of its own: fastretina's own training loop, or a plain one of torch's.

Run by cpu_training.py: `python cpu_training_side.py SIDE TASK_JSON`; SIDE is the loop, the workers of its DataLoader and its number
format: `fastretina-0-amp`, `pillow-2-bfloat16`, `memory-0-float32`. It trains for an epoch to warm up and says what it is, then
answers each line of standard input with the images and seconds of one more epoch. Ends with its input.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from side_process import say
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import InterpolationMode, v2

from fastretina.beton.reader import Beton
from fastretina.errors import UsageError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.system.malloc import keep_freed_memory
from fastretina.training.build import build_run
from fastretina.training.config import TrainConfig, as_settings
from fastretina.training.data import open_data
from fastretina.training.distributed import World
from fastretina.training.loop import Callbacks, fit
from fastretina.training.progress import Tally
from fastretina.training.run_folder import RunFolder

Epoch = Callable[[], tuple[int, float]]  # trains for one: images and seconds
ENDLESS = 1_000_000  # epochs of the schedule
PHOTOGRAPHS = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class EpochTask:
    """What all sides do alike. data: the .beton; images: the folder that it was packed from; resolution in px."""

    data: str
    images: str
    arch: str
    resolution: int
    batch_size: int


class Photographs(Dataset[tuple[Tensor, int]]):
    """The files of a folder as a good student reads them, each time anew: a JPEG at the nearest larger of libjpeg's scales,
    resized; then rotated by any angle, flipped and normalised."""

    def __init__(self, task: EpochTask) -> None:
        """UsageError where the folder lacks an image of the .beton."""
        files = {path.stem: path for path in Path(task.images).rglob("*") if path.suffix.lower() in PHOTOGRAPHS}
        with Beton(task.data) as beton:
            names, self.labels = list(beton.names), beton.labels.tolist()
        if missing := [name for name in names if Path(name).stem not in files and name not in files]:
            raise UsageError(f"{task.images}: {len(missing)} of {len(names)} images of {task.data} are not there: {missing[0]}")
        self.files = [files.get(name) or files[Path(name).stem] for name in names]
        self.side = task.resolution
        self.transform = v2.Compose([*geometry(), v2.PILToTensor(), *normalisation()])

    def read(self, index: int) -> Image.Image:
        """(side, side) RGB."""
        with Image.open(self.files[index]) as image:
            image.draft("RGB", (self.side, self.side))
            return image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.read(index)), self.labels[index]


class InMemory(Dataset[tuple[Tensor, int]]):
    """The same images, decoded once: (N, 3, side, side) uint8, and transformed as tensors."""

    def __init__(self, task: EpochTask) -> None:
        photographs = Photographs(task)
        self.labels = photographs.labels
        self.images = torch.stack([v2.functional.pil_to_tensor(photographs.read(index)) for index in range(len(photographs))])
        self.transform = v2.Compose([*geometry(), *normalisation()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def geometry() -> list[nn.Module]:
    """Any rotation, and flips."""
    return [v2.RandomRotation(180, InterpolationMode.BILINEAR), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]


def normalisation() -> list[nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]


DATA_SETS: dict[str, Callable[[EpochTask], Dataset[tuple[Tensor, int]]]] = {"pillow": Photographs, "memory": InMemory}


def plain(data: Dataset[tuple[Tensor, int]], task: EpochTask, workers: int, dtype: torch.dtype) -> Epoch:
    """A loop of torch's own parts, with what makes it fast on a CPU: channels-last, workers that persist, autocast in bfloat16."""
    loader = DataLoader(data, task.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    model: nn.Module = getattr(models, task.arch)(num_classes=5).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> tuple[int, float]:
        model.train()
        started, images, total = time.perf_counter(), 0, 0.0
        for batch, labels in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = criterion(model(batch.to(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimizer.step()
            images, total = images + len(labels), total + loss.item() * len(labels)
        return images, time.perf_counter() - started

    return epoch


def fastretina(task: EpochTask, amp: bool, stack: ExitStack) -> tuple[Epoch, str]:
    """The loop of `fastretina train`, with --amp or without, epoch by epoch and without the evaluations between them; and the
    precision that it has chosen. As in a run, its loader makes the first batches of an epoch before that begins."""
    keep_freed_memory()  # as the command does
    out = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastretina-cpu-"))
    config = TrainConfig(
        train=Path(task.data), test=Path(task.data), val_fraction=0.0, arch=task.arch, resolution=task.resolution, amp=amp,
        batch_size=task.batch_size, epochs=ENDLESS, schedule="constant", device="cpu", out=Path(out) / "run",
    )  # fmt: skip
    data = open_data(config, stack)
    run = build_run(config, as_settings(config), RunFolder(config.folder), World(), None, data, stack)
    training = run.training
    steps = len(training.train_loader(0))
    training.config = replace(training.config, stop_after_steps=steps)

    def epoch() -> tuple[int, float]:
        fit(training, Callbacks())  # which stops before the evaluation
        at = training.progress
        found = at.tally.images, at.tally.seconds
        at.epoch, at.batch, at.tally = at.epoch + 1, 0, Tally()
        return found

    return epoch, f"{training.precision.note}; {run.info.loader}"


def side(name: str, task: EpochTask, stack: ExitStack) -> tuple[Epoch, str]:
    """What trains for an epoch, and what it is in words."""
    loop, workers, precision = name.split("-")
    if loop == "fastretina":
        return fastretina(task, precision == "amp", stack)
    data = DATA_SETS[loop](task)
    return plain(data, task, int(workers), getattr(torch, precision)), f"torch's DataLoader, {workers} workers, {precision}"


def main() -> None:
    with ExitStack() as stack:
        started = time.perf_counter()
        epoch, description = side(sys.argv[1], EpochTask(**json.loads(sys.argv[2])), stack)
        ready = time.perf_counter() - started
        epoch()
        say({"description": description, "ready_s": ready})
        for _ in sys.stdin:
            images, seconds = epoch()
            say({"images": images, "seconds": seconds})


if __name__ == "__main__":
    main()
