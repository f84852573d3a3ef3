"""What torchrun starts in the tests: `python -m fastretina.train` with a network that trains in milliseconds, noting every step.

Each rank appends a line of JSON a step to FASTRETINA_STEPS/<rank>: the sample ids of its part, its loss, its process and the time.
FASTRETINA_FAULT says what happens to it, if anything: see `strike`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastretina import train
from fastretina.report.run import RunPictures
from fastretina.training import build, loop
from fastretina.training.progress import Tally

RANK = int(os.environ.get("RANK", "0"))


class Tiny(torch.nn.Sequential):
    """A backbone that normalises, and a head. No bias before BatchNorm (ResNets have none): its gradient is rounding errors alone,
    which AdamW makes whole steps of."""

    def __init__(self, outputs: int) -> None:
        super().__init__(
            torch.nn.Conv2d(3, 8, 5, stride=4, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(8, outputs),
        )  # fmt: skip


def strike(step: int, loss: torch.Tensor) -> torch.Tensor:
    """kill: rank 1 is killed after step 9, the first time. nan: its loss is spoilt then. slow: steps take 0.2 s."""
    fault = os.environ.get("FASTRETINA_FAULT")
    if fault == "slow":
        time.sleep(0.2)
    if RANK == 1 and step == 9 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "nan":
            return loss * float("nan")
    return loss


def patch() -> None:
    """Small network, no pictures at the end, steps noted."""
    build.build_model = lambda arch, outputs, **_: Tiny(outputs)
    build.load_initial = lambda *_: "given"
    RunPictures.finish = lambda pictures: None
    torch.set_num_threads(1)
    log = Path(os.environ["FASTRETINA_STEPS"]) / str(RANK)
    add = loop.Tally.add

    def noting(tally: Tally, step: int, loss: torch.Tensor, *rest: Any) -> None:
        loss = strike(step, loss)
        note = {"step": step, "ids": rest[-1].tolist(), "loss": float(loss), "pid": os.getpid(), "time": time.time()}
        with log.open("a") as file:
            file.write(json.dumps(note) + "\n")
        add(tally, step, loss, *rest)

    loop.Tally.add = noting


if __name__ == "__main__":
    patch()
    train.run_command(sys.argv[1:])
