"""report.html: what a run found out, for people. Made from the run's history alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fastretina.metrics.assessment import Assessment
from fastretina.models.heads import HEADS, Decision
from fastretina.report import plots
from fastretina.report.assessment import sections as assessment_sections
from fastretina.report.mistakes import confident_mistakes, mistakes_section
from fastretina.report.page import Section, bounds, cards, image, note, number, page, pair, percent, remark, table, titled
from fastretina.report.sections import (
    CONFUSION_REMARK,
    TRAIN_REMARK,
    class_table,
    confusion_table,
    data_section,
    measures,
    purpose,
    settings_section,
    subtitle,
)
from fastretina.training.progress import EpochRecord, Progress
from fastretina.training.run_info import SET_TITLES, RunInfo
from fastretina.training.summary import assess_best

MAX_OPEN_ROWS = 12


def report_html(facts: RunInfo, progress: Progress, batch: bytes | None = None) -> str:
    """One self-contained page, no network needed. batch: batch.png, where there is one."""
    best, last = progress.best, progress.history[-1]
    assert best is not None  # an epoch is done, so that one is the best
    history, settings = progress.history, facts.settings
    title = f"{settings['arch']} at {settings['resolution']} px, {len(history)} epoch{'s' if len(history) > 1 else ''}"
    assessment = assess_best(facts, progress)
    answers, beton = progress.best_test, facts.test_set
    mistakes = confident_mistakes(answers, beton) if answers is not None and beton is not None else []
    head = [
        subtitle(facts.device, facts.amp_dtype),
        cards(_figures(facts, best, last, assessment)),
        note(facts.selection_note, good=facts.selected_on == "val"),
    ]
    sections = [
        purpose(),
        measures(),
        data_section(facts.data_dict()),
        _curves(facts, history, best),
        _confusion(best),
        _grades(best),
        *(assessment_sections(assessment) if assessment else []),
        *mistakes_section(mistakes),
        _scores(best, last),
        _speed(history),
    ]
    if batch is not None:
        text = "Photographs of the first training batch as the network got them, with their grades"
        sections.append(Section("What the network saw", [titled(image(batch, text), "The first training batch", "wide")]))
    if progress.decision is not None:
        sections.append(_decision(progress.decision))
    others: list[list[object]] = [
        ["parameters", facts.parameters],
        ["precision used", facts.precision_note],
        ["loader", facts.loader],
    ]
    sections.append(settings_section(settings, others))
    return page(title, head, sections)


def _decision(decision: Decision) -> Section:
    between = ", ".join(f"{threshold:.3f}" for threshold in decision.thresholds)
    rows = [["head", "regression: the network gives one number"], ["thresholds between grades", between]]
    explained = "Fitted to the validation set for the highest QWK; the test set had no part in it."
    return Section("How a grade is decided", [table(["part", "value"], rows, "From output to grade", "words"), remark(explained)])


def _figures(facts: RunInfo, best: EpochRecord, last: EpochRecord, assessment: Assessment | None) -> list[tuple[str, str]]:
    test, intervals = best.test.metrics, assessment.intervals if assessment else {}

    def interval(name: str) -> str:
        found = intervals.get(name)
        return f"; 95 % interval {bounds(found.low, found.high)}" if found and found.low is not None else ""

    majority = percent(facts.data["test"].majority_share)
    figures = [
        (number(test.qwk), f"QWK, test{interval('qwk')}"),
        (percent(test.accuracy), f"accuracy, test (always the same grade: {majority})"),
        (percent(test.balanced_accuracy), "balanced accuracy, test"),
        (f"{best.epoch} of {last.epoch}", "best epoch; all test figures are of this one"),
        (f"{last.images_per_second:,.0f}", f"training images/s; {100 * last.data_wait_share:.1f} % of the time waiting for data"),
    ]
    if assessment and assessment.operating_points:
        point = assessment.operating_points[0]
        found = f"{percent(point.sensitivity)} / {percent(point.specificity)}"
        figures.insert(3, (found, "sensitivity / specificity for referable disease, by the model's grade, test"))
    return figures


def _curves(facts: RunInfo, history: Sequence[EpochRecord], best: EpochRecord) -> Section:
    majority = facts.data["test"].majority_share
    objective = HEADS[facts.settings["head"]].objective
    panels = [
        image(plots.curves(history, best.epoch, majority, objective, [name]), _curve_text(history, name)) for name in plots.PANELS
    ]
    return Section("By epoch", [pair(panels), remark(TRAIN_REMARK)])


def _curve_text(history: Sequence[EpochRecord], panel: str) -> str:
    """The ends of a panel's curves."""
    found = []
    for name, title in SET_TITLES.items():
        values = [value for record in history if (value := record.row().get(f"{name}_{panel}")) is not None]
        if values:
            found.append(f"{title} from {values[0]:.3f} to {values[-1]:.3f}")
    return f"{plots.PANELS[panel][0]} by epoch: {'; '.join(found) or 'undefined'}"


def _confusion(best: EpochRecord) -> Section:
    matrices = [
        confusion_table(scores.metrics.confusion, f"{SET_TITLES[name].capitalize()} set, epoch {best.epoch}")
        for name, scores in (("test", best.test), ("val", best.val), ("train", best.train))
        if scores is not None
    ]
    return Section("Confusion matrices", [pair(matrices), remark(CONFUSION_REMARK)])


def _grades(best: EpochRecord) -> Section:
    tables = [
        class_table(best.test.metrics.confusion, f"Test set, epoch {best.epoch}"),
        class_table(best.train.metrics.confusion, f"Train set, epoch {best.epoch}"),
    ]
    return Section("By grade", [pair(tables)])


def _scores(best: EpochRecord, last: EpochRecord) -> Section:
    rows: list[list[object]] = []
    for which, record in (("best", best), ("last", last)):
        for name, scores in (("test", record.test), ("val", record.val), ("train", record.train)):
            if scores is not None:
                found = scores.metrics
                shares = [percent(found.accuracy), percent(found.balanced_accuracy), number(found.qwk), number(found.macro_f1)]
                rows.append([f"{which} ({record.epoch}), {SET_TITLES[name]}", number(scores.loss), *shares])
    return Section(
        "Best and last epoch", [table(["epoch, set", "loss", "accuracy", "balanced acc.", "QWK", "macro F1"], rows, "All figures")]
    )


def _speed(history: Sequence[EpochRecord]) -> Section:
    rows = [
        [
            record.epoch,
            f"{record.images_per_second:,.1f}",
            f"{record.data_wait_seconds:.2f}",
            f"{record.train_seconds:.1f}",
            f"{record.epoch_seconds:.1f}",
        ]
        for record in history
    ]
    text = (
        f"Median of {len(history):,} epochs: {median(record.images_per_second for record in history):,.1f} training images/s, "
        f"{median(record.epoch_seconds for record in history):,.1f} s an epoch with its evaluation, "
        f"{100 * median(record.data_wait_share for record in history):.1f} % of the training time waiting for data."
    )
    listed = table(["epoch", "images/s", "data wait (s)", "training (s)", "whole epoch (s)"], rows, "Speed by epoch")
    opened = " open" if len(history) <= MAX_OPEN_ROWS else ""
    return Section("Speed", [f"<p>{text}</p>", f"<details{opened}><summary>Each epoch</summary>{listed}</details>"])
