"""What several finished runs found, side by side: compare.csv, compare.json, compare.png and report.html.

All of it is read from the runs' own metrics.json and results.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastretina.grading import REFERABLE, grade_title
from fastretina.metrics.table import AUROC
from fastretina.report import plots, sections
from fastretina.report.compared import ComparedRun
from fastretina.report.page import Link, Section, bounds, duration, image, note, number, page, pair, percent, remark, table
from fastretina.system.files import write_bytes, write_csv, write_json
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import SET_TITLES, selection_note, versions

CHOICE_NOTE = (
    "To pick one of these runs by its test metrics is a choice made on the test set too: they are then optimistic, the "
    "more so the more runs there are."
)


def write_comparison(folder: RunFolder, runs: Sequence[ComparedRun], settings: Mapping[str, Any]) -> None:
    """Write compare.csv, compare.json, compare.png and report.html of at least one run, each atomically."""
    rows = [run.row() for run in runs]
    write_csv(folder.path / "compare.csv", list(rows[0]), [list(row.values()) for row in rows])
    first = runs[0].metrics
    write_json(
        folder.path / "compare.json",
        {
            "settings": dict(settings),
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
    write_bytes(folder.path / "compare.png", plots.comparison(runs))
    write_bytes(folder.report, comparison_html(runs, settings).encode())


def comparison_html(runs: Sequence[ComparedRun], settings: Mapping[str, Any]) -> str:
    """One self-contained page; the runs' own reports are linked by their path from it."""
    first = runs[0].metrics
    collapsed = [run.name for run in runs if run.collapsed]
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} compared at {settings['resolution']} px"
    head = [
        sections.subtitle(first["device"], first["amp_dtype"]),
        note(selection_note(first["selection_metric"], first["selected_on"]), good=first["selected_on"] == "val"),
        note(CHOICE_NOTE) if len(runs) > 1 else "",
        note(f"One and the same grade for every test image: {', '.join(collapsed)}.") if collapsed else "",
    ]
    last = [[_link(run), *sections.metric_cells(run.test("last").values)] for run in runs]
    compared = [[run.name, run.arch, run.weights or "none (from scratch)"] for run in runs]
    built = [
        _results(runs),
        sections.purpose(),
        sections.meanings(),
        sections.data_section(first["data"]),
        _curves(runs),
        _confusions(runs),
        _recalls(runs),
        _screening(runs),
        _speed(runs),
        Section("Last epochs", [table(["run", *sections.METRIC_COLUMNS], last, "Test set, last epochs")]),
        Section("Runs", [table(["run", "architecture", "initial weights"], compared, "What was compared", "words")]),
        sections.settings_section(settings),
    ]
    return page(title, head, built)


def _link(run: ComparedRun) -> Link:
    return Link(run.name, f"{run.name}/report.html")


def _results(runs: Sequence[ComparedRun]) -> Section:
    rows = []
    for run in runs:
        epoch = f"{run.best_epoch} of {len(run.metrics['epoch_seconds'])}"
        rows.append([_link(run), epoch, *sections.metric_cells(run.test("best").values), bounds(*run.bounds)])
    columns = ["run", "best epoch", *sections.METRIC_COLUMNS, "95 % interval of QWK"]
    return Section(
        "Results",
        [
            table(columns, rows, "Test set, best epochs"),
            remark(
                f"Always the same grade: accuracy {percent(runs[0].majority['test'])}, QWK 0. Interval: cluster "
                "bootstrap by patient; where those of two runs overlap much, this test set does not tell which is better. The most "
                "confident mistakes and the calibration curve stand in each run's own report."
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
    matrices = [sections.confusion_table(run.confusion, f"{run.name}, test set, epoch {run.best_epoch}") for run in runs]
    return Section("Confusion matrices", [pair(matrices), remark(sections.CONFUSION_REMARK)])


def _recalls(runs: Sequence[ComparedRun]) -> Section:
    grades = [grade_title(grade) for grade in range(len(runs[0].test("best").per_class_recall))]
    rows = [[_link(run), *(percent(recall) for recall in run.test("best").per_class_recall)] for run in runs]
    return Section("By grade", [table(["run", *grades], rows, "Recall of each grade, test set, best epochs")])


def _screening(runs: Sequence[ComparedRun]) -> Section:
    rows = []
    for run in runs:
        best = run.metrics["best"]
        own: Mapping[str, Any] = (best.get("referable") or [{}])[0]
        auroc, ece = best.get("intervals", {}).get(AUROC, {}), best.get("calibration", {}).get("ece")
        interval = bounds(auroc.get("low"), auroc.get("high"))
        shares = [percent(own.get("sensitivity")), percent(own.get("specificity")), percent(ece)]
        rows.append([_link(run), number(best.get(AUROC)), interval, *shares])
    return Section(
        "Screening for referable disease, and calibration",
        [
            table(
                ["run", "AUROC", "95 % interval", "sensitivity", "specificity", "ECE"],
                rows,
                f"{REFERABLE.capitalize()} against less, test set, best epochs",
            ),
            remark(
                "Sensitivity and specificity: by the model's grade, of the eyes with the disease the share that is referred, of "
                "those without it the share that is not. ECE: how far its probabilities are from how often it is right."
            ),
        ],
    )
