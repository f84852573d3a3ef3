"""What an assessment says, as sections of a report and as lines of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from fastretina.grading import REFERABLE, REFERABLE_FROM, REFERABLE_SCORE
from fastretina.metrics.assessment import BINS, Assessment
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES
from fastretina.metrics.screening import OperatingPoint
from fastretina.metrics.table import TITLES
from fastretina.report import plots
from fastretina.report.page import Section, bounds, image, number, pair, paragraph, percent, remark, table

PEOPLE = 1000


def screened(point: OperatingPoint, prevalence: float) -> tuple[int, int, int, int]:
    """What becomes of 1,000 people, of whom a share `prevalence` (0-1) has referable disease: those with it referred and missed,
    those without it referred and not."""
    ill = round(PEOPLE * prevalence)
    found, cleared = round(ill * point.sensitivity), round((PEOPLE - ill) * point.specificity)
    return found, ill - found, PEOPLE - ill - cleared, cleared


def screened_text(found: int, missed: int, needless: int, cleared: int) -> str:
    """`screened` in whole sentences, for the model's own grade."""
    ill, referred, others = found + missed, found + needless, missed + cleared
    counted = (
        f"Of {PEOPLE:,} people screened with one photograph each, {ill} have referable disease, if it is as frequent as in "
        f"this test set. To refer by the model's grade finds {found} of them and misses {missed}; of the "
        f"{PEOPLE - ill} without it, {needless} are referred needlessly."
    )
    if not referred or not others:
        return f"{counted} It refers {'all' if referred else 'none'} of them."
    return (
        f"{counted} So {found} of the {referred} people referred have the disease, and {missed} of the {others} "
        "who are not. Where it is rarer than here, fewer of those referred have it."
    )


def _rules(points: Sequence[OperatingPoint]) -> list[list[str]]:
    return [[point.rule, number(point.threshold), percent(point.sensitivity), percent(point.specificity)] for point in points]


def lines(assessment: Assessment) -> list[str]:
    """For the terminal."""
    points = assessment.operating_points
    found = [f"{'':<30}{'value':>10}   {100 * LEVEL:.0f} % interval ({assessment.groups:,} patients, {RESAMPLES:,} resamples)"]
    for name, interval in assessment.intervals.items():
        limits = bounds(interval.low, interval.high)
        found.append(f"{TITLES[name]:<30}{number(interval.value):>10}   {'undefined' if limits == '–' else limits}")
    if points:
        head = ["referred where", "threshold", "sensitivity", "specificity"]
        for rule, cut, sensitivity, specificity in (head, *_rules(points)):
            found.append(f"{rule:<30}{cut:>10}{sensitivity:>13}{specificity:>13}")
    return [*found, f"{'calibration error (ECE)':<30}{percent(assessment.calibration.ece):>10}"]


def intervals(assessment: Assessment) -> Section:
    """How sure the metrics are."""
    rows = [[TITLES[name], number(found.value), bounds(found.low, found.high)] for name, found in assessment.intervals.items()]
    return Section(
        "How sure these metrics are",
        [
            table(["metric", "value", f"{100 * LEVEL:.0f} % interval"], rows, "Test set"),
            remark(
                "With other test patients of the same kind the metrics would have come out differently: the interval shows "
                f"by how much. Percentile cluster bootstrap by patient: {RESAMPLES:,} resamples of {assessment.groups:,} patients, "
                "with all their images. What another seed of the training, or the choice of the epoch, changes comes on top."
            ),
        ],
    )


def screening(assessment: Assessment) -> Section | None:
    """The model as a screening test; none where the test set holds no referable eye, or nothing else."""
    points = assessment.operating_points
    if not points:
        return None
    counts = [[point.rule, *screened(point, assessment.prevalence)] for point in points]
    return Section(
        "As a screening test for referable disease",
        [
            remark(
                f"Referable: {REFERABLE}. Sensitivity: of the eyes with referable disease, the share "
                "that is referred. Specificity: of the eyes without it, the share that is rightly not referred. To raise "
                "the one lowers the other."
            ),
            table(
                ["refer where", "threshold", "sensitivity", "specificity"], _rules(points), "Sensitivity and specificity, test set"
            ),
            paragraph(screened_text(*screened(points[0], assessment.prevalence))),
            table(
                ["refer where", "ill, referred", "ill, missed", "well, referred", "well, not"],
                counts,
                f"Of {PEOPLE:,} people, {percent(assessment.prevalence)} of them ill as in this test set",
            ),
            remark(
                f"Thresholds are on {REFERABLE_SCORE}, the probabilities of the grades from {REFERABLE_FROM} on together. Those "
                "“set here” are read off these very images; on others they will reach a little more or less."
            ),
        ],
    )


def calibration(assessment: Assessment) -> Section:
    """How far its probabilities can be believed."""
    found = assessment.calibration
    bins = zip(found.samples, found.confidence, found.accuracy, strict=True)
    told = "; ".join(f"{count} answers at {percent(sure)} are {percent(right)} right" for count, sure, right in bins if count)
    return Section(
        "Calibration: what its probabilities are worth",
        [
            pair(
                [
                    image(plots.reliability(found), f"Reliability curve, test set: {told}"),
                    paragraph(
                        "Of the answers given with a probability of about 80 %, some 80 % should be right: points on the "
                        "dotted line. Below it the model is surer than it should be, above it less sure. ECE, expected "
                        f"calibration error: the mean distance of the answers from the line, here {percent(found.ece)} "
                        f"({BINS} bins of equal width, Guo et al. 2017)."
                    ),
                ]
            )
        ],
    )
