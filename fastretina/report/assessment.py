"""What an assessment says, as sections of a report and as lines of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from fastretina.grading import Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES
from fastretina.metrics.calibration import BINS
from fastretina.metrics.ranking import RANKINGS, titles
from fastretina.metrics.screening import OperatingPoint
from fastretina.report import plots
from fastretina.report.page import Section, bounds, image, note, number, pair, paragraph, percent, remark, table

PEOPLE = 1000


def screened(point: OperatingPoint, prevalence: float) -> tuple[int, int, int, int]:
    """What becomes of 1,000 people, of whom a share `prevalence` (0-1) has referable disease: those with it referred and missed,
    those without it referred and not."""
    ill = round(PEOPLE * prevalence)
    found, cleared = round(ill * (point.sensitivity.value or 0)), round((PEOPLE - ill) * (point.specificity.value or 0))
    return found, ill - found, PEOPLE - ill - cleared, cleared


def screened_text(found: int, missed: int, needless: int, cleared: int) -> str:
    """`screened` in whole sentences, for the model's own answer."""
    ill, referred, others = found + missed, found + needless, missed + cleared
    counted = (
        f"Of {PEOPLE:,} people screened with one photograph each, {ill} have referable disease, if it is as frequent as in "
        f"this test set. To refer by the model's own answer finds {found} of them and misses {missed}; of the "
        f"{PEOPLE - ill} without it, {needless} are referred needlessly."
    )
    if not referred or not others:
        return f"{counted} It refers {'all' if referred else 'none'} of them."
    return (
        f"{counted} So {found} of the {referred} people referred have the disease, and {missed} of the {others} "
        "who are not. Where it is rarer than here, fewer of those referred have it."
    )


def _rules(points: Sequence[OperatingPoint]) -> list[list[str]]:
    return [
        [point.rule, number(point.threshold), percent(point.sensitivity.value), percent(point.specificity.value)]
        for point in points
    ]


def lines(assessment: Assessment) -> list[str]:
    """For the terminal."""
    points, named = assessment.operating_points, titles(assessment.classes)
    width = max(30, *(len(text) + 2 for text in (*(point.rule for point in points), *(named[name] for name in assessment.told))))
    found = [f"{'':<{width}}{'value':>10}   {100 * LEVEL:.0f} % interval ({assessment.resampled}, {RESAMPLES:,} resamples)"]
    for name, interval in assessment.told.items():
        limits = bounds(interval.low, interval.high)
        found.append(f"{named[name]:<{width}}{number(interval.value):>10}   {'undefined' if limits == '–' else limits}")
    if assessment.patients is None:
        found.append(assessment.method)
    if points:
        head = ["referred where", "threshold", "sensitivity", "specificity"]
        for rule, cut, sensitivity, specificity in (head, *_rules(points)):
            found.append(f"{rule:<{width}}{cut:>10}{sensitivity:>13}{specificity:>13}")
    return [*found, f"{'calibration error (ECE)':<{width}}{percent(assessment.calibration.ece):>10}"]


def intervals(assessment: Assessment) -> Section:
    """How sure the metrics are."""
    named, column = titles(assessment.classes), f"{100 * LEVEL:.0f} % interval"
    rows = [[named[name], number(found.value), bounds(found.low, found.high)] for name, found in assessment.told.items()]
    ranked = [ranking for ranking in RANKINGS if ranking.name in assessment.by_class]
    by_class = []
    for at in range(len(assessment.classes)):
        found = [assessment.by_class[ranking.name][at] for ranking in ranked]
        cells = [text for each in found for text in (number(each.value), bounds(each.low, each.high))]
        by_class.append([assessment.classes.title(at), *cells])
    columns = [text for ranking in ranked for text in (ranking.title, column)]
    if assessment.patients is None:
        how = (
            f"Percentile bootstrap by image: {RESAMPLES:,} resamples of {assessment.resampled}. Whose they are is unknown; where a "
            "person has several, the intervals are too narrow."
        )
    else:
        how = f"Percentile cluster bootstrap by patient: {RESAMPLES:,} resamples of {assessment.resampled}, with all their images."
    return Section(
        "How sure these metrics are",
        [
            table(["metric", "value", column], rows, "Test set"),
            table([assessment.classes.noun, *columns], by_class, f"Each {assessment.classes.noun} against the rest, test set"),
            note(f"The intervals may be too narrow: {UNKNOWN_OWNERS}.") if assessment.patients is None else "",
            remark(
                "With other test patients of the same kind the metrics would have come out differently: the interval shows "
                f"by how much. {how} What another seed of the training, or the choice of the epoch, changes comes on top."
            ),
        ],
    )


UNKNOWN_OWNERS = "the patients are unknown, and two photographs of one person are no two independent samples"


def screening(assessment: Assessment) -> Section | None:
    """The model as a screening test; none where no class is referable, or where the test set holds no referable eye, or nothing
    else."""
    points, classes = assessment.operating_points, assessment.classes
    if not points or assessment.prevalence is None:
        return None
    counts = [[point.rule, *screened(point, assessment.prevalence)] for point in points]
    return Section(
        "As a screening test for referable disease",
        [
            remark(
                f"Referable: {classes.referable_title}. Sensitivity: of the eyes with referable disease, the share "
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
            remark(f"Thresholds are on {_referable(classes)}. None of them was chosen on these images."),
        ],
    )


def _referable(classes: Classes) -> str:
    """What the thresholds are compared with."""
    score, title = classes.referable_score, classes.referable_title
    if len(classes.referable) == 1:
        return f"{score}, the probability of {title}"
    return f"{score}, the probabilities of {title} together"


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
