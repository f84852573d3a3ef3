"""Which answers a model is least sure of, and what is gained by leaving these to a human."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastretina.grading import Classes
from fastretina.metrics.predictions import Predictions
from fastretina.metrics.table import Floats, Ints, accuracy, defined, qwk, sensitivity

STEPS = 100  # shares referred to a human: 0, 1 %, ... 99 %


@dataclass(frozen=True)
class Deferral:
    """What is right of the answers that are left where the most uncertain are referred to a human.

    Attributes:
        by: what the images are ordered by: "disagreement" of the members of an ensemble, or "confidence": 1 - the highest
            probability.
        share: of the images that a human grades, ascending from 0, below 1.
        accuracy, qwk, sensitivity: of the model's own answers for the rest, for each share; None where undefined. qwk is empty
            where the classes have no order; sensitivity, of referable disease, where none is referable.
    """

    by: str
    share: list[float]
    accuracy: list[float | None]
    qwk: list[float | None]
    sensitivity: list[float | None]


def disagreement(member_probabilities: Floats) -> Floats:
    """(N,) how far the members of an ensemble disagree, of (M, N, C) probabilities: the mutual information of answer and member in
    nats, H(mean of p) - mean of H(p), 0 where all say the same (Houlsby et al., arXiv:1112.5745, 2011; of ensembles:
    Lakshminarayanan et al., NeurIPS 2017)."""
    gained: Floats = _entropy(member_probabilities.mean(axis=0)) - _entropy(member_probabilities).mean(axis=0)
    return np.maximum(gained, 0.0)  # which it is, but for rounding


def _entropy(probabilities: Floats) -> Floats:
    """(...) nats of (..., C)."""
    logarithms = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    found: Floats = -(probabilities * logarithms).sum(axis=-1)
    return found


def deferral(by: str, uncertainty: Floats, labels: Ints, predicted: Ints, classes: Classes) -> Deferral:
    """Of (N,) uncertainties, true and predicted classes, N >= 1. The most uncertain are referred first, of equals those that stand
    first in the data."""
    number, count = len(classes), len(labels)
    referred = [step * count // STEPS for step in range(STEPS)]
    order = np.argsort(-uncertainty, kind="stable")
    last = np.searchsorted(referred, np.arange(count), "right") - 1  # the last step at which the n-th most uncertain is still there
    cells = (labels * number + predicted)[order]
    left = np.bincount(last * number**2 + cells, minlength=STEPS * number**2).reshape(STEPS, number, number)
    matrices = np.cumsum(left[::-1], axis=0)[::-1].astype(np.float64)
    ill = np.isin(np.arange(number), classes.referable).astype(np.float64)
    both = np.stack([1 - ill, ill])
    referable = both @ matrices @ both.T
    return Deferral(
        by,
        [many / count for many in referred],
        [defined(value) for value in accuracy(matrices)],
        [defined(value) for value in qwk(matrices)] if classes.ordinal else [],
        [defined(value) for value in sensitivity(referable)] if classes.referable else [],
    )


def deferrals(answers: Predictions, members: Sequence[Predictions], classes: Classes) -> tuple[Deferral, ...]:
    """By confidence; where there are two members or more, by their disagreement too, which then comes first."""
    labels, predicted = answers.labels.numpy(), answers.predicted.numpy()
    found = {"confidence": 1 - answers.log_probabilities.double().exp().numpy().max(axis=1)}
    if len(members) > 1:
        disagreed = disagreement(np.stack([member.log_probabilities.double().exp().numpy() for member in members]))
        found = {"disagreement": disagreed, **found}
    return tuple(deferral(by, uncertainty, labels, predicted, classes) for by, uncertainty in found.items())
