"""All that is said about a model's answers besides grade_metrics: intervals, screening for referable disease, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from fastretina import plots
from fastretina.facts import METRIC_TITLES
from fastretina.history import Predictions
from fastretina.intervals import LEVEL, RESAMPLES, Interval, bootstrap, patient_groups
from fastretina.page import Section, bounds, image, number, pair, paragraph, percent, remark, table
from fastretina.runs import REFERABLE_FROM
from fastretina.screening import BINS, Calibration, OperatingPoint, calibration, operating_points

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


@dataclass(frozen=True)
class Assessment:
    """Figures of one data set.

    Attributes:
        groups: the patients (or single images, where names tell of no patient) that were drawn.
        prevalence: share of images with referable disease, 0-1.
    """

    groups: int
    prevalence: float
    intervals: dict[str, Interval]
    operating_points: list[OperatingPoint]
    calibration: Calibration

    @classmethod
    def of(cls, answers: Predictions, names: Sequence[str]) -> Self:
        """Of a model's answers, with the image's name for each. Some 0.2 s for 7,000 images."""
        labels, probabilities = answers.labels.numpy(), answers.log_probabilities.double().exp().numpy()
        groups = patient_groups(names)
        return cls(
            int(groups.max()) + 1,
            float((labels >= REFERABLE_FROM).mean()),
            bootstrap(labels, probabilities, groups),
            operating_points(labels, probabilities),
            calibration(labels, probabilities),
        )

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json; None where undefined."""
        return {
            "auroc_referable": self.intervals["auroc_referable"].value,
            "prevalence_referable": self.prevalence,
            "intervals": {
                **{name: {"low": found.low, "high": found.high} for name, found in self.intervals.items()},
                "level": LEVEL,
                "method": "percentile bootstrap, patients drawn whole",
                "resamples": RESAMPLES,
                "patients": self.groups,
            },
            "referable": [asdict(point) for point in self.operating_points],
            "calibration": asdict(self.calibration),
        }

    def sections(self) -> list[Section]:
        """Of a report, on the test set."""
        return [self._intervals(), *([self._screening()] if self.operating_points else []), self._calibration()]

    def _intervals(self) -> Section:
        rows = [[METRIC_TITLES[name], number(found.value), bounds(found.low, found.high)] for name, found in self.intervals.items()]
        return Section(
            "How sure these figures are",
            [
                table(["figure", "value", f"{100 * LEVEL:.0f} % interval"], rows, "Test set"),
                remark(
                    "With other test patients of the same kind the figures would have come out differently: the interval shows "
                    f"by how much. Percentile bootstrap, {RESAMPLES:,} resamples of {self.groups:,} patients, drawn with all "
                    "their images. What another seed of the training, or the choice of the epoch, changes comes on top."
                ),
            ],
        )

    def _screening(self) -> Section:
        points = self.operating_points
        screened = [Screened.at(point, self.prevalence) for point in points]
        rules = [[point.rule, number(point.threshold), percent(point.sensitivity), percent(point.specificity)] for point in points]
        counts = [[point.rule, *counted] for point, counted in zip(points, screened, strict=True)]
        return Section(
            "As a screening test for referable disease",
            [
                remark(
                    f"Referable: grade {REFERABLE_FROM} or more. Sensitivity: of the eyes with referable disease, the share "
                    "that is referred. Specificity: of the eyes without it, the share that is rightly not referred. To raise "
                    "the one lowers the other."
                ),
                table(["refer where", "threshold", "sensitivity", "specificity"], rules, "Sensitivity and specificity, test set"),
                paragraph(screened[0].text()),
                table(
                    ["refer where", "ill, referred", "ill, missed", "well, referred", "well, not"],
                    counts,
                    f"Of {PEOPLE:,} people, {percent(self.prevalence)} of them ill as in this test set",
                ),
                remark(
                    "Thresholds are on p2 + p3 + p4, the probabilities of the grades from 2 on together. Those “set here” are read "
                    "off these very images; on others they will reach a little more or less."
                ),
            ],
        )

    def _calibration(self) -> Section:
        found = self.calibration
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

    def lines(self) -> list[str]:
        """For the terminal."""
        found = [f"{'':<30}{'figure':>10}   {100 * LEVEL:.0f} % interval ({self.groups:,} patients drawn {RESAMPLES:,} times)"]
        for name, interval in self.intervals.items():
            limits = bounds(interval.low, interval.high)
            found.append(f"{METRIC_TITLES[name]:<30}{number(interval.value):>10}   {'undefined' if limits == '–' else limits}")
        if self.operating_points:
            found.append(f"{'referred where':<30}{'threshold':>10}{'sensitivity':>13}{'specificity':>13}")
        found += [
            f"{point.rule:<30}{number(point.threshold):>10}{percent(point.sensitivity):>13}{percent(point.specificity):>13}"
            for point in self.operating_points
        ]
        return [*found, f"{'calibration error (ECE)':<30}{percent(self.calibration.ece):>10}"]


def _reliability_text(found: Calibration) -> str:
    bins = zip(found.samples, found.confidence, found.accuracy, strict=True)
    return "; ".join(f"{count} answers at {percent(sure)} are {percent(right)} right" for count, sure, right in bins if count)
