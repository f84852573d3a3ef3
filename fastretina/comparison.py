"""What several finished runs found, side by side: compare.csv, compare.json, compare.png and report.html.

All of it is read from the runs' own metrics.json and results.csv.
"""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastretina import plots
from fastretina.errors import RunError
from fastretina.page import Link, duration, image, note, number, page, percent, table
from fastretina.report import SELECTION_METRIC, SELECTION_NOTES, versions
from fastretina.runs import RunFolder, write_bytes, write_csv, write_json

FIGURES = ("accuracy", "balanced_accuracy", "qwk", "macro_f1")
CHOICE_NOTE = (
    "To pick one of these runs by its test figures is a choice made on the test set too: its figures are then optimistic, the "
    "more so the more runs there are."
)
ONE_GRADE = "one grade for all"


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
        """Read a run folder. RunError naming it where it has no figures, or damaged ones."""
        try:
            metrics = json.loads(run.metrics.read_text())
            with run.results.open(newline="") as file:
                rows = list(csv.DictReader(file))
            accuracy = {name: [float(row[f"{name}_accuracy"]) for row in rows] for name in ("train", "test")}
            found = cls(run.path.name, arch, weights, run.path, metrics, accuracy)
            found.row()
            found.picture()
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise RunError(f"{run.path}: its metrics.json or results.csv cannot be used ({error}); remove the folder") from error
        return found

    @property
    def seconds(self) -> float:
        """Training and evaluation of all epochs."""
        return float(sum(self.metrics["epoch_seconds"]))

    @property
    def images_per_second(self) -> float:
        """Training images by training time, the median of the epochs."""
        return float(median(self.metrics["images_per_second"]))

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The 95 % interval of the best epoch's QWK on the test set; None where undefined."""
        found = self.metrics["best"].get("intervals", {}).get("qwk", {})
        return found.get("low"), found.get("high")

    @property
    def collapsed(self) -> bool:
        """Whether it answers one and the same grade for every test image at its best epoch."""
        return sum(any(column) for column in zip(*self.metrics["best"]["confusion"], strict=True)) == 1

    def row(self) -> dict[str, Any]:
        """The row of compare.csv, by column; test figures, None where undefined."""
        figures = {f"{which}_{name}": self.metrics[which][name] for which in ("best", "last") for name in FIGURES}
        return {
            "run": self.name,
            "arch": self.arch,
            "weights": self.weights or "none",
            "epochs": len(self.metrics["epoch_seconds"]),
            "best_epoch": self.metrics["best_epoch"],
            **figures,
            "best_qwk_low": self.bounds[0],
            "best_qwk_high": self.bounds[1],
            "best_auroc_referable": self.metrics["best"].get("auroc_referable"),
            "one_grade_for_all": self.collapsed,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "folder": str(self.folder),
        }

    def picture(self) -> plots.RunPicture:
        """What the figure shows of it."""
        best = self.metrics["best"]
        return plots.RunPicture(self.name, self.metrics["best_epoch"], self.accuracy, best["confusion"])


def write_comparison(folder: RunFolder, runs: Sequence[ComparedRun], settings: Mapping[str, Any]) -> None:
    """Write compare.csv, compare.json, compare.png and report.html of at least one run, each atomically."""
    rows = [run.row() for run in runs]
    write_csv(folder.path / "compare.csv", list(rows[0]), [list(row.values()) for row in rows])
    first = runs[0].metrics
    write_json(
        folder.path / "compare.json",
        {
            "settings": dict(settings),
            "selected_on": first["selected_on"],
            "selection_metric": SELECTION_METRIC,
            "selection_note": SELECTION_NOTES[first["selected_on"]],
            "data": first["data"],
            "device": first["device"],
            "runs": [
                {
                    **row,
                    "amp_dtype": run.metrics["amp_dtype"],
                    "train_accuracy": run.accuracy["train"],
                    "test_accuracy": run.accuracy["test"],
                    **{f"{which}_confusion": run.metrics[which]["confusion"] for which in ("best", "last")},
                }
                for row, run in zip(rows, runs, strict=True)
            ],
            "versions": versions(),
        },
    )
    pictures, majority = [run.picture() for run in runs], _majority(first)
    write_bytes(folder.path / "compare.png", plots.comparison(pictures, majority))
    write_bytes(folder.report, comparison_html(runs, settings).encode())


def _majority(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: metrics["data"][name]["majority_share"] for name in ("train", "test")}


def comparison_html(runs: Sequence[ComparedRun], settings: Mapping[str, Any]) -> str:
    """One self-contained page; the runs' own reports are linked by their path from it."""
    first, pictures = runs[0].metrics, [run.picture() for run in runs]
    majority, selected_on = _majority(first), first["selected_on"]
    shared = first["data"]["patients_in_train_and_test"]
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} compared at {settings['resolution']} px"
    collapsed = [run.name for run in runs if run.collapsed]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">Diabetic retinopathy grades 0–4 · {html.escape(first["device"])} · {html.escape(first["amp_dtype"])}</p>',
        note(SELECTION_NOTES[selected_on], good=selected_on == "val"),
        note(CHOICE_NOTE) if len(runs) > 1 else "",
        note(f"{shared:,} patients have one eye in train and the other in test.") if shared else "",
        note(f"One and the same grade for every test image: {', '.join(collapsed)}.") if collapsed else "",
        "<h2>Test set, best epochs</h2>",
        table(
            ["run", "best epoch", "accuracy", "balanced acc.", "QWK", "95 % interval", "macro F1", "time", "images/s"],
            [
                [
                    Link(run.name, f"{run.name}/report.html"),
                    f"{run.metrics['best_epoch']} of {len(run.metrics['epoch_seconds'])}",
                    *_shares(run.metrics["best"])[:3],
                    f"{number(run.bounds[0])} to {number(run.bounds[1])}" if run.bounds[0] is not None else "–",
                    number(run.metrics["best"]["macro_f1"]),
                    duration(run.seconds),
                    f"{run.images_per_second:,.0f}",
                ]
                for run in runs
            ],
        ),
        f'<p class="soft small">Always the same grade: accuracy {percent(majority["test"])}, QWK 0. Interval: of the QWK, '
        "bootstrap by patient. Time: all epochs with their evaluation; images/s: training, median of the epochs.</p>",
        "<h2>Accuracy by epoch</h2>",
        '<div class="pair">'
        + "".join(image(plots.accuracies(pictures, majority, [name]), f"accuracy, {name} set") for name in ("train", "test"))
        + "</div>",
        '<p class="soft small">Train figures are those of the augmented images during each epoch, while the weights moved; test '
        "figures are of plain images after it.</p>",
        "<h2>Confusion on the test set, best epochs</h2>",
        '<div class="pair">'
        + "".join(image(plots.confusion(run.confusion, f"{run.name}, epoch {run.best_epoch}"), run.name) for run in pictures)
        + "</div>",
        "<h2>Test set, last epochs</h2>",
        table(
            ["run", "accuracy", "balanced acc.", "QWK", "macro F1"],
            [[Link(run.name, f"{run.name}/report.html"), *_shares(run.metrics["last"])] for run in runs],
        ),
        "<h2>Runs</h2>",
        table(
            ["run", "architecture", "initial weights"],
            [[run.name, run.arch, run.weights or "none (from scratch)"] for run in runs],
            "settings",
        ),
        "<h2>Data</h2>",
        table(
            ["", "images", "patients", *(f"grade {grade}" for grade in range(len(first["data"]["train"]["grades"])))],
            [
                [name, data["images"], data["patients"] or "–", *data["grades"]]
                for name, data in first["data"].items()
                if isinstance(data, dict)
            ],
        ),
        "<h2>Settings of all runs</h2>",
        table(
            ["setting", "value"],
            [[name.replace("_", "-"), "–" if value is None else str(value)] for name, value in settings.items()],
            "settings",
        ),
    ]
    return page(title, parts)


def _shares(figures: Mapping[str, Any]) -> list[str]:
    return [
        percent(figures["accuracy"]),
        percent(figures["balanced_accuracy"]),
        number(figures["qwk"]),
        number(figures["macro_f1"]),
    ]


def terminal_table(runs: Sequence[ComparedRun]) -> list[str]:
    """The lines of the table that ends the command."""
    width = max(len("run"), *(len(run.name) for run in runs))
    lines = [
        f"{'run':<{width}}  {'best':>7}  {'accuracy':>8}  {'balanced':>8}  {'QWK':>6}  {'macro F1':>8}  {'last QWK':>8}"
        f"  {'time':>8}  img/s"
    ]
    for run in runs:
        best, epochs = run.metrics["best"], len(run.metrics["epoch_seconds"])
        lines.append(
            f"{run.name:<{width}}  {run.metrics['best_epoch']:>3}/{epochs:<3}  {percent(best['accuracy']):>8}  "
            f"{percent(best['balanced_accuracy']):>8}  {number(best['qwk']):>6}  {number(best['macro_f1']):>8}  "
            f"{number(run.metrics['last']['qwk']):>8}  {run.seconds:>6,.0f} s  {run.images_per_second:,.0f}"
            + (f"  {ONE_GRADE}" if run.collapsed else "")
        )
    return lines
