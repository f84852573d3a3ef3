"""Metrics of probabilities: how well a score puts the images of a class above the others, whatever the threshold.

Each is a function of (U, R) float64 numbers of images at each of U ascending scores, those of the class and all others, to (R,)
float64; NaN where undefined. One row a score: numpy then adds up R columns at once, in a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.operating import referable_scores
from fastretina.metrics.table import TITLES, Floats, Ints, ratio


def auroc(sick: Floats, well: Floats) -> Floats:
    """Areas under the ROC curve; NaN without images of both kinds.

    The share of (sick, well) pairs in which the sick one has the higher score, ties half (Hanley and McNeil, Radiology 143:29,
    1982).
    """
    below = np.cumsum(well, axis=0) - well / 2
    return ratio((sick * below).sum(axis=0), sick.sum(axis=0) * well.sum(axis=0))


def average_precision(sick: Floats, well: Floats) -> Floats:
    """Areas under the precision-recall curve, as average precision: the mean, over the images of the class, of the precision at
    their score (scikit-learn's definition, without interpolation); NaN without any."""
    found, called = (np.cumsum(counts[::-1], axis=0)[::-1] for counts in (sick, sick + well))
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return ratio((sick * precision).sum(axis=0), sick.sum(axis=0))


class Ranking(NamedTuple):
    """A metric of scores. name: in files. title, meaning: for people."""

    name: str
    title: str
    function: Callable[[Floats, Floats], Floats]
    meaning: str


RANKINGS = (
    Ranking(
        "auroc", "AUROC", auroc,
        "the area under the ROC curve: how often the model gives a photograph of the class a higher probability of it than one of "
        "another class: 1 always, 0.5 by chance.",
    ),
    Ranking(
        "auprc", "AUPRC", average_precision,
        "the area under the precision-recall curve (average precision): the share of the class among the photographs called so, "
        "averaged over all thresholds. Guessing reaches the share of the class among all photographs.",
    ),
)  # fmt: skip
AUROC_REFERABLE = "auroc_referable"


class Question(NamedTuple):
    """Which of N images should score high: (N,) scores, and whether each image is one of those."""

    scores: Floats
    sick: Floats

    def counts(self, owner: Ints) -> Callable[[Floats], tuple[Floats, Floats]]:
        """What makes, of (people, R) numbers of how often each person counts, the (U, R) numbers that a ranking is a function of.
        owner: (N,) the person of each image."""
        order = np.argsort(self.scores, kind="stable")
        starts = np.flatnonzero(np.diff(self.scores[order], prepend=-np.inf))  # where a new score begins
        owner, sick = owner[order], self.sick[order][:, None]

        def counted(weights: Floats) -> tuple[Floats, Floats]:
            images = weights[owner]
            ill = np.add.reduceat(images * sick, starts, axis=0)
            return ill, np.add.reduceat(images, starts, axis=0) - ill

        return counted


def questions(labels: Ints, probabilities: Floats, classes: Classes) -> list[Question]:
    """One class against the rest, for each; then, where some are referable, those against the rest."""
    found = [Question(probabilities[:, number], (labels == number).astype(np.float64)) for number in range(len(classes))]
    if classes.referable:
        sick = np.isin(labels, classes.referable).astype(np.float64)
        found.append(Question(referable_scores(probabilities, classes), sick))
    return found


def overall(by_class: Floats) -> Floats:
    """(R,) of (R, C) values by class: of two classes that of the second, of more the mean of those that are defined."""
    if by_class.shape[1] == 2:
        return by_class[:, 1]
    known = ~np.isnan(by_class)
    return ratio(np.where(known, by_class, 0.0).sum(axis=1), known.sum(axis=1).astype(np.float64))


def titles(classes: Classes) -> dict[str, str]:
    """What each scalar metric is called, those of METRICS and of RANKINGS, for these classes."""
    of = f" of {classes[1]}" if len(classes) == 2 else f", mean over the {classes.nouns}"
    ranked = {ranking.name: ranking.title + of for ranking in RANKINGS}
    return {**TITLES, **ranked, AUROC_REFERABLE: "AUROC of referable disease"}
