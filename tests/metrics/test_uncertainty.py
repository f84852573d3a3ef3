"""Disagreement of an ensemble, and what deferral leaves, by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as oracle
from answer_cases import answers, predictions, stored

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.uncertainty import STEPS, deferral, disagreement


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


@pytest.mark.parametrize("seed", range(15))
def test_disagreement_is_the_mutual_information_by_hand(seed):
    members = np.random.default_rng(seed).dirichlet(np.full(5, 0.2), size=(2 + seed % 3, 20))
    members[:, 0] = np.eye(5)[0]  # all are sure of the same, where 0 log 0 stands
    found = disagreement(members)
    for number, value in enumerate(found):
        rows = members[:, number].tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert value == pytest.approx(entropy(mean) - sum(map(entropy, rows)) / len(rows), abs=1e-12)
    assert (found >= 0).all()


def test_members_that_are_sure_of_different_classes_disagree_by_the_logarithm_of_their_number():
    sure = np.eye(5)[[[0, 1], [1, 1]]]
    assert disagreement(sure) == pytest.approx([math.log(2), 0])
    assert disagreement(np.full((3, 1, 5), 0.2)) == pytest.approx([0])  # all unsure of the same


@pytest.mark.parametrize("seed", range(15))
def test_what_is_left_after_deferral_is_measured_by_scikit_learn(seed):
    labels, probabilities = answers(seed, 1 + 13 * seed, digits=0)  # ties: those that stand first in the data are referred first
    uncertainty, predicted, count = 1 - probabilities.max(axis=1), probabilities.argmax(axis=1), len(labels)
    found = deferral("confidence", uncertainty, labels, predicted, RETINOPATHY)
    ranked = sorted(range(count), key=lambda at: (-uncertainty[at], at))
    assert len(found.share) == STEPS
    for step, share in enumerate(found.share):
        rest = ranked[int(step * count / 100 + 1e-9) :]
        assert share == pytest.approx(1 - len(rest) / count)
        true, said = labels[rest], predicted[rest]
        assert found.accuracy[step] == pytest.approx(oracle.accuracy_score(true, said))
        if len({*true, *said}) > 1:
            assert found.qwk[step] == pytest.approx(oracle.cohen_kappa_score(true, said, weights="quadratic", labels=range(5)))
        else:
            assert found.qwk[step] is None
        if (true >= 2).any():
            assert found.sensitivity[step] == pytest.approx(oracle.recall_score(true >= 2, said >= 2))
        else:
            assert found.sensitivity[step] is None


def test_an_ensemble_defers_by_disagreement_and_by_confidence_and_one_model_by_confidence():
    labels, _ = answers(1, 60)
    members = [predictions(labels, answers(seed, 60)[1]) for seed in (2, 3)]
    both = np.stack([stored(member) for member in members])
    mean = predictions(labels, both.mean(axis=0))
    found = Assessment.of(mean, RETINOPATHY, None, members=members)
    assert [curve.by for curve in found.deferrals] == ["disagreement", "confidence"]
    assert found.deferrals[0] == deferral("disagreement", disagreement(both), labels, mean.predicted.numpy(), RETINOPATHY)
    alone = Assessment.of(mean, RETINOPATHY, None, members=members[:1])
    assert alone.deferrals == found.deferrals[1:]


def test_classes_without_an_order_have_no_kappa_and_without_a_referable_one_no_sensitivity():
    labels, probabilities = answers(1, 60, classes=3)
    found = deferral("confidence", probabilities[:, 0], labels, probabilities.argmax(axis=1), Classes(("a", "b", "c")))
    assert (found.qwk, found.sensitivity) == ([], [])
    assert len(found.accuracy) == STEPS
