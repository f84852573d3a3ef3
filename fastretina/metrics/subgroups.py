"""Metrics of parts of a data set: a model may be good for one camera, sex or clinic and bad for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastretina.beton.reader import GROUP, QUALITY, Beton
from fastretina.grading import Classes
from fastretina.metrics.bootstrap import Interval, Statistic, at_the_end, measured, tallies
from fastretina.metrics.cases import Cases
from fastretina.metrics.operating import HIGH_SENSITIVITY
from fastretina.metrics.ranking import AUROC_REFERABLE, Question, auroc
from fastretina.metrics.screening import Rule
from fastretina.metrics.table import Floats, Ints, accuracy, balanced_accuracy, qwk, sensitivity, specificity

MAX_VALUES = 20
FEW_IMAGES, FEW_OF_A_KIND = 30, 10
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Subgroup:
    """The images with one value of a column, or of one packing.

    Attributes:
        name: the value, "unknown" where there is none; of a packing its path.
        images, people, referable: how many; people None where patients are unknown, referable where no class is.
        intervals: accuracy, balanced_accuracy, where classes have an order qwk, where some are referable auroc_referable, and
            sensitivity and specificity by the rule of `subgroup_rule`.
        small: fewer than 30 images, or where classes are referable fewer than 10 that are, or fewer than 10 that are not: too few
            to tell anything from chance.
    """

    name: str
    images: int
    people: int | None
    referable: int | None
    intervals: dict[str, Interval]
    small: bool

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics by name, None where undefined."""
        return {name: interval.value for name, interval in self.intervals.items()}

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "name": self.name,
            "images": self.images,
            "people": self.people,
            "referable": self.referable,
            "small": self.small,
            **self.values,
            "intervals": {name: interval.bounds for name, interval in self.intervals.items()},
        }


@dataclass(frozen=True)
class Subgroups:
    """What a column divides the images into.

    Attributes:
        column: its name. count: of its values. parts: in the order of their names, "unknown" last; empty where there are more than
            20 values, which a reader is to be told: an age in years makes no subgroups.
    """

    column: str
    count: int
    parts: tuple[Subgroup, ...]

    @property
    def left_out(self) -> bool:
        """Whether there are too many values."""
        return self.count > MAX_VALUES

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {"column": self.column, "values": self.count, "left_out": self.left_out, "parts": [x.as_dict() for x in self.parts]}


def group_columns(beton: Beton, rows: Sequence[int]) -> dict[str, list[str]]:
    """The columns that subgroups are made of, by what they are called: those that the packer was given for it, and the photographs'
    quality; of the samples (n,) at these indices."""
    found = {}
    for name, column in beton.columns.items():
        if name == QUALITY or name.startswith(GROUP):
            text = list(column)
            found[name.removeprefix(GROUP)] = [text[row] for row in rows]
    return {name: column for name, column in found.items() if any(column)}


def subgroup_rule(rules: Sequence[Rule]) -> Rule | None:
    """What sensitivity and specificity of subgroups are measured at: the frozen high-sensitivity threshold, or where there is none
    the model's own answer; None where no class is referable."""
    frozen = [rule for rule in rules if rule.name == HIGH_SENSITIVITY]
    return next(iter([*frozen, *rules]), None)


@dataclass(frozen=True)
class Division:
    """Of N images into named parts, for `resample` and what it finds of them.

    parts: empty where there are too many. count: how many there are all the same.
    """

    count: int
    parts: tuple[tuple[str, Cases], ...]

    @classmethod
    def by_value(cls, column: Sequence[str], images: Cases) -> Division:
        """By the values of a column (N,) in order, "unknown" last."""
        named = np.asarray([value or UNKNOWN for value in column])
        names = sorted(set(named.tolist()), key=lambda name: (name == UNKNOWN, name))
        kept = names if len(names) <= MAX_VALUES else []
        return cls(len(names), tuple((name, images.chosen(named == name)) for name in kept))

    @classmethod
    def by_number(cls, numbers: Ints, names: Sequence[str], images: Cases) -> Division:
        """By numbers (N,) that count these names."""
        return cls(len(names), tuple((name, images.chosen(numbers == number)) for number, name in enumerate(names)))

    def statistics(self, classes: Classes, rule: Rule | None) -> list[Statistic]:
        """Of each part."""
        return [of_subgroup(part, classes, rule) for _, part in self.parts]

    def found(self, found: Sequence[Mapping[str, Interval]], classes: Classes, known: bool) -> tuple[Subgroup, ...]:
        """Each part, of what the statistics found. known: whether patients are."""
        rows = zip(self.parts, found, strict=True)
        return tuple(_subgroup(name, part, classes, known, metrics) for (name, part), metrics in rows)


def of_subgroup(cases: Cases, classes: Classes, rule: Rule | None) -> Statistic:
    """The metrics of Subgroup.intervals, of images."""
    graded = tallies(cases.labels, cases.predicted, cases.owner, len(classes))
    asked = Question(cases.scores, cases.ill.astype(np.float64)).counts(cases.owner)
    referred = None if rule is None else tallies(cases.ill.astype(np.int64), rule.refers(cases).astype(np.int64), cases.owner, 2)
    metrics = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy} | ({"qwk": qwk} if classes.ordinal else {})

    def statistic(weights: Floats) -> dict[str, Floats]:
        matrices = graded(weights)
        found = {name: measured(function, matrices) for name, function in metrics.items()}
        if referred is not None:
            counts = referred(weights)
            found |= {AUROC_REFERABLE: auroc(*asked(weights)), "sensitivity": sensitivity(counts)}
            found |= {"specificity": specificity(counts)}
        return found

    return statistic


def _subgroup(name: str, cases: Cases, classes: Classes, known: bool, found: Mapping[str, Interval]) -> Subgroup:
    """Of what `of_subgroup` found of these images. known: whether patients are."""
    ill = int(cases.ill.sum())
    small = len(cases) < FEW_IMAGES or (bool(classes.referable) and min(ill, len(cases) - ill) < FEW_OF_A_KIND)
    people = len(np.unique(cases.owner)) if known else None
    ends = {"sensitivity": cases.ill, "specificity": ~cases.ill, "accuracy": np.ones(len(cases), np.bool_)}
    intervals = {name: at_the_end(one, cases.people(ends[name])) if name in ends else one for name, one in found.items()}
    return Subgroup(name, len(cases), people, ill if classes.referable else None, intervals, small)
