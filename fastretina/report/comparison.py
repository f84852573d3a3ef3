"""What several finished runs found, side by side: compare.csv, compare.json, compare.png and report.html.

All of it is read from the runs' own metrics.json and results.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS, titles
from fastretina.metrics.table import TITLES
from fastretina.report import plots, sections
from fastretina.report.compared import ComparedRun
from fastretina.report.page import Link, Section, bounds, duration, image, note, number, page, pair, percent, remark, table
from fastretina.system.csv_text import write_csv
from fastretina.system.files import write_bytes, write_json
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import SET_TITLES, selection_note, versions

CHOICE_NOTE = (
    "To pick one of these runs by its test metrics is a choice made on the test set too: they are then optimistic, the "
    "more so the more runs there are."
)


def write_comparison(folder: RunFolder, runs: Sequence[ComparedRun], settings: Mapping[str, Any]) -> None:
    """Write compare.csv, compare.json, compare.png and report.html of at least one run, each atomically."""
    rows = [run.row() for run in runs]
    write_csv(folder.file("compare.csv"), list(rows[0]), [list(row.values()) for row in rows])
    first = runs[0].metrics
    write_json(
        folder.file("compare.json"),
        {
            "settings": dict(settings),
            "classes": runs[0].classes.as_dict(),
            **{name: first[name] for name in ("selected_on", "selection_metric", "data", "device")},
            "selection_note": selection_note(first["selection_metric"], first["selected_on"]),
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
    write_bytes(folder.file("compare.png"), plots.comparison(runs))
    write_bytes(folder.report, comparison_html(runs, settings).encode(errors="backslashreplace"))


def comparison_html(runs: Sequence[ComparedRun], settings: Mapping[str, Any]) -> str:
    """One self-contained page; the runs' own reports are linked by their path from it."""
    first, classes = runs[0].metrics, runs[0].classes
    collapsed = [run.name for run in runs if run.collapsed]
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} compared at {settings['resolution']} px"
    head = [
        sections.subtitle(classes, first["device"], first["amp_dtype"]),
        note(selection_note(first["selection_metric"], first["selected_on"]), good=first["selected_on"] == "val"),
        note(CHOICE_NOTE) if len(runs) > 1 else "",
        note(f"One and the same {classes.noun} for every test image: {', '.join(collapsed)}.") if collapsed else "",
    ]
    last = [[_link(run), *sections.metric_cells(run.test("last").values, classes)] for run in runs]
    compared = [[run.name, run.arch, run.weights or "none (from scratch)"] for run in runs]
    built = [
        _results(runs),
        sections.purpose(classes),
        sections.meanings(classes),
        sections.data_section(first["data"], classes),
        _curves(runs),
        _confusions(runs),
        _recalls(runs),
        _probabilities(runs),
        _screening(runs),
        _speed(runs),
        Section("Last epochs", [table(["run", *sections.metric_columns(classes)], last, "Test set, last epochs")]),
        Section("Runs", [table(["run", "architecture", "initial weights"], compared, "What was compared", "words")]),
        sections.settings_section(settings),
    ]
    return page(title, head, [section for section in built if section is not None])


def _link(run: ComparedRun) -> Link:
    return Link(run.name, f"{run.name}/report.html")


def _results(runs: Sequence[ComparedRun]) -> Section:
    rows, classes = [], runs[0].classes
    for run in runs:
        epoch = f"{run.best_epoch} of {len(run.metrics['epoch_seconds'])}"
        rows.append([_link(run), epoch, *sections.metric_cells(run.test("best").values, classes), bounds(*run.bounds)])
    chance = ", QWK 0" if classes.ordinal else ""
    columns = ["run", "best epoch", *sections.metric_columns(classes), f"95 % interval of {TITLES[runs[0].headline]}"]
    return Section(
        "Results",
        [
            table(columns, rows, "Test set, best epochs"),
            remark(
                f"Always the same {classes.noun}: accuracy {percent(runs[0].majority['test'])}{chance}. "
                f"Interval: {_method(runs[0])}; where those of two runs overlap much, this test set does not tell which is better. "
                "The most confident mistakes and the calibration curve stand in each run's own report."
            ),
        ],
    )


def _speed(runs: Sequence[ComparedRun]) -> Section:
    rows = [[_link(run), duration(run.seconds), f"{run.images_per_second:,.1f}", percent(run.data_wait_share)] for run in runs]
    return Section(
        "Speed",
        [
            table(["run", "time", "training images/s", "waiting for data"], rows, "All epochs"),
            remark("Time: with the evaluations. Images/s: median of the epochs. Waiting: share of the training time."),
        ],
    )


def _curves(runs: Sequence[ComparedRun]) -> Section:
    def shown(name: str) -> str:
        ends = "; ".join(f"{run.name} from {percent(run.accuracy[name][0])} to {percent(run.accuracy[name][-1])}" for run in runs)
        return image(plots.accuracies(runs, name), f"Accuracy by epoch, {SET_TITLES[name]} set: {ends}")

    return Section("Accuracy by epoch", [pair([shown("train"), shown("test")]), remark(sections.TRAIN_REMARK)])


def _confusions(runs: Sequence[ComparedRun]) -> Section:
    classes = runs[0].classes
    matrices = [(f"{run.name}, test set, epoch {run.best_epoch}", run.confusion) for run in runs]
    return Section("Confusion matrices", [sections.confusion_tables(matrices, classes), remark(sections.confusion_remark(classes))])


def _method(run: ComparedRun) -> str:
    """How its intervals were made; older runs do not say so."""
    return str(run.metrics["best"].get("intervals", {}).get("method", "percentile cluster bootstrap by patient"))


def _recalls(runs: Sequence[ComparedRun]) -> Section:
    classes = runs[0].classes
    names = [classes.title(number) for number in range(len(classes))]
    rows = [[_link(run), *(percent(recall) for recall in run.test("best").per_class_recall)] for run in runs]
    return Section(f"By {classes.noun}", [table(["run", *names], rows, f"Recall of each {classes.noun}, test set, best epochs")])


def _screening(runs: Sequence[ComparedRun]) -> Section | None:
    classes = runs[0].classes
    if not classes.referable:
        return None
    rows = []
    for run in runs:
        best = run.metrics["best"]
        own: Mapping[str, Any] = (best.get("referable") or [{}])[0]
        interval = _interval(best, AUROC_REFERABLE)
        rows.append(
            [_link(run), number(best.get(AUROC_REFERABLE)), interval, *map(percent, map(own.get, ("sensitivity", "specificity")))]
        )
    title = classes.referable_title
    return Section(
        "Screening for referable disease",
        [
            table(
                ["run", "AUROC", "95 % interval", "sensitivity", "specificity"],
                rows,
                f"{title[0].upper()}{title[1:]} against the rest, test set, best epochs",
            ),
            remark(
                "Sensitivity and specificity: by the model's own answer, of the eyes with the disease the share that is referred, "
                "of those without it the share that is not."
            ),
        ],
    )


def _probabilities(runs: Sequence[ComparedRun]) -> Section:
    named = titles(runs[0].classes)
    rows = []
    for run in runs:
        best = run.metrics["best"]
        ranked = [text for each in RANKINGS for text in (number(best.get(each.name)), _interval(best, each.name))]
        rows.append([_link(run), *ranked, percent(best.get("calibration", {}).get("ece"))])
    columns = [text for each in RANKINGS for text in (named[each.name], "95 % interval")]
    return Section(
        "Probabilities",
        [
            table(["run", *columns, "ECE"], rows, "Test set, best epochs"),
            remark("ECE, expected calibration error: how far its probabilities are from how often it is right."),
        ],
    )


def _interval(best: Mapping[str, Any], name: str) -> str:
    found = best.get("intervals", {}).get(name, {})
    return bounds(found.get("low"), found.get("high"))
