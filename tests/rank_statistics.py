"""What torchrun starts in a test: `rank_run`'s training, whose ranks each leave the statistics of BatchNorm that they have
estimated, before rank 0's are shared: FASTRETINA_STEPS/estimated-<rank>.pt."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import rank_run
import torch

from fastretina import train
from fastretina.training import build

if __name__ == "__main__":
    rank_run.patch()
    real = build.estimate_statistics

    def noting(model: torch.nn.Module, *rest: Any) -> None:
        real(model, *rest)
        torch.save(dict(model.named_buffers()), Path(os.environ["FASTRETINA_STEPS"]) / f"estimated-{rank_run.RANK}.pt")

    build.estimate_statistics = noting
    train.run_command(sys.argv[1:])
