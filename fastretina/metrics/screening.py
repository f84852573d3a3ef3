"""The grader as a screening test for referable disease, at thresholds that nothing in these data has chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastretina.grading import Classes
from fastretina.metrics.bootstrap import Interval, Statistic, at_the_end, measured, tallies
from fastretina.metrics.cases import Cases, Unit
from fastretina.metrics.curves import Curve, precision_recall, roc
from fastretina.metrics.operating import Operating
from fastretina.metrics.ranking import Question, auroc, average_precision
from fastretina.metrics.table import accuracy, npv, ppv, qwk, sensitivity, specificity

ANSWER, HALF = "answer", "half"  # names of the two rules that every model has; the others have the names of their thresholds
THRESHOLD = 0.5
RATES = {"sensitivity": sensitivity, "specificity": specificity, "ppv": ppv, "npv": npv}


class Rule(NamedTuple):
    """Whom to refer. name: ANSWER, HALF, or that of the frozen threshold. text: in words. threshold: where the referable score is
    at or above; None for ANSWER, which refers where the model's answer is a referable class."""

    name: str
    text: str
    threshold: float | None

    def refers(self, cases: Cases) -> npt.NDArray[np.bool_]:
        """(N,), for each."""
        return cases.called if self.threshold is None else cases.scores >= self.threshold


@dataclass(frozen=True)
class OperatingPoint:
    """A rule that says whom to refer, and what it does to these data.

    Attributes:
        name, rule, threshold: see `Rule`; rule is its text.
        tp, fp, fn, tn: counts: ill and referred, well and referred, ill and missed, well and not referred.
        sensitivity, specificity, ppv, npv: with intervals, see `at_the_end`; the value is None where it is undefined, of data
            without anybody ill.
    """

    name: str
    rule: str
    threshold: float | None
    tp: int
    fp: int
    fn: int
    tn: int
    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        intervals: dict[str, Interval] = {name: getattr(self, name) for name in RATES}
        return {
            **asdict(self),
            **{name: interval.value for name, interval in intervals.items()},
            "intervals": {name: interval.bounds for name, interval in intervals.items()},
        }


@dataclass(frozen=True)
class Screening:
    """How well those with referable disease are told from those without, by image, by eye pair or by person.

    A pair and a person are ill where at least one image is referable, and have the highest score of their images. A pair is a
    patient with two images, of the left eye and of the right. Pairs and persons are resampled by person, as images are.

    Attributes:
        unit: what is counted. number: how many. referable: how many of them are ill.
        intervals: "auroc" and "auprc" of referable disease; where classes have an order "accuracy" and "qwk" of the (worst) grade.
        points: the model's own answer, 0.5, and the frozen thresholds, in this order.
        roc, precision_recall: curves, see `Curve`; None where undefined.
    """

    unit: Unit
    number: int
    referable: int
    intervals: dict[str, Interval]
    points: tuple[OperatingPoint, ...]
    roc: Curve | None
    precision_recall: Curve | None

    def point(self, name: str) -> OperatingPoint:
        """The one of that rule. KeyError."""
        return {point.name: point for point in self.points}[name]

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "number": self.number,
            "referable": self.referable,
            **{name: interval.value for name, interval in self.intervals.items()},
            "intervals": {name: interval.bounds for name, interval in self.intervals.items()},
            "points": [point.as_dict() for point in self.points],
            "roc": self.roc and asdict(self.roc),
            "precision_recall": self.precision_recall and asdict(self.precision_recall),
        }


def own_rule(classes: Classes) -> str:
    """To refer where the model's answer is a referable class, in words, which are few where the names of the classes are many."""
    title = classes.referable_title
    return f"the model says {title}" if len(title) <= 24 else "the model says a referable class"


def rules(classes: Classes, operating: Operating | None) -> tuple[Rule, ...]:
    """The model's answer (as fastretina.predict), threshold 0.5, and those frozen; none where no class is referable."""
    if not classes.referable:
        return ()
    frozen = () if operating is None else operating.thresholds
    return (
        Rule(ANSWER, own_rule(classes), None),
        Rule(HALF, f"{classes.referable_score} ≥ {THRESHOLD}", THRESHOLD),
        *(Rule(found.name, f"{found.name}, {classes.referable_score} ≥ {found.value:.3f}", found.value) for found in frozen),
    )


def referring(cases: Cases, classes: Classes, rules: Sequence[Rule]) -> Statistic:
    """What `screening` reads: the rates of each rule ("half sensitivity"), and the metrics of Screening.intervals."""
    ill = cases.ill.astype(np.int64)
    by_rule = {rule.name: tallies(ill, rule.refers(cases).astype(np.int64), cases.owner, 2) for rule in rules}
    graded = tallies(cases.labels, cases.predicted, cases.owner, len(classes))
    ranked = Question(cases.scores, cases.ill.astype(np.float64)).counts(cases.owner)

    def statistic(weights: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        counts = ranked(weights)
        found = {"auroc": auroc(*counts), "auprc": average_precision(*counts)}
        if classes.ordinal:
            matrices = graded(weights)
            found |= {"accuracy": measured(accuracy, matrices), "qwk": measured(qwk, matrices)}
        for name, tallied in by_rule.items():
            matrices = tallied(weights)
            found |= {f"{name} {rate}": function(matrices) for rate, function in RATES.items()}
        return found

    return statistic


def screening(unit: Unit, cases: Cases, rules: Sequence[Rule], found: Mapping[str, Interval]) -> Screening:
    """Of what `referring` found of these cases."""
    points = []
    for rule in rules:
        referred = rule.refers(cases)
        counts = [int((ill & called).sum()) for ill in (cases.ill, ~cases.ill) for called in (referred, ~referred)]
        tp, fn, fp, tn = counts
        of_whom = {"sensitivity": cases.ill, "specificity": ~cases.ill, "ppv": referred, "npv": ~referred}
        rates = {rate: at_the_end(found[f"{rule.name} {rate}"], cases.people(of_whom[rate])) for rate in RATES}
        points.append(OperatingPoint(rule.name, rule.text, rule.threshold, tp, fp, fn, tn, **rates))
    names = [name for name in ("accuracy", "qwk", "auroc", "auprc") if name in found]
    return Screening(
        unit,
        len(cases),
        int(cases.ill.sum()),
        {name: found[name] for name in names},
        tuple(points),
        roc(cases.ill, cases.scores),
        precision_recall(cases.ill, cases.scores),
    )
