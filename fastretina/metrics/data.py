"""The assessment of a model's answers for the images of an open data set: who and what they show stands in its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastretina.beton.reader import Beton
from fastretina.grading import Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.operating import Operating
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.subgroups import group_columns

Value = TypeVar("Value")


def assess(
    answers: Predictions,
    beton: Beton,
    classes: Classes,
    *,
    operating: Operating | None = None,
    uncalibrated: Predictions | None = None,
    members: Sequence[Predictions] = (),
) -> Assessment:
    """`Assessment.of` these answers, each for a sample of `beton`, by its id. Raises BetonError where one is for none."""
    rows = beton.index_of(answers.ids.numpy()).tolist()

    def of_rows(column: Sequence[Value] | None) -> list[Value] | None:
        return None if column is None else [column[row] for row in rows]

    return Assessment.of(
        answers,
        classes,
        of_rows(beton.patients),
        eyes=of_rows(beton.eyes),
        groups=group_columns(beton, rows),
        operating=operating,
        uncalibrated=uncalibrated,
        members=members,
        sources=beton.sources,
    )
