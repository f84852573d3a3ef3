"""What a run shows to people: report.html, made from numbers alone, and the pictures beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Self

from torch import Tensor

from fastretina.metrics.assessment import Assessment
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.metrics.screening import rules
from fastretina.metrics.subgroups import Subgroup, subgroup_rule
from fastretina.models.heads import HEADS, Decision
from fastretina.report import plots, sections
from fastretina.report.assessment import calibration, deferral, headline, intervals
from fastretina.report.mistakes import confident_mistakes, mistakes_section
from fastretina.report.page import Section, cards, image, note, number, page, pair, percent, remark, table, titled
from fastretina.report.screening import curves_section, decision_section, screening_section
from fastretina.report.subgroups import sources_section, subgroups_section
from fastretina.system.files import write_bytes
from fastretina.training.progress import EpochRecord, Progress
from fastretina.training.run_folder import RunFolder
from fastretina.training.run_info import SET_TITLES, RunInfo
from fastretina.training.state import report_ending, state_digest

MAX_OPEN_ROWS = 12
REDRAW_SECONDS = 30.0  # curves.png takes about half a second: too long for each epoch of a fast run


@dataclass(frozen=True)
class Results:
    """What a report tells of a model. A section whose part is missing is left out.

    Attributes:
        title: of the page. info: settings, data sets and machine; `test` must be among the data sets.
        scores: by data set, `test` at least: the model's own, of a run those of its best epoch.
        answers, assessment: for and of the test set; some mistakes among them are shown, where `info` has its file at hand.
        history, best_epoch: of the run that trained it, and the epoch (from 1) whose model it is.
        decision: what its head was fitted to, if anything. batch: batch.png.
        by_packing: of the sets that are made of several packings, the metrics of each.
    """

    title: str
    info: RunInfo
    scores: Mapping[str, Scores]
    answers: Predictions | None = None
    assessment: Assessment | None = None
    history: Sequence[EpochRecord] = ()
    best_epoch: int | None = None
    decision: Decision | None = None
    batch: bytes | None = None
    by_packing: Mapping[str, Sequence[Subgroup]] = field(default_factory=dict)

    @classmethod
    def of_run(cls, info: RunInfo, progress: Progress, batch: bytes | None = None) -> Self:
        """Of a training run; at least one epoch must be done."""
        best, history = progress.best, progress.history
        assert best is not None  # an epoch is done, so that one is the best
        epochs = f"{len(history)} epoch{'s' if len(history) > 1 else ''}"
        sets = {"test": best.test, "val": best.val, "train": best.train}
        return cls(
            title=f"{info.settings['arch']} at {info.settings['resolution']} px, {epochs}",
            info=info,
            scores={name: scores for name, scores in sets.items() if scores is not None},
            answers=progress.best_test,
            by_packing=info.sources(progress.best_answers),
            assessment=info.assess(progress.best_test, progress.best_val, progress.decision),
            history=history,
            best_epoch=best.epoch,
            decision=progress.decision,
            batch=batch,
        )

    def set_title(self, name: str) -> str:
        """Of tables of the model's answers: `Test set, epoch 7`."""
        return f"{SET_TITLES[name].capitalize()} set" + (f", epoch {self.best_epoch}" if self.best_epoch else "")


def report_html(results: Results) -> str:
    """One self-contained page, no network needed: those of SECTIONS that have something to tell."""
    info = results.info
    head = [
        sections.subtitle(info.classes, info.device, info.amp_dtype),
        cards(_cards(results)),
        note(info.selection_note, good=info.selected_on == "val") if results.history else "",
    ]
    return page(results.title, head, [section for build in SECTIONS if (section := build(results)) is not None])


def _cards(results: Results) -> list[tuple[str, str]]:
    history, classes = results.history, results.info.classes
    found = headline(results.scores["test"].values, results.assessment, classes, results.info.selection_metric)
    found.append((percent(results.info.data["test"].majority_share), f"accuracy of always the same {classes.noun}, test"))
    if history:
        last = history[-1]
        waiting = f"training images/s; {100 * last.data_wait_share:.1f} % of the time waiting for data"
        found.append((f"{results.best_epoch} of {last.epoch}", "best epoch; all test metrics are of this one"))
        found.append((f"{last.images_per_second:,.0f}", waiting))
    return found


def _curves(results: Results) -> Section | None:
    history, best_epoch = results.history, results.best_epoch
    if best_epoch is None:
        return None
    majority = results.info.data["test"].majority_share
    objective = HEADS[results.info.settings["head"]].objective
    panels, classes = [], results.info.classes
    for panel in plots.panels_for(classes):
        ends = []
        for name, title in SET_TITLES.items():
            values = [value for record in history if (value := record.row().get(f"{name}_{panel}")) is not None]
            if values:
                ends.append(f"{title} from {values[0]:.3f} to {values[-1]:.3f}")
        drawn = plots.curves(history, best_epoch, majority, objective, classes, [panel])
        panels.append(image(drawn, f"{plots.PANELS[panel][0]} by epoch: {'; '.join(ends) or 'undefined'}"))
    return Section("By epoch", [pair(panels), remark(sections.TRAIN_REMARK)])


def _confusions(results: Results) -> Section:
    classes = results.info.classes
    matrices = [(results.set_title(name), scores.metrics.confusion) for name, scores in results.scores.items()]
    parts = [sections.confusion_tables(matrices, classes), remark(sections.confusion_remark(classes))]
    return Section("Confusion matrices", parts)


def _by_class(results: Results) -> Section:
    classes = results.info.classes
    named = [(results.set_title(name), results.scores[name]) for name in ("test", "train") if name in results.scores]
    tables = (sections.class_table(scores.metrics.confusion, title, classes) for title, scores in named)
    return Section(f"By {classes.noun}", [pair(tables)])


def _sources(results: Results) -> Section | None:
    classes, assessment = results.info.classes, results.assessment
    own = subgroup_rule(rules(classes, None))  # thresholds from other data there are for the test set alone, see `RunInfo.sources`
    frozen = own if assessment is None else assessment.subgroup_rule
    named = [(results.set_title(name), parts, frozen if name == "test" else own) for name, parts in results.by_packing.items()]
    return sources_section(named, classes)


def _mistakes(results: Results) -> Section | None:
    answers, beton = results.answers, results.info.test_set
    return None if answers is None or beton is None else mistakes_section(confident_mistakes(answers, beton), results.info.classes)


def _best_and_last(results: Results) -> Section | None:
    if results.best_epoch is None:
        return None
    rows: list[list[object]] = []
    classes = results.info.classes
    for which, record in (("best", results.history[results.best_epoch - 1]), ("last", results.history[-1])):
        for name, scores in (("test", record.test), ("val", record.val), ("train", record.train)):
            if scores is not None:
                title = f"{which} ({record.epoch}), {SET_TITLES[name]}"
                rows.append([title, number(scores.loss), *sections.metric_cells(scores.values, classes)])
    return Section("Best and last epoch", [table(["epoch, set", "loss", *sections.metric_columns(classes)], rows, "All metrics")])


def _speed(results: Results) -> Section | None:
    history = results.history
    if not history:
        return None
    rows = []
    for record in history:
        seconds = f"{record.data_wait_seconds:.2f}", f"{record.train_seconds:.1f}", f"{record.epoch_seconds:.1f}"
        rows.append([record.epoch, f"{record.images_per_second:,.1f}", *seconds])
    text = (
        f"Median of {len(history):,} epochs: {median(record.images_per_second for record in history):,.1f} training images/s, "
        f"{median(record.epoch_seconds for record in history):,.1f} s an epoch with its evaluation, "
        f"{100 * median(record.data_wait_share for record in history):.1f} % of the training time waiting for data."
    )
    listed = table(["epoch", "images/s", "data wait (s)", "training (s)", "whole epoch (s)"], rows, "Speed by epoch")
    opened = " open" if len(history) <= MAX_OPEN_ROWS else ""
    return Section("Speed", [f"<p>{text}</p>", f"<details{opened}><summary>Each epoch</summary>{listed}</details>"])


def _first_batch(results: Results) -> Section | None:
    if results.batch is None:
        return None
    text = "Photographs of the first training batch as the network got them, with what they are"
    return Section("What the network saw", [titled(image(results.batch, text), "The first training batch", "wide")])


def _decision(results: Results) -> Section | None:
    if results.decision is None:
        return None
    between = ", ".join(f"{threshold:.3f}" for threshold in results.decision.thresholds)
    rows = [["head", "regression: the network gives one number"], ["thresholds between grades", between]]
    explained = "Fitted to the validation set for the highest QWK; the test set had no part in it."
    return Section("How a grade is decided", [table(["part", "value"], rows, "From output to grade", "words"), remark(explained)])


def _settings(results: Results) -> Section:
    info = results.info
    others = [("parameters", info.parameters), ("precision used", info.precision_note), ("loader", info.loader)]
    return sections.settings_section(info.settings, others)


def _assessed(build: Callable[[Assessment], Section | None]) -> Callable[[Results], Section | None]:
    return lambda results: None if results.assessment is None else build(results.assessment)


# In the page's order; None where there is nothing to tell.
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
    lambda results: sections.purpose(results.info.classes),
    lambda results: sections.meanings(results.info.classes),
    lambda results: sections.data_section(results.info.data_dict(), results.info.classes),
    _curves,
    _confusions,
    _by_class,
    _sources,
    _assessed(intervals),
    _assessed(screening_section),
    _assessed(curves_section),
    _assessed(decision_section),
    _assessed(calibration),
    _assessed(subgroups_section),
    _assessed(deferral),
    _mistakes,
    _best_and_last,
    _speed,
    _first_batch,
    _decision,
    _settings,
)


class RunPictures:
    """Draws what a run folder shows of `progress`. objective: what training makes small, in words."""

    def __init__(self, run: RunFolder, info: RunInfo, progress: Progress, objective: str) -> None:
        self._run, self._info, self._progress, self._objective = run, info, progress, objective
        self._drawn = time.monotonic()

    def first_batch(self, images: Tensor, labels: Tensor) -> None:
        """Draw batch.png of (B, 3, R, R) images and (B,) labels."""
        write_bytes(self._run.batch, plots.batch_grid(images, labels, self._info.classes))

    def after_epoch(self, record: EpochRecord) -> None:
        """Draw the curves anew, where that is worth its time."""
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._draw_curves()

    def _draw_curves(self) -> None:
        progress = self._progress
        assert progress.best_epoch is not None  # called after an epoch
        majority = self._info.data["test"].majority_share
        drawn = plots.curves(progress.history, progress.best_epoch, majority, self._objective, self._info.classes)
        write_bytes(self._run.curves, drawn)
        self._drawn = time.monotonic()

    def finish(self) -> None:
        """Draw all pictures and write the report; where no epoch is done there is nothing to draw."""
        run, best = self._run, self._progress.best
        if best is None:
            return
        self._draw_curves()
        for path, title, scores in ((run.confusion_test, "Test", best.test), (run.confusion_train, "Train", best.train)):
            write_bytes(
                path, plots.confusion(scores.metrics.confusion, f"{title} set, best epoch ({best.epoch})", self._info.classes)
            )
        batch = run.batch.read_bytes() if run.batch.is_file() else None
        text = report_html(Results.of_run(self._info, self._progress, batch)) + report_ending(state_digest(run.last))
        write_bytes(run.report, text.encode(errors="backslashreplace"))  # last of all: its ending says that the run is finished
