"""Runs that never were, for tests of their reports."""

from __future__ import annotations

import torch

from fastretina.grading import RETINOPATHY
from fastretina.metrics.predictions import Scores, grade_metrics
from fastretina.report import plots
from fastretina.training.progress import EpochRecord, Progress
from fastretina.training.run_info import DataInfo, RunInfo

NASTY = '<script>alert("x")</script>&.beton'


def scores(seed: int, single: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 1 if single else 5, (60,), generator=generator)
    predicted = labels if single else torch.where(torch.rand(60, generator=generator) < 0.5, labels, labels.roll(1))
    return Scores(1.0 / (seed + 1), grade_metrics(predicted, labels, RETINOPATHY))


def history(epochs: int, val: bool = False, single: bool = False) -> Progress:
    progress = Progress(epoch=epochs, best_epoch=1)
    for epoch in range(1, epochs + 1):
        held_out = scores(epoch + 200) if val else None
        progress.history.append(
            EpochRecord(epoch, 1e-3, scores(epoch), scores(epoch + 100, single), held_out, 10.0, 12.0, 0.5, 6.0)
        )
    return progress


def info(val: bool = False) -> RunInfo:
    tested = frozenset(["28", "29", *(f"t{n}" for n in range(28))])
    data = {
        "train": DataInfo(NASTY, [12] * 5, frozenset(map(str, range(30))), frozenset(map(str, range(30)))),
        "test": DataInfo("test.beton", [45, 0, 15, 0, 0], tested, tested),
    }
    if val:
        validated = frozenset(f"v{n}" for n in range(30))
        data["val"] = DataInfo("val.beton", [0, 60, 0, 0, 0], validated, validated)
    settings = {"arch": "resnet18", "resolution": 64, "train": NASTY, "weights": None, "head": "softmax"}
    return RunInfo(settings, data, "a CPU, 2 threads", "float32", "float32", "streaming", 11_179_077, RETINOPATHY, "qwk")


def batch() -> bytes:
    return plots.batch_grid(torch.zeros(16, 3, 8, 8), torch.arange(16) % 5, RETINOPATHY)
