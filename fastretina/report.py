"""metrics.json and report.html: what a run found out, for programs and for people. Both are made from the run's history alone."""

from __future__ import annotations

import base64
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
from fastretina.history import EpochRecord, Progress, Scores
from fastretina.labels import patient_of

SELECTION_METRIC = "qwk"
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
    """What is known of a run before it begins: settings, data sets (train, test and perhaps val), device and number format."""

    settings: Mapping[str, Any]
    data: Mapping[str, DataFacts]
    device: str
    amp_dtype: str
    precision_note: str
    loader: str
    parameters: int

    @property
    def selected_on(self) -> str:
        """The data that the best epoch is chosen on: `val` or `test`."""
        return "val" if "val" in self.data else "test"

    @property
    def selection_note(self) -> str:
        """What a reader must know about that choice."""
        if self.selected_on == "val":
            return "Best epoch chosen by QWK on the validation set; the test set had no part in it."
        return (
            "Best epoch chosen by QWK on the TEST set, since no validation set was given: the best figures are optimistic. "
            "Give --val FILE for an honest choice."
        )

    @property
    def shared_patients(self) -> int:
        """Patients with one eye in train and the other in test."""
        return len(self.data["train"].patients & self.data["test"].patients)


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    return {
        "fastretina": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
    }


def metrics_summary(facts: RunFacts, progress: Progress, epochs: int) -> dict[str, Any]:
    """The content of metrics.json; at least one epoch must be done. Undefined figures are None (null)."""
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best

    def figures(scores: Scores) -> dict[str, Any]:
        return {"loss": scores.loss, **scores.metrics.as_dict()}

    summary: dict[str, Any] = {
        "selected_on": facts.selected_on,
        "selection_metric": SELECTION_METRIC,
        "best_epoch": best.epoch,
        "last_epoch": last.epoch,
        "finished": progress.epoch >= epochs,
        "best": {"epoch": best.epoch, **figures(best.test)},
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


STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 48px; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 36px 0 10px; }
p { margin: 8px 0; } .soft { color: var(--soft); } .small { font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 1.55rem; line-height: 1.2; } .card span { color: var(--soft); font-size: .875rem; }
.note { border-left: 4px solid #d55e00; background: #fdf3ec; padding: 10px 14px; border-radius: 0 6px 6px 0; }
.note.good { border-color: #009e73; background: #edf8f4; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; align-items: start; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
details { margin: 8px 0; } summary { cursor: pointer; }
@media (max-width: 640px) { th, td { padding: 6px 5px; font-size: .8125rem; } th { white-space: normal; vertical-align: bottom; } }
.settings td, .settings th { text-align: left; }
.settings td + td { white-space: normal; overflow-wrap: anywhere; width: 99%; }
"""


def report_html(facts: RunFacts, progress: Progress, pictures: Mapping[str, bytes]) -> str:
    """One self-contained page, no network needed. pictures: PNGs named batch (may be missing), confusion_train, confusion_test."""
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best
    test, majority = best.test.metrics, facts.data["test"].majority_share
    title = f"{facts.settings['arch']} at {facts.settings['resolution']} px, {len(progress.history)} epochs"
    cards = [
        (_number(test.qwk), "QWK, test"),
        (_percent(test.accuracy), f"accuracy, test (always the same grade: {_percent(majority)})"),
        (_percent(test.balanced_accuracy), "balanced accuracy, test"),
        (f"{best.epoch} of {last.epoch}", "best epoch"),
        (f"{last.images_per_second:,.0f}", f"training images/s; {100 * last.data_wait_share:.1f} % of the time waiting for data"),
    ]
    panels = [plots.curves(progress.history, best.epoch, majority, [name]) for name in plots.PANELS]
    batch = [f"<h2>What the network saw</h2>{_image(pictures['batch'], 'first training batch')}"] if "batch" in pictures else []
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">Diabetic retinopathy grades 0–4 · {html.escape(facts.device)} · {html.escape(facts.amp_dtype)}</p>',
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{value}</b><span>{html.escape(text)}</span></div>' for value, text in cards)
        + "</div>",
        f'<p class="note{" good" if facts.selected_on == "val" else ""}">{html.escape(facts.selection_note)}</p>',
        f'<p class="note">{facts.shared_patients:,} patients have one eye in train and the other in test.</p>'
        if facts.shared_patients
        else "",
        "<h2>By epoch</h2>",
        '<div class="pair">' + "".join(_image(panel, "curves by epoch") for panel in panels) + "</div>",
        '<p class="soft small">Train figures are those of the augmented images during each epoch, while the weights moved; test '
        "and validation figures are of plain images after it.</p>",
        f"<h2>Confusion, epoch {best.epoch}</h2>",
        '<div class="pair">'
        + _image(pictures["confusion_test"], "confusion matrix, test")
        + _image(pictures["confusion_train"], "confusion matrix, train")
        + "</div>",
        f"<h2>By grade, epoch {best.epoch}</h2>",
        _table(["grade", "train images", "test images", "train recall", "test recall"], _grade_rows(facts, best)),
        "<h2>Best and last</h2>",
        _table(["", "loss", "accuracy", "balanced acc.", "QWK", "macro F1"], _score_rows(best, last)),
        "<h2>Data</h2>",
        _table(
            ["", "images", "patients", *(f"grade {grade}" for grade in range(len(facts.data["train"].grades)))],
            [[name, data.images, len(data.patients) or "–", *data.grades] for name, data in facts.data.items()],
        ),
        "<h2>Speed</h2>",
        f"<p>Median of {len(progress.history):,} epochs: "
        f"{median(record.images_per_second for record in progress.history):,.1f} training images/s, "
        f"{median(record.epoch_seconds for record in progress.history):,.1f} s an epoch with its evaluation.</p>",
        f"<details{' open' if len(progress.history) <= MAX_OPEN_ROWS else ''}><summary>each epoch</summary>"
        + _table(["epoch", "images/s", "data wait (s)", "training (s)", "whole epoch (s)"], _speed_rows(progress.history))
        + "</details>",
        *batch,
        "<h2>Settings</h2>",
        _table(["setting", "value"], _setting_rows(facts), "settings"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    def cell(value: object) -> str:
        return html.escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _grade_rows(facts: RunFacts, best: EpochRecord) -> list[list[object]]:
    train, test = facts.data["train"].grades, facts.data["test"].grades
    recalls = zip(train, test, best.train.metrics.per_class_recall, best.test.metrics.per_class_recall, strict=True)
    return [[plots.grade_title(grade), a, b, _percent(c), _percent(d)] for grade, (a, b, c, d) in enumerate(recalls)]


def _score_rows(best: EpochRecord, last: EpochRecord) -> list[list[object]]:
    rows: list[list[object]] = []
    for which, record in (("best", best), ("last", last)):
        for name, scores in (("test", record.test), ("val", record.val), ("train", record.train)):
            if scores is not None:
                found = scores.metrics
                shares = [_percent(found.accuracy), _percent(found.balanced_accuracy), _number(found.qwk), _number(found.macro_f1)]
                rows.append([f"{which} epoch ({record.epoch}), {name}", _number(scores.loss), *shares])
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
