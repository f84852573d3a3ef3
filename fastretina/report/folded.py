"""What the folds of a cross-validation found, together and each by itself: folds.csv, folds.json, report.html, and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fastretina.grading import Classes
from fastretina.metrics.bootstrap import LEVEL
from fastretina.metrics.predictions import GradeMetrics
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS, titles
from fastretina.metrics.table import METRICS, TITLES, Metric, metrics_for
from fastretina.report import sections
from fastretina.report.compared import ComparedRun
from fastretina.report.page import Link, Section, bounds, note, number, page, remark, shown, table
from fastretina.system.csv_text import write_csv
from fastretina.system.files import write_bytes, write_json
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import SET_TITLES, selection_note, versions

MEAN, SD = "mean", "sd"
SPREAD_NOTE = (
    "Each fold trains on the images that it is not validated on, and chooses its epoch on those that it is; all are measured on "
    "the same test set, which has no part in it. ±: standard deviation of the folds (n − 1): how much a model depends on the "
    "images that it happened to learn from. It is no interval of the mean: the folds learn from much the same images (Bengio and "
    "Grandvalet, J Mach Learn Res 5:1089, 2004)."
)
OUT_OF_FOLD_NOTE = (
    "Out of fold: each image of the training set as graded by the one model that did not learn from it. These images did choose "
    "that model's epoch and fit its probabilities, so that these metrics are a little optimistic; the test set's are not."
)


@dataclass(frozen=True)
class Folded:
    """What is known of a cross-validation.

    Attributes:
        runs: of the folds that are finished, at least one. folds: how many there are to be.
        out_of_fold: metrics of the training set as graded by those that did not learn from it. ensemble: of the test set as graded
            by the mean of all; both as in a metrics.json. None until all are finished.
    """

    runs: Sequence[ComparedRun]
    folds: int
    out_of_fold: Mapping[str, Any] | None = None
    ensemble: Mapping[str, Any] | None = None

    @property
    def classes(self) -> Classes:
        """What they tell apart."""
        return self.runs[0].classes

    @property
    def rows(self) -> list[dict[str, Any]]:
        """By column, a row for each fold; metrics of its best epoch, None where undefined."""
        return [_row(run) for run in self.runs]

    def column(self, name: str) -> list[float] | None:
        """A metric of all folds; None where one has it undefined."""
        values = [row.get(name) for row in self.rows]
        return None if None in values else [float(value) for value in values if value is not None]

    def mean(self, name: str) -> float | None:
        """Of a metric over the folds; None where it is undefined in one."""
        return None if (values := self.column(name)) is None else fmean(values)

    def sd(self, name: str) -> float | None:
        """The standard deviation (n - 1) of a metric over the folds; None where it is undefined, as of one fold."""
        return None if (values := self.column(name)) is None or len(values) < 2 else stdev(values)

    @property
    def metric_names(self) -> list[str]:
        """The columns that are metrics."""
        return [name for name in self.rows[0] if name.startswith(("val_", "test_")) and not name.endswith("_images")]

    def spread(self, metric: Metric | str, data: str) -> str:
        """`81.2 ± 1.4 %`, `0.812 ± 0.014`: the metric's mean and standard deviation over the folds, on `val` or `test`."""
        name = metric if isinstance(metric, str) else metric.name
        mean, sd = self.mean(f"{data}_{name}"), self.sd(f"{data}_{name}")
        write = number if isinstance(metric, str) else lambda value: shown(metric, value)
        return write(mean) if mean is None or sd is None else f"{write(mean).removesuffix(' %')} ± {write(sd)}"


def _row(run: ComparedRun) -> dict[str, Any]:
    best, data = run.metrics["best"], run.metrics["data"]
    val = GradeMetrics(run.metrics["val"]["best"]["confusion"], run.classes.ordinal)
    ranked = (AUROC_REFERABLE, *(ranking.name for ranking in RANKINGS))
    return {
        "fold": run.name,
        "epochs": len(run.metrics["epoch_seconds"]),
        "best_epoch": run.best_epoch,
        **{f"{name}_images": data[name]["images"] for name in SET_TITLES},
        **{f"val_{name}": value for name, value in val.values.items()},
        **{f"test_{name}": value for name, value in run.test("best").values.items()},
        **{f"test_{name}": best.get(name) for name in ranked},
        "test_ece": best.get("calibration", {}).get("ece"),
        "seconds": run.seconds,
    }


def write_folds(folder: RunFolder, found: Folded, settings: Mapping[str, Any]) -> None:
    """Write folds.csv, folds.json and report.html, each atomically."""
    rows, names = found.rows, found.metric_names
    ends = [{"fold": MEAN} | {name: found.mean(name) for name in names}, {"fold": SD} | {name: found.sd(name) for name in names}]
    write_csv(folder.file("folds.csv"), list(rows[0]), [[row.get(column) for column in rows[0]] for row in [*rows, *ends]])
    first = found.runs[0].metrics
    write_json(
        folder.file("folds.json"),
        {
            "settings": dict(settings),
            "classes": found.classes.as_dict(),
            **{name: first[name] for name in ("selected_on", "selection_metric", "device")},
            "selection_note": selection_note(first["selection_metric"], first["selected_on"]),
            "folds": rows,
            MEAN: {name: found.mean(name) for name in names},
            SD: {name: found.sd(name) for name in names},
            "out_of_fold": found.out_of_fold,
            "ensemble": found.ensemble,
            "data": {run.name: run.metrics["data"] for run in found.runs},
            "versions": versions(),
        },
    )
    write_bytes(folder.report, folds_html(found, settings).encode(errors="backslashreplace"))


def folds_html(found: Folded, settings: Mapping[str, Any]) -> str:
    """One self-contained page; the folds' own reports are linked by their path from it."""
    first, classes = found.runs[0].metrics, found.classes
    missing = found.folds - len(found.runs)
    head = [
        sections.subtitle(classes, first["device"], first["amp_dtype"]),
        note(selection_note(first["selection_metric"], first["selected_on"]), good=first["selected_on"] == "val"),
        note(f"{missing} of {found.folds} folds are not finished, and have no part in what stands here.") if missing else "",
    ]
    built = [
        _results(found),
        _together(found),
        sections.purpose(classes),
        sections.meanings(classes),
        _data(found),
        sections.settings_section(settings),
    ]
    title = f"{found.folds} folds: {settings['arch']} at {settings['resolution']} px"
    return page(title, head, [section for section in built if section is not None])


def _link(run: ComparedRun) -> Link:
    return Link(run.name, f"{run.name}/report.html")


def _results(found: Folded) -> Section:
    classes = found.classes
    metrics = metrics_for(len(classes), classes.ordinal)
    columns = ["fold", "best epoch", "images", *sections.metric_columns(classes)]
    tables = []
    for data, title in (("test", "The same test set for all"), ("val", "Each fold's own validation set")):
        rows: list[list[object]] = []
        for run, row in zip(found.runs, found.rows, strict=True):
            cells = [shown(metric, row[f"{data}_{metric.name}"]) for metric in metrics]
            rows.append([_link(run), f"{run.best_epoch} of {row['epochs']}", row[f"{data}_images"], *cells])
        rows.append(["mean ± sd", "", "", *(found.spread(metric, data) for metric in metrics)])
        if data == "test" and found.ensemble is not None:
            ensemble = Link("ensemble", "ensemble/report.html")
            rows.append([ensemble, "", found.ensemble["images"], *sections.metric_cells(found.ensemble, classes)])
        tables.append(table(columns, rows, f"{title}, best epochs"))
    return Section("Results by fold", [*tables, remark(SPREAD_NOTE)])


def _together(found: Folded) -> Section | None:
    """The ensemble, and the answers out of fold; none before all folds are finished."""
    named, interval, classes = titles(found.classes), f"{100 * LEVEL:.0f} % interval", found.classes
    known: dict[str, Mapping[str, Any] | None] = {"ensemble, test": found.ensemble, "out of fold, train": found.out_of_fold}
    graded = {title: one for title, one in known.items() if one is not None}
    if not graded:
        return None
    rows: list[list[object]] = []
    for name in (name for name in named if all(name in one["intervals"] for one in graded.values())):
        metric = next((metric for metric in METRICS if metric.name == name), name)
        cells = []
        for one in graded.values():
            value, limits = one[name], one["intervals"][name]
            cells += [number(value) if isinstance(metric, str) else shown(metric, value), bounds(limits["low"], limits["high"])]
        rows.append([named[name], found.spread(metric, "test"), *cells])
    columns = ["metric", "folds, test: mean ± sd", *(text for title in graded for text in (title, interval))]
    matrices = [(title, one["confusion"]) for title, one in graded.items()]
    ensemble = "Ensemble: the mean of the probabilities of all folds' models, each with its own temperature. "
    return Section(
        "All folds together",
        [
            table(columns, rows, "The ensemble on the test set, and every training image by the model that did not learn from it"),
            sections.confusion_tables(matrices, classes),
            remark((ensemble if found.ensemble else "") + OUT_OF_FOLD_NOTE),
            remark(sections.confusion_remark(classes)),
        ],
    )


def _data(found: Folded) -> Section:
    rows, shared = [], []
    for run in found.runs:
        data = run.metrics["data"]
        both = [data["patients_shared"].get(pair) for pair in ("train_val", "train_test", "val_test")]
        shared += both
        people = [data[name]["patients"] for name in ("train", "val")]
        known = ("unknown" if value is None else value for value in (*people, *both))
        rows.append([_link(run), data["train"]["images"], data["val"]["images"], *known])
    columns = ["fold", "images: train", "validation", "patients: train", "validation"]
    columns += ["patients in both: train, validation", "train, test", "validation, test"]
    return Section(
        "Data",
        [
            table(columns, rows, "What each fold is made of"),
            note(sections.FLATTERED) if any(shared) else "",
            note(sections.UNKNOWN_PATIENTS) if None in shared else "",
        ],
    )


def terminal_table(found: Folded) -> list[str]:
    """The lines that end the command."""
    classes, chief = found.classes, found.runs[0].headline
    metrics = metrics_for(len(classes), classes.ordinal)
    (headline,) = (metric for metric in METRICS if metric.name == chief)
    titled = [f"val {TITLES[chief]}", *(f"test {metric.title}" for metric in metrics)]
    rows = [
        [
            run.name,
            f"{run.best_epoch}/{row['epochs']}",
            f"{row['val_images']:,}",
            shown(headline, row[f"val_{chief}"]),
            *(shown(metric, row[f"test_{metric.name}"]) for metric in metrics),
        ]
        for run, row in zip(found.runs, found.rows, strict=True)
    ]
    rows.append(["mean ± sd", "", "", found.spread(headline, "val"), *(found.spread(metric, "test") for metric in metrics)])
    for name, one in (("ensemble", found.ensemble), ("out of fold", found.out_of_fold)):
        if one is not None:
            images = "" if one is found.ensemble else f"{one['images']:,}"
            rows.append([name, "", images, "", *(shown(metric, one[metric.name]) for metric in metrics)])
    table_rows = [["fold", "best", "val images", *titled], *rows]
    widths = [max(len(row[at]) for row in table_rows) for at in range(len(table_rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in table_rows
    ]
