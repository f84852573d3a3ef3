"""The grader as a screening test for referable disease."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastretina.grading import REFERABLE_FROM, REFERABLE_SCORE
from fastretina.metrics.table import Floats, Ints

OWN_GRADE = f"the model's grade ≥ {REFERABLE_FROM}"
THRESHOLD = 0.5
SENSITIVITIES = (0.8, 0.9)  # targets; British screening asks for at least 80 % (British Diabetic Association, 1997)


@dataclass(frozen=True)
class OperatingPoint:
    """A rule that says whom to refer. threshold: where the referable score reaches it; None where the rule is another."""

    rule: str
    threshold: float | None
    sensitivity: float
    specificity: float


def referable_scores(probabilities: Floats) -> Floats:
    """(N,) probability of referable disease from (N, C) probabilities."""
    scores: Floats = probabilities[:, REFERABLE_FROM:].sum(axis=1)
    return scores


def operating_points(labels: Ints, probabilities: Floats) -> list[OperatingPoint]:
    """The model's grade (as fastretina.predict), threshold 0.5, and the highest that reaches each of SENSITIVITIES.

    The last are read off these very data: on others they will reach a little more or less.

    labels: (N,) true grades; probabilities: (N, C). Empty where the data hold no referable image, or nothing else.
    """
    scores, sick = referable_scores(probabilities), labels >= REFERABLE_FROM
    if not sick.any() or sick.all():
        return []
    descending = np.sort(scores[sick])[::-1]
    rules: list[tuple[str, float | None]] = [(OWN_GRADE, None), (f"{REFERABLE_SCORE} ≥ {THRESHOLD}", THRESHOLD)]
    for target in SENSITIVITIES:
        # The n-th highest score among the sick refers at least n of them; the small number keeps 0.8 * 5 from being 5 of 5.
        needed = max(1, int(np.ceil(target * len(descending) - 1e-9)))
        rules.append((f"sensitivity ≥ {100 * target:.0f} %, set here", float(descending[needed - 1])))
    points = []
    for rule, threshold in rules:
        referred = probabilities.argmax(axis=1) >= REFERABLE_FROM if threshold is None else scores >= threshold
        points.append(OperatingPoint(rule, threshold, float(referred[sick].mean()), float((~referred[~sick]).mean())))
    return points
