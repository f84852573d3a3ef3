"""Figures agree with scikit-learn, and undefined ones are None, not NaN."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import sklearn.metrics as oracle
import torch

from fastretina.metrics.classification import GradeMetrics, grade_metrics
from fastretina.metrics.predictions import Scores


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of random, often very uneven, proportions and predictions of random skill."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(5, 4000))
    labels = rng.choice(5, count, p=rng.dirichlet(np.full(5, 0.4)))
    predicted = np.where(rng.random(count) < rng.random(), labels, rng.choice(5, count, p=rng.dirichlet(np.full(5, 0.4))))
    return labels, predicted


@pytest.mark.parametrize("seed", range(100))
def test_figures_agree_with_scikit_learn(seed):
    labels, predicted = random_case(seed)
    ours = grade_metrics(torch.from_numpy(predicted), torch.from_numpy(labels))
    assert ours.accuracy == pytest.approx(oracle.accuracy_score(labels, predicted), abs=1e-6)
    with warnings.catch_warnings():
        # scikit-learn warns of predicted grades that do not occur, and of kappa's 0/0; both are cases here.
        warnings.simplefilter("ignore")
        assert ours.balanced_accuracy == pytest.approx(oracle.balanced_accuracy_score(labels, predicted), abs=1e-6)
        kappa = oracle.cohen_kappa_score(labels, predicted, weights="quadratic", labels=range(5))
        recalls = oracle.recall_score(labels, predicted, average=None, labels=range(5), zero_division=np.nan)
    assert ours.qwk == (None if np.isnan(kappa) else pytest.approx(kappa, abs=1e-6))
    assert ours.macro_f1 == pytest.approx(oracle.f1_score(labels, predicted, average="macro"), abs=1e-6)
    assert ours.per_class_recall == [None if np.isnan(value) else pytest.approx(value, abs=1e-6) for value in recalls]
    assert ours.confusion == oracle.confusion_matrix(labels, predicted, labels=range(5)).tolist()


def test_one_grade_everywhere_has_no_kappa_and_valid_json():
    same = torch.full((7,), 2)
    figures = grade_metrics(same, same)
    assert figures.qwk is None
    assert figures.per_class_recall == [None, None, 1.0, None, None]
    assert figures.balanced_accuracy == figures.accuracy == figures.macro_f1 == 1.0
    assert GradeMetrics(**json.loads(json.dumps(figures.as_dict(), allow_nan=False))) == figures


def test_answering_one_grade_for_all_is_chance():
    labels = torch.arange(50) % 5
    figures = grade_metrics(torch.zeros(50, dtype=torch.long), labels)
    assert figures.qwk == 0.0
    assert figures.balanced_accuracy == pytest.approx(0.2)


def test_rows_of_the_confusion_matrix_are_the_true_grades():
    figures = grade_metrics(torch.tensor([3, 3, 3]), torch.tensor([1, 1, 0]))
    assert figures.confusion[1][3] == 2
    assert figures.confusion[0][3] == 1


def test_rank_prefers_kappa_then_accuracy_and_puts_undefined_last():
    def figures(qwk, accuracy):
        return Scores(1.0, GradeMetrics(accuracy, 0.2, qwk, 0.2, [None] * 5, [[0] * 5] * 5))

    ordered = [figures(None, 1.0), figures(-0.2, 0.9), figures(0.5, 0.6), figures(0.5, 0.7), figures(0.6, 0.1)]
    mixed = [ordered[place] for place in (3, 0, 4, 2, 1)]
    assert sorted(mixed, key=lambda entry: entry.rank("qwk")) == ordered
    assert max(ordered, key=lambda entry: entry.rank("accuracy")) is ordered[0]
    losses = [Scores(loss, ordered[0].metrics) for loss in (0.3, 0.1, 0.2)]
    assert max(losses, key=lambda entry: entry.rank("loss")) is losses[1]


@pytest.mark.parametrize("predicted", [[5, 0], [-1, 0]])
def test_grades_out_of_range_are_refused(predicted):
    with pytest.raises(ValueError, match="0-4"):
        grade_metrics(torch.tensor(predicted), torch.tensor([0, 0]))


def test_unequal_lengths_and_no_samples_are_refused():
    with pytest.raises(ValueError, match="equal"):
        grade_metrics(torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="N >= 1"):
        grade_metrics(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
