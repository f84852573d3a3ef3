"""report.html of an evaluation: trained models on a data set, which may be anybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastretina.beton.reader import Beton
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.flow import Flow
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.metrics.table import TITLES
from fastretina.metrics.table import headline as headline_metric
from fastretina.models.checkpoint import CheckpointInfo
from fastretina.report import sections
from fastretina.report.assessment import calibration, deferral, headline, intervals
from fastretina.report.mistakes import confident_mistakes, mistakes_section
from fastretina.report.page import Section, cards, note, page, percent, remark, table
from fastretina.report.participants import participants_section
from fastretina.report.screening import curves_section, decision_section, frozen_text, screening_section
from fastretina.report.subgroups import sources_section, subgroups_section

SET_TITLE = "Test set"


@dataclass(frozen=True)
class Evaluation:
    """What the report of an evaluation tells.

    Attributes:
        title: of the page.
        members: the checkpoint of each model and what it says of itself; of several, the answers are their mean.
        data: the data set's path, as given. digest: its `Beton.digest`.
        scores, answers, assessment: of the models' answers for it.
        device, amp_dtype: that they were graded on and in.
        beton: the open data set, for pictures of mistakes; None leaves these out.
        flow: how many rows of the label table came so far; None where nobody knows.
        warnings: what a reader must not overlook. settings: of the command.
    """

    title: str
    members: Sequence[tuple[Path, CheckpointInfo]]
    data: str
    digest: str
    scores: Scores
    answers: Predictions
    assessment: Assessment
    device: str
    amp_dtype: str
    beton: Beton | None = None
    flow: Flow | None = None
    warnings: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def evaluation_html(found: Evaluation) -> str:
    """One self-contained page, no network needed; a section that has nothing to tell is left out."""
    assessment, classes = found.assessment, found.assessment.classes
    warned = [*found.warnings]
    if any(info.operating is not None and info.operating.data == found.digest for _, info in found.members):
        warned.append("The thresholds were frozen on these very data: what they reach here is what they were chosen for.")
    head = [
        sections.subtitle(classes, found.device, found.amp_dtype),
        *(note(text) for text in warned),
        cards(headline(found.scores.values, assessment, classes, headline_metric(classes.ordinal))),
        note(frozen_text(assessment.operating), good=assessment.operating is not None) if classes.referable else "",
    ]
    confusion = found.scores.metrics.confusion
    matrix = [sections.confusion_tables([(SET_TITLE, confusion)], classes), remark(sections.confusion_remark(classes))]
    mistakes = None if found.beton is None else mistakes_section(confident_mistakes(found.answers, found.beton), classes)
    built = [
        sections.purpose(classes),
        _evaluated(found),
        None if found.flow is None else participants_section(found.flow, assessment),
        Section("Confusion matrix", matrix),
        Section(f"By {classes.noun}", [sections.class_table(confusion, f"Each {classes.noun}, test set", classes)]),
        intervals(assessment),
        screening_section(assessment),
        curves_section(assessment),
        decision_section(assessment),
        calibration(assessment),
        subgroups_section(assessment),
        sources_section([(SET_TITLE, assessment.sources, assessment.subgroup_rule)], classes),
        deferral(assessment),
        mistakes,
        sections.meanings(classes),
        sections.settings_section(found.settings),
    ]
    return page(found.title, head, [section for section in built if section is not None])


def _evaluated(found: Evaluation) -> Section:
    """Which models on which data, and whether these are new to them."""
    assessment = found.assessment
    counts = [sum(row) for row in found.scores.metrics.confusion]
    prevalence = [] if assessment.prevalence is None else [("referable", percent(assessment.prevalence))]
    data: list[Sequence[object]] = [
        ["data set", found.data],
        ["digest", found.digest],
        ["photographs", assessment.images],
        ["people", "unknown" if assessment.patients is None else assessment.patients],
        *prevalence,
        [f"share of the most frequent {assessment.classes.noun}", percent(max(counts) / assessment.images)],
    ]
    models: list[list[object]] = []
    for number, (path, info) in enumerate(found.members, start=1):
        chosen = f"epoch {info.epoch}, chosen by {TITLES.get(info.metric, info.metric)} on {_set(info)}"
        made = f"{info.arch}, {info.resolution} px, {info.head} head; {chosen}; {seen(info, found.digest)}"
        models += [[f"checkpoint {number}", str(path)], [f"model {number}", made]]
    several = f"The answers are the mean of {len(found.members)} models' probabilities. " if len(found.members) > 1 else ""
    return Section(
        "What was evaluated",
        [
            table(["data", "value"], data, "The data set", "words"),
            table(["model", "value"], models, "The models" if several else "The model", "words"),
            remark(
                f"{several}Whether a model has seen these data is told by the digests of whole data sets: parts of one, or the "
                "same people in another file, are not found so."
            ),
        ],
    )


def _set(info: CheckpointInfo) -> str:
    return "validation data" if info.selected_on == "val" else f"its {info.selected_on} data"


def seen(info: CheckpointInfo, digest: str) -> str:
    """Whether a model was trained or chosen on the data set of this digest, as far as its checkpoint knows."""
    known = info.data or {}
    if digest == known.get("train"):
        return "trained on these very data"
    if digest == known.get("whole"):
        return "trained on a part of these very data"
    if digest == known.get(info.selected_on):
        return "its epoch chosen on these very data"
    if known.get("train") is None or known.get(info.selected_on) is None:
        return "unknown whether it has seen these data"
    return "neither trained nor chosen on these data"
