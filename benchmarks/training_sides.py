"""The contestants of throughput.py that train, on a CPU: what a loader costs the model that waits for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sides import Epoch, Task
    from training_step import TrainingStep


class Training:
    """Training steps on one loader, on a CPU: on a GPU they are headline.py's.

    `extra` holds the step's FLOPs for an image, and the seconds that all epochs so far have waited for data.
    """

    steps = 16  # of an epoch

    def __init__(self, task: Task, batches: Callable[[TrainingStep], Iterator[tuple[Any, Any]]]) -> None:
        """batches: without end, for this step."""
        import torch
        from training_step import TrainingStep

        self.step = TrainingStep("resnet18", task.batch_size, task.resolution, torch.device(task.device), None)
        self.extra = {"flops": float(self.step.flops()), "wait": 0.0}
        self.step.warm_up()
        self.batches = batches(self.step)

    def __call__(self) -> Iterator[int]:
        for _ in range(self.steps):
            asked = time.perf_counter()
            images, labels = next(self.batches)
            self.extra["wait"] += time.perf_counter() - asked
            self.step(images, labels)
            yield len(labels)


def train_fastretina(task: Task) -> Epoch:
    """Training from the streaming loader, rotation and flips on."""
    from fastretina.loading.loader import Loader

    loader = Loader(task.data, task.batch_size, resolution=task.resolution, workers=task.workers)
    return Training(task, lambda step: ((batch.images, batch.labels) for _ in itertools.count() for batch in loader))


def train_synthetic(task: Task) -> Epoch:
    """The same steps on one batch that is there already: the model's own limit."""
    return Training(task, lambda step: itertools.repeat(step.random_batch()))
