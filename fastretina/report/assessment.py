"""What an assessment says, as sections of a report and as lines of a terminal."""

from __future__ import annotations

from typing import NamedTuple, Self

from fastretina.grading import REFERABLE, REFERABLE_FROM, REFERABLE_SCORE
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES
from fastretina.metrics.calibration import BINS, Calibration
from fastretina.metrics.screening import OperatingPoint
from fastretina.metrics.table import TITLES
from fastretina.report import plots
from fastretina.report.page import Section, bounds, image, number, pair, paragraph, percent, remark, table

PEOPLE = 1000


class Screened(NamedTuple):
    """What becomes of 1,000 people who are screened. Those with referable disease: found + missed; without: needless + cleared."""

    found: int
    missed: int
    needless: int
    cleared: int

    @classmethod
    def at(cls, point: OperatingPoint, prevalence: float) -> Self:
        """At an operating point, where a share `prevalence` (0-1) has referable disease."""
        ill = round(PEOPLE * prevalence)
        found, cleared = round(ill * point.sensitivity), round((PEOPLE - ill) * point.specificity)
        return cls(found, ill - found, PEOPLE - ill - cleared, cleared)

    def text(self) -> str:
        """In whole sentences, for the model's own grade."""
        ill, referred, others = self.found + self.missed, self.found + self.needless, self.missed + self.cleared
        counted = (
            f"Of {PEOPLE:,} people screened with one photograph each, {ill} have referable disease, if it is as frequent as in "
            f"this test set. To refer by the model's grade finds {self.found} of them and misses {self.missed}; of the "
            f"{PEOPLE - ill} without it, {self.needless} are referred needlessly."
        )
        if not referred or not others:
            return f"{counted} It refers {'all' if referred else 'none'} of them."
        return (
            f"{counted} So {self.found} of the {referred} people referred have the disease, and {self.missed} of the {others} "
            "who are not. Where it is rarer than here, fewer of those referred have it."
        )


def lines(assessment: Assessment) -> list[str]:
    """For the terminal."""
    found = [f"{'':<30}{'value':>10}   {100 * LEVEL:.0f} % interval ({assessment.groups:,} patients, {RESAMPLES:,} resamples)"]
    for name, interval in assessment.intervals.items():
        limits = bounds(interval.low, interval.high)
        found.append(f"{TITLES[name]:<30}{number(interval.value):>10}   {'undefined' if limits == '–' else limits}")
    if assessment.operating_points:
        found.append(f"{'referred where':<30}{'threshold':>10}{'sensitivity':>13}{'specificity':>13}")
    found += [
        f"{point.rule:<30}{number(point.threshold):>10}{percent(point.sensitivity):>13}{percent(point.specificity):>13}"
        for point in assessment.operating_points
    ]
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
    if not assessment.operating_points:
        return None
    points = assessment.operating_points
    screened = [Screened.at(point, assessment.prevalence) for point in points]
    rules = [[point.rule, number(point.threshold), percent(point.sensitivity), percent(point.specificity)] for point in points]
    counts = [[point.rule, *counted] for point, counted in zip(points, screened, strict=True)]
    return Section(
        "As a screening test for referable disease",
        [
            remark(
                f"Referable: {REFERABLE}. Sensitivity: of the eyes with referable disease, the share "
                "that is referred. Specificity: of the eyes without it, the share that is rightly not referred. To raise "
                "the one lowers the other."
            ),
            table(["refer where", "threshold", "sensitivity", "specificity"], rules, "Sensitivity and specificity, test set"),
            paragraph(screened[0].text()),
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
    return Section(
        "Calibration: what its probabilities are worth",
        [
            pair(
                [
                    image(plots.reliability(found), f"Reliability curve, test set: {_reliability_text(found)}"),
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


def _reliability_text(found: Calibration) -> str:
    bins = zip(found.samples, found.confidence, found.accuracy, strict=True)
    return "; ".join(f"{count} answers at {percent(sure)} are {percent(right)} right" for count, sure, right in bins if count)
