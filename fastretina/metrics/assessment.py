"""All that is said about a model's answers besides GradeMetrics: intervals, screening for referable disease, calibration,
subgroups, uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastretina.beton.reader import GROUP
from fastretina.grading import Classes, Side, all_known
from fastretina.metrics.bootstrap import LEVEL, RESAMPLES, Interval, Intervals, grading, patient_groups, resample
from fastretina.metrics.calibration import Calibration, calibration
from fastretina.metrics.cases import Cases, Unit
from fastretina.metrics.curves import DecisionCurve, decision_curve
from fastretina.metrics.operating import Operating
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.ranking import AUROC_REFERABLE, RANKINGS
from fastretina.metrics.screening import OperatingPoint, Rule, Screening, referring, rules, screening
from fastretina.metrics.sources import by_packing
from fastretina.metrics.subgroups import Division, Subgroup, Subgroups, subgroup_rule
from fastretina.metrics.table import Floats, Ints
from fastretina.metrics.uncertainty import Deferral, deferrals


@dataclass(frozen=True)
class Assessment:
    """What intervals, rankings, screening and calibration say of one data set. Nothing in it is fitted on these data.

    Attributes:
        classes: what is told apart. images: how many.
        patients: whose images they are, as a number of people; None where that is unknown: then single images were resampled.
        prevalence: share of images with referable disease, 0-1; None where no class is referable.
        intervals, by_class: see `Intervals`.
        calibration: of these probabilities. uncalibrated: of those before the temperature, None where they are not at hand.
        operating: the frozen thresholds; None where the model has none.
        screening: by unit, "image", "eye pair" and "person"; without those that cannot be told, and empty where no class is
            referable. unknown: why a unit is not there, by unit.
        decision: net benefit by image; None where no class is referable.
        deferrals: by disagreement, of an ensemble, and by confidence.
        subgroups: a table for each column, and for the side of the eye where it is known. subgroup_rule: what their sensitivity and
            specificity are of; None where no class is referable.
        sources: each of several packings; empty where there is one.
    """

    classes: Classes
    images: int
    patients: int | None
    prevalence: float | None
    intervals: dict[str, Interval]
    by_class: dict[str, list[Interval]]
    calibration: Calibration
    uncalibrated: Calibration | None = None
    operating: Operating | None = None
    screening: dict[Unit, Screening] = field(default_factory=dict)
    unknown: dict[Unit, str] = field(default_factory=dict)
    decision: DecisionCurve | None = None
    deferrals: tuple[Deferral, ...] = ()
    subgroups: tuple[Subgroups, ...] = ()
    subgroup_rule: Rule | None = None
    sources: tuple[Subgroup, ...] = ()

    @classmethod
    def of(
        cls,
        answers: Predictions,
        classes: Classes,
        patients: Sequence[str | None] | None,
        *,
        eyes: Sequence[Side | None] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        operating: Operating | None = None,
        uncalibrated: Predictions | None = None,
        members: Sequence[Predictions] = (),
        sources: Sequence[Path | str] = (),
    ) -> Self:
        """Of a model's answers for N images.

        Args:
            patients: (N,) whose image each is, None for unknown; without exception, or single images are resampled.
            eyes: (N,) which eye each shows. groups: (N,) text by column, "" for unknown, see `group_columns`.
            operating: the model's frozen thresholds, and nothing that is from these data.
            uncalibrated: the same answers without the temperature. members: those of each member of an ensemble.
            sources: the packings that the data are made of, see `by_source`.
        """
        labels, probabilities = _arrays(answers)
        known, asked = all_known(patients), rules(classes, operating)
        owner = np.arange(len(labels)) if known is None else patient_groups(known)
        images, rule = Cases.images(labels, probabilities, owner, classes), subgroup_rule(asked)
        units, unknown = _units(images, classes, patients, eyes)
        columns = {**({} if eyes is None else {"eye": [eye or "" for eye in eyes]}), **(groups or {})}
        tables = {name: Division.by_value(column, images) for name, column in columns.items()}
        packings = by_packing(answers.ids.numpy(), sources, images)
        found = resample(
            int(owner.max()) + 1,
            {
                "images": [grading(labels, probabilities, owner, classes)],
                "units": [referring(cases, classes, asked) for cases in units.values()],
                "sources": packings.statistics(classes, rule),
                **{GROUP + name: table.statistics(classes, rule) for name, table in tables.items()},
            },
        )
        intervals, told = Intervals.of(found["images"][0], classes), known is not None
        screened = zip(units.items(), found["units"], strict=True)
        return cls(
            classes,
            len(labels),
            int(owner.max()) + 1 if told else None,
            float(images.ill.mean()) if classes.referable else None,
            intervals.scalars,
            intervals.by_class,
            calibration(labels, probabilities, classes),
            None if uncalibrated is None else calibration(*_arrays(uncalibrated), classes),
            operating,
            {unit: screening(unit, cases, asked, metrics) for (unit, cases), metrics in screened},
            unknown,
            decision_curve(images.ill, images.scores) if classes.referable else None,
            deferrals(answers, members, classes),
            tuple(Subgroups(name, table.count, table.found(found[GROUP + name], classes, told)) for name, table in tables.items()),
            rule,
            packings.found(found["sources"], classes, told),
        )

    @property
    def operating_points(self) -> tuple[OperatingPoint, ...]:
        """Of images; empty where no class is referable, or where the data hold no referable image, or nothing else."""
        if "image" not in self.screening or self.prevalence in (0.0, 1.0):
            return ()
        return self.screening["image"].points

    @property
    def one_disease(self) -> bool:
        """Whether what is referable is the second of two classes: what is said of the one is then said of the other."""
        return len(self.classes) == 2 and self.classes.referable == (1,)

    @property
    def told(self) -> dict[str, Interval]:
        """The intervals that a reader is to see, each once."""
        return {name: found for name, found in self.intervals.items() if not (self.one_disease and name == AUROC_REFERABLE)}

    @property
    def method(self) -> str:
        """How the intervals were made, and what to think of them."""
        if self.patients is None:
            return "percentile bootstrap by image: patients are unknown, so that the intervals may be too narrow"
        return "percentile cluster bootstrap by patient"

    @property
    def resampled(self) -> str:
        """How many of what were drawn: "10 patients", "20 images"."""
        return f"{self.images:,} images" if self.patients is None else f"{self.patients:,} patients"

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json; None where undefined, or where no class is referable."""
        scalars = {ranking.name: self.intervals[ranking.name].value for ranking in RANKINGS}
        referable = self.intervals.get(AUROC_REFERABLE)
        return {
            **scalars,
            AUROC_REFERABLE: referable and referable.value,
            **{f"{name}_by_class": [interval.value for interval in found] for name, found in self.by_class.items()},
            "prevalence_referable": self.prevalence,
            "intervals": {
                **{name: interval.bounds for name, interval in self.intervals.items()},
                **{f"{name}_by_class": [interval.bounds for interval in found] for name, found in self.by_class.items()},
                "level": LEVEL,
                "method": self.method,
                "resamples": RESAMPLES,
                "patients": self.patients,
            },
            "qwk_weighting": "quadratic",
            "operating": self.operating and self.operating.as_dict(),
            "referable": [point.as_dict() for point in self.operating_points],
            "screening": {unit: found.as_dict() for unit, found in self.screening.items()},
            "screening_unknown": self.unknown,
            "decision_curve": self.decision and asdict(self.decision),
            "calibration": asdict(self.calibration),
            "calibration_before": self.uncalibrated and asdict(self.uncalibrated),
            "deferral": [asdict(found) for found in self.deferrals],
            "subgroups": [table.as_dict() for table in self.subgroups],
            "subgroup_rule": self.subgroup_rule and self.subgroup_rule.text,
            "sources": [found.as_dict() for found in self.sources],
        }


def _arrays(answers: Predictions) -> tuple[Ints, Floats]:
    """(N,) true classes, (N, C) float64 probabilities."""
    return answers.labels.numpy(), answers.log_probabilities.double().exp().numpy()


def _units(
    images: Cases, classes: Classes, patients: Sequence[str | None] | None, eyes: Sequence[Side | None] | None
) -> tuple[dict[Unit, Cases], dict[Unit, str]]:
    """What can be counted, and why the rest cannot; nothing of either where no class is referable."""
    if not classes.referable:
        return {}, {}
    if all_known(patients) is None:
        missing = len(images) if patients is None else sum(patient is None for patient in patients)
        why = f"of {missing:,} of {len(images):,} images it is unknown whose they are"
        return {"image": images}, {"eye pair": why, "person": why}
    units: dict[Unit, Cases] = {"image": images, "eye pair": images.pairs(eyes or [None] * len(images)), "person": images.persons()}
    if len(units["eye pair"]):
        return units, {}
    del units["eye pair"]
    if eyes is None or not any(eyes):
        return units, {"eye pair": "which eye the images show is unknown"}
    return units, {"eye pair": "no patient has two images, one of the left and one of the right eye"}
