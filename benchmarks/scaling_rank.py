"""One rank of scaling.py's measurements: `python scaling_rank.py DATA TASK_JSON`, under torchrun or with its environment by hand.

Rank 0 prints one line of JSON, after a mark.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastretina.loading.augment import Augment
from fastretina.loading.loader import Loader
from fastretina.models.resnet import build_model
from fastretina.training.distributed import World, joined, without_sum

Timings = dict[str, dict[str, float]]  # of a round: kind of step, "wall" or "cpu", seconds
MARK = "\x1e"  # starts our line; torchrun's are passed over


@dataclass(frozen=True)
class RankTask:
    """arch, resolution (px), rank_batch (images): of the step. rounds: so often each kind of step is timed, in turn."""

    arch: str
    resolution: int
    rank_batch: int
    rounds: int


def timed(work: Callable[[], object], world: World) -> dict[str, float]:
    """Wall seconds, from when all ranks begin to when this one is done, and CPU seconds of this process with all its threads."""
    world.largest(0)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(task: RankTask, data: Path, world: World) -> list[Timings]:
    """Rounds of: a step without its all-reduce, the all-reduce alone, loading alone, and a training step with all three."""
    torch.manual_seed(0)
    model = build_model(task.arch)
    forward = world.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    # Decoded anew each time, as in an epoch of a data set that does not fit memory.
    with Loader(
        data, task.rank_batch * world.size, resolution=task.resolution, workers=1, augment=Augment(), rank=world.rank,
        world_size=world.size, drop_last=True,
    ) as loader:  # fmt: skip

        def endless() -> Any:
            while True:
                yield from loader

        batches = endless()
        fixed = next(batches)

        def step(batch: Any, context: Any) -> None:
            with context:
                loss = nn.functional.cross_entropy(forward(batch.images), batch.labels)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
            optimizer.step()

        kinds: dict[str, Callable[[], object]] = {
            "step": lambda: step(fixed, without_sum(forward)),
            "all_reduce": lambda: world.sum(gradients)(),
            "train": lambda: step(next(batches), without_sum(None)),
        }
        for work in kinds.values():
            work()
        found = []
        for _ in range(task.rounds):
            taken = {name: timed(work, world) for name, work in kinds.items()}
            # The loader works ahead while others are timed: a training step in a row of its own finds no batch ready but what it
            # has loaded itself.
            taken["train"] = mean_of_row(kinds["train"], world)
            found.append(taken)
    return found


def mean_of_row(work: Callable[[], object], world: World, warm: int = 3, counted: int = 4) -> dict[str, float]:
    """Mean seconds of `counted` steps after `warm` that empty the loader's store of batches."""
    for _ in range(warm):
        work()
    taken = [timed(work, world) for _ in range(counted)]
    return {key: statistics.fmean(part[key] for part in taken) for key in taken[0]}


def main() -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        rounds = world.gather(measure(RankTask(**json.loads(sys.argv[2])), Path(sys.argv[1]), world))
        if world.is_main:
            print(MARK + json.dumps(rounds), flush=True)


if __name__ == "__main__":
    main()
