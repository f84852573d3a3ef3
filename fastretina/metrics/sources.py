"""Metrics of each of several packings evaluated as one data set: a model may be good for one clinic and bad for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastretina.beton.joined import SOURCE_BIT
from fastretina.grading import Classes
from fastretina.metrics.predictions import Predictions, grade_metrics
from fastretina.metrics.table import metrics_for


@dataclass(frozen=True)
class SourceMetrics:
    """Of one packing. images: how many of it there are in the set. values: the scalar metrics by name, None where undefined."""

    path: str
    images: int
    values: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {"path": self.path, "images": self.images, **self.values}


def by_source(answers: Predictions, sources: Sequence[Path | str], classes: Classes) -> list[SourceMetrics]:
    """Of a model's answers for a data set made of these packings, in their order; [] where there is but one."""
    if len(sources) < 2:
        return []
    numbers, found = answers.ids >> SOURCE_BIT, []
    for number, path in enumerate(sources):
        mine = numbers == number
        values: dict[str, float | None] = {metric.name: None for metric in metrics_for(len(classes), classes.ordinal)}
        if bool(mine.any()):
            values = grade_metrics(answers.predicted[mine], answers.labels[mine], classes).values
        found.append(SourceMetrics(str(path), int(torch.count_nonzero(mine)), values))
    return found
