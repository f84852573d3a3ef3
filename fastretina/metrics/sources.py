"""Metrics of each of several packings evaluated as one data set: a packing is a subgroup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastretina.beton.joined import SOURCE_BIT
from fastretina.grading import Classes, all_known
from fastretina.metrics.bootstrap import patient_groups, resample
from fastretina.metrics.cases import Cases
from fastretina.metrics.operating import Operating
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.screening import rules
from fastretina.metrics.subgroups import Division, Subgroup, subgroup_rule
from fastretina.metrics.table import Ints


def by_packing(ids: Ints, sources: Sequence[Path | str], images: Cases) -> Division:
    """N images by the packing that each is from, as its id says; none where there is but one packing."""
    return Division.by_number(ids >> SOURCE_BIT, [str(path) for path in sources] if len(sources) > 1 else [], images)


def by_source(
    answers: Predictions,
    sources: Sequence[Path | str],
    classes: Classes,
    patients: Sequence[str | None] | None = None,
    operating: Operating | None = None,
) -> list[Subgroup]:
    """Of a model's answers for a data set made of these packings, in their order; [] where there is but one. For data that nothing
    else is asked of: `Assessment.of` finds the same in its own resamples. A packing without an image in the set has none here."""
    if len(sources) < 2:
        return []
    known, rule = all_known(patients), subgroup_rule(rules(classes, operating))
    labels, probabilities = answers.labels.numpy(), answers.log_probabilities.double().exp().numpy()
    owner = np.arange(len(labels)) if known is None else patient_groups(known)
    division = by_packing(answers.ids.numpy(), sources, Cases.images(labels, probabilities, owner, classes))
    found = resample(int(owner.max()) + 1, {"sources": division.statistics(classes, rule)})
    return list(division.found(found["sources"], classes, known is not None))
