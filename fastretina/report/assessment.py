"""What an assessment says of metrics, probabilities and uncertainty: sections of a report; and all of it as lines of a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from fastretina.errors import printable
from fastretina.grading import Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES, Interval
from fastretina.metrics.calibration import BINS, Calibration
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS, titles
from fastretina.metrics.screening import RATES
from fastretina.metrics.table import METRICS, TITLES, metrics_for
from fastretina.metrics.uncertainty import Deferral
from fastretina.report import plots_screening as plots
from fastretina.report.page import Ranged, Section, bounds, image, note, number, pair, paragraph, percent, remark, shown, table
from fastretina.report.screening import PLURALS, decided_by, main_point

UNKNOWN_OWNERS = "the patients are unknown, and two photographs of one person are no two independent samples"
DEFERRED = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares that a table names
DEFERRED_BY = {
    "disagreement": "how far the members of the ensemble disagree",
    "confidence": "how low the probability of its answer is",
}


def lines(assessment: Assessment) -> list[str]:
    """For the terminal."""
    named = titles(assessment.classes)
    rules = [point.rule for found in assessment.screening.values() for point in found.points]
    width = max(30, *(len(text) + 2 for text in (*rules, *(named[name] for name in assessment.told))))
    found = [f"{'':<{width}}{'value':>10}   {100 * LEVEL:.0f} % interval ({assessment.resampled}, {RESAMPLES:,} resamples)"]
    for name, interval in assessment.told.items():
        limits = bounds(interval.low, interval.high)
        found.append(f"{named[name]:<{width}}{number(interval.value):>10}   {'undefined' if limits == '–' else limits}")
    if assessment.patients is None:
        found.append(assessment.method)
    for unit, counted in assessment.screening.items():
        head = f"{counted.number:,} {PLURALS[unit]}, {counted.referable:,} referable"
        found.append(f"{head:<{width}}" + "".join(f"{TITLES[rate]:>13}" for rate in RATES))
        found += [
            f"{point.rule:<{width}}" + "".join(f"{percent(getattr(point, rate).value):>13}" for rate in RATES)
            for point in counted.points
        ]
    found += [f"not counted by {unit}: {why}" for unit, why in assessment.unknown.items()]
    if assessment.classes.referable and assessment.operating is None:
        found.append("no thresholds were frozen: the model has none, as one trained without validation data")
    before = _before_temperature(assessment)
    told = "" if before is None else f"   before the temperature {percent(before.ece)}"
    found.append(f"{'calibration error (ECE)':<{width}}{percent(assessment.calibration.ece):>10}{told}")
    return [printable(line) for line in found]


def headline(
    values: Mapping[str, float | None], assessment: Assessment | None, classes: Classes, first: str = ""
) -> list[tuple[str, str]]:
    """Cards of the metrics on the test set, by name in `values`, with their intervals; first: the metric that comes first."""
    found = []
    for metric in sorted(metrics_for(len(classes), classes.ordinal), key=lambda metric: metric.name != first):
        interval = assessment.intervals[metric.name] if assessment else None
        found.append((shown(metric, values[metric.name]), f"{metric.title}, test{_told(interval, metric.percent)}"))
    if assessment is None:
        return found
    area = AUROC_REFERABLE if classes.ordinal and AUROC_REFERABLE in assessment.told else RANKINGS[0].name
    found.append((number(assessment.intervals[area].value), f"{titles(classes)[area]}, test{_told(assessment.intervals[area])}"))
    point = main_point(assessment)
    if point is not None and (assessment.operating or not assessment.one_disease):
        both = f"{percent(point.sensitivity.value)} / {percent(point.specificity.value)}"
        limits = [bounds(rate.low, rate.high, True) for rate in (point.sensitivity, point.specificity)]
        named = f"sensitivity / specificity for referable disease, by {decided_by(point)}, test"
        found.append((both, f"{named}; 95 % intervals {' / '.join(limits)}"))
    return found


def _told(found: Interval | None, percent: bool = False) -> str:
    return f"; 95 % interval {bounds(found.low, found.high, percent)}" if found is not None and found.low is not None else ""


def intervals(assessment: Assessment) -> Section:
    """How sure the metrics are."""
    named, column = titles(assessment.classes), f"{100 * LEVEL:.0f} % interval"
    shares = {metric.name for metric in METRICS if metric.percent}
    rows = []
    for name, each in assessment.told.items():
        value = Ranged.of(each, percent=name in shares)
        rows.append([named[name], str(value), bounds(each.low, each.high, value.percent)])
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
            table(["metric", "value", column], rows, "All metrics, test set"),
            table([assessment.classes.noun, *columns], by_class, f"Each {assessment.classes.noun} against the rest, test set"),
            note(f"The intervals may be too narrow: {UNKNOWN_OWNERS}.") if assessment.patients is None else "",
            remark(
                "With other test patients of the same kind the metrics would have come out differently: the interval shows "
                f"by how much. {how} What another seed of the training, or the choice of the epoch, changes comes on top. "
                "An interval that is a single number, as of an area of 1, says that these data hold no error, not that others will "
                "hold none."
            ),
        ],
    )


def calibration(assessment: Assessment) -> Section:
    """How far its probabilities can be believed, before and after the temperature where both are known."""
    found, before = assessment.calibration, _before_temperature(assessment)
    told = f"Reliability curve, test set: {_bins(found)}"
    if before is not None:
        told += f". Before the temperature: {_bins(before)}"
    named = [("as the model gives them" if before is None else "after the temperature", found)]
    rows = [[text, percent(each.ece), number(each.brier)] for text, each in (*named, *_before(before))]
    explained = (
        "Of the answers given with a probability of about 80 %, some 80 % should be right: points on the dotted line. Below it the "
        "model is surer than it should be, above it less sure. ECE, expected calibration error: the mean distance of the answers "
        f"from the line ({BINS} bins of equal width, Guo et al. 2017). Brier score: the mean squared error of the probability of "
        "referable disease, 0 at best."
    )
    temperature = "The temperature, one number that makes all answers more or less sure, was fitted on validation data."
    text = [
        paragraph(explained),
        table(["probabilities", "ECE", "Brier score"], rows, "Calibration"),
        remark(temperature if before is not None else "No temperature was fitted, or none is known."),
    ]
    return Section(
        "Calibration: what its probabilities are worth", [pair([image(plots.reliability(found, before), told), "".join(text)])]
    )


def _before_temperature(assessment: Assessment) -> Calibration | None:
    """None where there was no temperature, or one that changes nothing."""
    return None if assessment.uncalibrated == assessment.calibration else assessment.uncalibrated


def _before(found: Calibration | None) -> list[tuple[str, Calibration]]:
    return [] if found is None else [("before the temperature", found)]


def _bins(found: Calibration) -> str:
    bins = zip(found.samples, found.confidence, found.accuracy, strict=True)
    return "; ".join(f"{count:,} answers at {percent(sure)} are {percent(right)} right" for count, sure, right in bins if count)


def deferral(assessment: Assessment) -> Section | None:
    """What is gained where the most uncertain answers go to a human; none without any order of uncertainty."""
    curves = assessment.deferrals
    if not curves:
        return None
    drawn = plots.deferral([(f"by {found.by}", found.share, found.accuracy) for found in curves], "accuracy")
    told = "; ".join(f"by {found.by}: {_deferred(found)}" for found in curves)
    explained = (
        "If the photographs that the model is least sure of are graded by a human, how many of its answers for the rest are right? "
        "A curve that rises says that the model knows when it does not know. Uncertain is measured by "
        f"{' or by '.join(DEFERRED_BY[found.by] for found in curves)}."
    )
    return Section(
        "Deferral: what the model leaves to a human",
        [
            pair(
                [
                    image(drawn, f"Deferral curve: accuracy of the rest. {told}"),
                    paragraph(explained) + "".join(_deferral_table(found, assessment.classes.nouns) for found in curves),
                ]
            )
        ],
    )


def _steps(found: Deferral) -> list[int]:
    """The places in its lists nearest to DEFERRED, each once: of few images several fall together."""
    return sorted({min(range(len(found.share)), key=lambda at: abs(found.share[at] - share)) for share in DEFERRED})


def _deferred(found: Deferral) -> str:
    return ", ".join(f"{percent(found.accuracy[at])} right where {percent(found.share[at])} are referred" for at in _steps(found))


def _deferral_table(found: Deferral, nouns: str) -> str:
    columns = [
        "referred to a human",
        "accuracy of the rest",
        *(["QWK"] if found.qwk else []),
        *(["sensitivity"] if found.sensitivity else []),
    ]
    rows = []
    for at in _steps(found):
        others = [*([number(found.qwk[at])] if found.qwk else []), *([percent(found.sensitivity[at])] if found.sensitivity else [])]
        rows.append([percent(found.share[at]), percent(found.accuracy[at]), *others])
    return table(columns, rows, f"The {nouns} of the rest, most uncertain first by {found.by}", "many")
