"""One finished run of a comparison, read from its own metrics.json and results.csv, and the table of several on the terminal."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastretina.errors import RunError
from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.predictions import GradeMetrics
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS
from fastretina.metrics.table import METRICS, TITLES, headline, metrics_for
from fastretina.report.page import shown
from fastretina.system.json_text import read_json
from fastretina.training.run_folder import RunFolder


@dataclass(frozen=True)
class ComparedRun:
    """A finished run.

    Attributes:
        name: its sub-folder. weights: what it began with, None from scratch. folder: where it is. metrics: its metrics.json.
        accuracy: by epoch, 0-1, of `train` and `test`.
    """

    name: str
    arch: str
    weights: str | None
    folder: Path
    metrics: Mapping[str, Any]
    accuracy: Mapping[str, list[float]]

    @classmethod
    def read(cls, run: RunFolder, arch: str, weights: str | None) -> ComparedRun:
        """Read a run folder. RunError naming it where its metrics are missing or corrupt."""
        try:
            metrics = read_json(run.metrics)
            with run.results.open(newline="") as file:
                rows = list(csv.DictReader(file))
            if not rows:
                raise ValueError("no epoch")
            accuracy = {name: [float(row[f"{name}_accuracy"]) for row in rows] for name in ("train", "test")}
            found = cls(run.path.name, arch, weights, run.path, metrics, accuracy)
            found.row()  # corrupt metrics show here, before anything is drawn
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise RunError(f"{run.path}: its metrics.json or results.csv cannot be used ({error}); remove the folder") from error
        return found

    @property
    def classes(self) -> Classes:
        """What it tells apart; older runs do not say, and knew the grades of retinopathy alone."""
        found = self.metrics.get("classes")
        return RETINOPATHY if found is None else Classes.stored(found)

    @property
    def headline(self) -> str:
        """The metric that says most of it in one number."""
        return headline(self.classes.ordinal)

    @property
    def seconds(self) -> float:
        """Training and evaluation of all epochs."""
        return float(sum(self.metrics["epoch_seconds"]))

    @property
    def images_per_second(self) -> float:
        """Training images by training time, the median of the epochs."""
        return float(median(self.metrics["images_per_second"]))

    @property
    def data_wait_share(self) -> float:
        """Waiting for data by training time, all epochs, 0-1."""
        training = sum(self.metrics["train_seconds"])
        return float(sum(self.metrics["data_wait_seconds"]) / training) if training > 0 else 0.0

    def test(self, which: str) -> GradeMetrics:
        """Metrics on the test set at its `best` or `last` epoch, also those that were not yet thought of when it ran."""
        return GradeMetrics(self.metrics[which]["confusion"], self.classes.ordinal)

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The 95 % interval of the best epoch's `headline` on the test set; None where undefined."""
        found = self.metrics["best"].get("intervals", {}).get(self.headline, {})
        return found.get("low"), found.get("high")

    @property
    def best_epoch(self) -> int:
        """From 1."""
        return int(self.metrics["best_epoch"])

    @property
    def confusion(self) -> list[list[int]]:
        """Of the best epoch on the test set: rows true, columns predicted."""
        return list(self.metrics["best"]["confusion"])

    @property
    def majority(self) -> dict[str, float]:
        """Share of the most frequent class in `train` and `test`, 0-1."""
        return {name: self.metrics["data"][name]["majority_share"] for name in ("train", "test")}

    @property
    def collapsed(self) -> bool:
        """Whether it answers one and the same class for every test image at its best epoch."""
        return sum(any(column) for column in zip(*self.confusion, strict=True)) == 1

    def row(self) -> dict[str, Any]:
        """The row of compare.csv, by column; of the test set, None where undefined."""
        return {
            "run": self.name,
            "arch": self.arch,
            "weights": self.weights or "none",
            "epochs": len(self.metrics["epoch_seconds"]),
            "best_epoch": self.best_epoch,
            **{f"{which}_{name}": value for which in ("best", "last") for name, value in self.test(which).values.items()},
            f"best_{self.headline}_low": self.bounds[0],
            f"best_{self.headline}_high": self.bounds[1],
            **{f"best_{name}": self.metrics["best"].get(name) for name in (AUROC_REFERABLE, *(each.name for each in RANKINGS))},
            "one_grade_for_all": self.collapsed,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "folder": str(self.folder),
        }


def terminal_table(runs: Sequence[ComparedRun]) -> list[str]:
    """The lines of the table that ends the command."""
    classes = runs[0].classes
    metrics, last = metrics_for(len(classes), classes.ordinal), f"last {TITLES[runs[0].headline]}"
    width = max(len("run"), *(len(run.name) for run in runs))
    titles = "  ".join(f"{metric.title:>7}" for metric in metrics)
    lines = [f"{'run':<{width}}  {'best':>7}  {titles}  {last:>8}  {'time':>8}  img/s"]
    (chief,) = (metric for metric in METRICS if metric.name == runs[0].headline)
    for run in runs:
        best, epochs = run.test("best").values, len(run.metrics["epoch_seconds"])
        cells = "  ".join(f"{shown(metric, best[metric.name]):>{max(7, len(metric.title))}}" for metric in metrics)
        lines.append(
            f"{run.name:<{width}}  {run.best_epoch:>3}/{epochs:<3}  {cells}"
            f"  {shown(chief, run.test('last').values[chief.name]):>{max(8, len(last))}}"
            f"  {run.seconds:>6,.0f} s  {run.images_per_second:,.0f}" + (f"  one {classes.noun} for all" if run.collapsed else "")
        )
    return lines
