"""metrics.json and report.html: what a run found out, for programs and for people. Both are made from the run's history alone."""

from __future__ import annotations

import html
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy
import torch
import torchvision

from fastretina import __version__, plots
from fastretina.assessment import Assessment
from fastretina.beton import Beton
from fastretina.history import EpochRecord, Progress, Scores
from fastretina.labels import patient_of
from fastretina.mistakes import confident_mistakes, mistakes_html
from fastretina.page import cards, image, note, number, page, percent, table

SELECTION_METRIC = "qwk"
# What a reader must know about the choice of the best epoch, by the data that it was made on.
SELECTION_NOTES = {
    "val": "Best epoch chosen by QWK on the validation set; the test set had no part in it.",
    "test": "Best epoch chosen by QWK on the TEST set, since no validation set was given: the best figures are optimistic. "
    "Give --val FILE for an honest choice.",
}
MAX_OPEN_ROWS = 12


@dataclass(frozen=True)
class DataFacts:
    """One data set: its file, its images by grade, and the patients (`<patient>_<left|right>`) that its names tell of."""

    path: str
    grades: list[int]
    patients: frozenset[str]

    @classmethod
    def of(cls, path: str, labels: Iterable[int], names: Iterable[str], num_classes: int) -> DataFacts:
        """From a file's path, grades and image names."""
        counts = numpy.bincount(numpy.asarray(list(labels), dtype=numpy.int64), minlength=num_classes)
        patients = {patient_of(name) for name in names} - {None}
        return cls(path, counts.tolist(), frozenset(str(patient) for patient in patients))

    @property
    def images(self) -> int:
        """How many images."""
        return sum(self.grades)

    @property
    def majority_share(self) -> float:
        """The accuracy of always answering the most frequent grade, 0-1."""
        return max(self.grades) / max(1, self.images)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "path": self.path,
            "images": self.images,
            "grades": self.grades,
            "majority_share": self.majority_share,
            "patients": len(self.patients),
        }


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it begins: settings, data sets (train, test and perhaps val), device and number format.

    test_set: the open file of the test set: its names say whose eye an image is, and the report shows some of the images.
    """

    settings: Mapping[str, Any]
    data: Mapping[str, DataFacts]
    device: str
    amp_dtype: str
    precision_note: str
    loader: str
    parameters: int
    test_set: Beton | None = None

    @property
    def selected_on(self) -> str:
        """The data that the best epoch is chosen on: `val` or `test`."""
        return "val" if "val" in self.data else "test"

    @property
    def selection_note(self) -> str:
        """What a reader must know about that choice."""
        return SELECTION_NOTES[self.selected_on]

    @property
    def shared_patients(self) -> int:
        """Patients with one eye in train and the other in test."""
        return len(self.data["train"].patients & self.data["test"].patients)


def assess_best(facts: RunFacts, progress: Progress) -> Assessment | None:
    """Of the best epoch's answers on the test set; None where these, or the images' file, are not at hand."""
    answers, beton = progress.best_test, facts.test_set
    if answers is None or beton is None:
        return None
    names = dict(zip((int(number) for number in beton.ids), beton.names, strict=True))
    return Assessment.of(answers, [names[number] for number in answers.ids.tolist()])


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    return {
        "fastretina": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
    }


def metrics_summary(facts: RunFacts, progress: Progress, finished: bool) -> dict[str, Any]:
    """The content of metrics.json; at least one epoch must be done. Undefined figures are None (null).

    Intervals, screening and calibration are there once the run is `finished`: they take some 0.2 s for 7,000 images.
    """
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best

    def figures(scores: Scores) -> dict[str, Any]:
        return {"loss": scores.loss, **scores.metrics.as_dict()}

    assessment = assess_best(facts, progress) if finished else None
    summary: dict[str, Any] = {
        "selected_on": facts.selected_on,
        "selection_metric": SELECTION_METRIC,
        "best_epoch": best.epoch,
        "last_epoch": last.epoch,
        "finished": finished,
        "best": {"epoch": best.epoch, **figures(best.test), **(assessment.as_dict() if assessment else {})},
        "last": {"epoch": last.epoch, **figures(last.test)},
        "train": {"best": figures(best.train), "last": figures(last.train)},
    }
    if best.val is not None and last.val is not None:
        summary["val"] = {"best": figures(best.val), "last": figures(last.val)}
    return {
        **summary,
        "epoch_seconds": [record.epoch_seconds for record in progress.history],
        "train_seconds": [record.train_seconds for record in progress.history],
        "images_per_second": [record.images_per_second for record in progress.history],
        "data_wait_seconds": [record.data_wait_seconds for record in progress.history],
        "data": {
            **{name: data.as_dict() for name, data in facts.data.items()},
            "patients_in_train_and_test": facts.shared_patients,
        },
        "arch": facts.settings["arch"],
        "parameters": facts.parameters,
        "loader": facts.loader,
        "device": facts.device,
        "amp_dtype": facts.amp_dtype,
        "versions": versions(),
    }


def report_html(facts: RunFacts, progress: Progress, pictures: Mapping[str, bytes]) -> str:
    """One self-contained page, no network needed. pictures: PNGs named batch (may be missing), confusion_train, confusion_test."""
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best
    test, majority = best.test.metrics, facts.data["test"].majority_share
    title = f"{facts.settings['arch']} at {facts.settings['resolution']} px, {len(progress.history)} epochs"
    figures = [
        (number(test.qwk), "QWK, test"),
        (percent(test.accuracy), f"accuracy, test (always the same grade: {percent(majority)})"),
        (percent(test.balanced_accuracy), "balanced accuracy, test"),
        (f"{best.epoch} of {last.epoch}", "best epoch"),
        (f"{last.images_per_second:,.0f}", f"training images/s; {100 * last.data_wait_share:.1f} % of the time waiting for data"),
    ]
    assessment = assess_best(facts, progress)
    answers, beton = progress.best_test, facts.test_set
    mistakes = confident_mistakes(answers, beton) if answers is not None and beton is not None else []
    panels = [plots.curves(progress.history, best.epoch, majority, [name]) for name in plots.PANELS]
    batch = [f"<h2>What the network saw</h2>{image(pictures['batch'], 'first training batch')}"] if "batch" in pictures else []
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">Diabetic retinopathy grades 0–4 · {html.escape(facts.device)} · {html.escape(facts.amp_dtype)}</p>',
        cards(figures),
        note(facts.selection_note, good=facts.selected_on == "val"),
        note(f"{facts.shared_patients:,} patients have one eye in train and the other in test.") if facts.shared_patients else "",
        "<h2>By epoch</h2>",
        '<div class="pair">' + "".join(image(panel, "curves by epoch") for panel in panels) + "</div>",
        '<p class="soft small">Train figures are those of the augmented images during each epoch, while the weights moved; test '
        "and validation figures are of plain images after it.</p>",
        f"<h2>Confusion, epoch {best.epoch}</h2>",
        '<div class="pair">'
        + image(pictures["confusion_test"], "confusion matrix, test")
        + image(pictures["confusion_train"], "confusion matrix, train")
        + "</div>",
        f"<h2>By grade, epoch {best.epoch}</h2>",
        table(["grade", "train images", "test images", "train recall", "test recall"], _grade_rows(facts, best)),
        *(assessment.html(f"test set, epoch {best.epoch}") if assessment else []),
        *mistakes_html(mistakes, f"test set, epoch {best.epoch}"),
        "<h2>Best and last</h2>",
        table(["", "loss", "accuracy", "balanced acc.", "QWK", "macro F1"], _score_rows(best, last)),
        "<h2>Data</h2>",
        table(
            ["", "images", "patients", *(f"grade {grade}" for grade in range(len(facts.data["train"].grades)))],
            [[name, data.images, len(data.patients) or "–", *data.grades] for name, data in facts.data.items()],
        ),
        "<h2>Speed</h2>",
        f"<p>Median of {len(progress.history):,} epochs: "
        f"{median(record.images_per_second for record in progress.history):,.1f} training images/s, "
        f"{median(record.epoch_seconds for record in progress.history):,.1f} s an epoch with its evaluation.</p>",
        f"<details{' open' if len(progress.history) <= MAX_OPEN_ROWS else ''}><summary>each epoch</summary>"
        + table(["epoch", "images/s", "data wait (s)", "training (s)", "whole epoch (s)"], _speed_rows(progress.history))
        + "</details>",
        *batch,
        "<h2>Settings</h2>",
        table(["setting", "value"], _setting_rows(facts), "settings"),
    ]
    return page(title, parts)


def _grade_rows(facts: RunFacts, best: EpochRecord) -> list[list[object]]:
    train, test = facts.data["train"].grades, facts.data["test"].grades
    recalls = zip(train, test, best.train.metrics.per_class_recall, best.test.metrics.per_class_recall, strict=True)
    return [[plots.grade_title(grade), a, b, percent(c), percent(d)] for grade, (a, b, c, d) in enumerate(recalls)]


def _score_rows(best: EpochRecord, last: EpochRecord) -> list[list[object]]:
    rows: list[list[object]] = []
    for which, record in (("best", best), ("last", last)):
        for name, scores in (("test", record.test), ("val", record.val), ("train", record.train)):
            if scores is not None:
                found = scores.metrics
                shares = [percent(found.accuracy), percent(found.balanced_accuracy), number(found.qwk), number(found.macro_f1)]
                rows.append([f"{which} epoch ({record.epoch}), {name}", number(scores.loss), *shares])
    return rows


def _speed_rows(history: Sequence[EpochRecord]) -> list[list[object]]:
    return [
        [
            record.epoch,
            f"{record.images_per_second:,.1f}",
            f"{record.data_wait_seconds:.2f} ({100 * record.data_wait_share:.1f} %)",
            f"{record.train_seconds:.1f}",
            f"{record.epoch_seconds:.1f}",
        ]
        for record in history
    ]


def _setting_rows(facts: RunFacts) -> list[list[object]]:
    rows: list[list[object]] = [
        [name.replace("_", "-"), "–" if value is None else str(value)] for name, value in facts.settings.items()
    ]
    rows += [["parameters", facts.parameters], ["precision used", facts.precision_note], ["loader", facts.loader]]
    return rows + [[name, value] for name, value in versions().items()]
