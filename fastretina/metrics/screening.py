"""The grader as a screening test for referable disease."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.table import Floats, Ints

THRESHOLD = 0.5
SENSITIVITIES = (0.8, 0.9)  # targets; British screening asks for at least 80 % (British Diabetic Association, 1997)


@dataclass(frozen=True)
class OperatingPoint:
    """A rule that says whom to refer. threshold: where the referable score reaches it; None where the rule is another."""

    rule: str
    threshold: float | None
    sensitivity: float
    specificity: float


def referable_scores(probabilities: Floats, classes: Classes) -> Floats:
    """(N,) probability of referable disease from (N, C) probabilities."""
    scores: Floats = probabilities[:, list(classes.referable)].sum(axis=1)
    return scores


def own_rule(classes: Classes) -> str:
    """To refer where the model's answer is a referable class, in words, which are few where the names of the classes are many."""
    title = classes.referable_title
    return f"the model says {title}" if len(title) <= 24 else "the model says a referable class"


def operating_points(labels: Ints, probabilities: Floats, classes: Classes) -> list[OperatingPoint]:
    """The model's answer (as fastretina.predict), threshold 0.5, and the highest that reaches each of SENSITIVITIES.

    The last are read off these very data: on others they will reach a little more or less.

    labels: (N,) true classes; probabilities: (N, C). Empty where no class is referable, or where the data hold no referable image,
    or nothing else.
    """
    scores, sick = referable_scores(probabilities, classes), np.isin(labels, classes.referable)
    if not sick.any() or sick.all():
        return []
    descending = np.sort(scores[sick])[::-1]
    rules: list[tuple[str, float | None]] = [(own_rule(classes), None), (f"{classes.referable_score} ≥ {THRESHOLD}", THRESHOLD)]
    for target in SENSITIVITIES:
        # The n-th highest score among the sick refers at least n of them; the small number keeps 0.8 * 5 from being 5 of 5.
        needed = max(1, int(np.ceil(target * len(descending) - 1e-9)))
        rules.append((f"sensitivity ≥ {100 * target:.0f} %, set here", float(descending[needed - 1])))
    points = []
    for rule, threshold in rules:
        referred = np.isin(probabilities.argmax(axis=1), classes.referable) if threshold is None else scores >= threshold
        points.append(OperatingPoint(rule, threshold, float(referred[sick].mean()), float((~referred[~sick]).mean())))
    return points
