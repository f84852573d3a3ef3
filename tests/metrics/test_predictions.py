"""Metrics agree with scikit-learn, and undefined ones are None, not NaN."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import sklearn.metrics as oracle
import torch

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.predictions import GradeMetrics, Scores, grade_metrics
from fastretina.metrics.table import METRICS
from fastretina.training.progress import EpochRecord


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of random, often very uneven, proportions and predictions of random skill."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(5, 4000))
    labels = rng.choice(5, count, p=rng.dirichlet(np.full(5, 0.4)))
    predicted = np.where(rng.random(count) < rng.random(), labels, rng.choice(5, count, p=rng.dirichlet(np.full(5, 0.4))))
    return labels, predicted


def degenerate_cases() -> list[tuple[list[int], list[int]]]:
    """One grade in labels, in predictions or in both, nothing right, neighbours swapped, and a single image."""
    return [([2] * 7, [2] * 7), ([1] * 7, [3] * 7), ([0, 1, 2, 3, 4], [0] * 5), ([4] * 5, [0, 1, 2, 3, 4]), ([0, 1, 0], [1, 0, 1]),
            ([3], [0]), ([0], [0])]  # fmt: skip


@pytest.mark.parametrize("case", [*range(100), *degenerate_cases()], ids=str)
def test_metrics_agree_with_scikit_learn(case):
    labels, predicted = random_case(case) if isinstance(case, int) else map(np.array, case)
    ours = grade_metrics(torch.from_numpy(predicted), torch.from_numpy(labels), RETINOPATHY)
    assert ours.accuracy == pytest.approx(oracle.accuracy_score(labels, predicted), abs=1e-12)
    with warnings.catch_warnings():
        # scikit-learn warns of predicted grades that do not occur, and of kappa's 0/0; both are cases here.
        warnings.simplefilter("ignore")
        assert ours.balanced_accuracy == pytest.approx(oracle.balanced_accuracy_score(labels, predicted), abs=1e-12)
        kappa = oracle.cohen_kappa_score(labels, predicted, weights="quadratic", labels=range(5))
        recalls = oracle.recall_score(labels, predicted, average=None, labels=range(5), zero_division=np.nan)
    assert ours.qwk == (None if np.isnan(kappa) else pytest.approx(kappa, abs=1e-12))
    assert ours.macro_f1 == pytest.approx(oracle.f1_score(labels, predicted, average="macro"), abs=1e-12)
    assert ours.per_class_recall == [None if np.isnan(value) else pytest.approx(value, abs=1e-12) for value in recalls]
    assert ours.confusion == oracle.confusion_matrix(labels, predicted, labels=range(5)).tolist()


def test_one_grade_everywhere_has_no_kappa_and_valid_json():
    same = torch.full((7,), 2)
    found = grade_metrics(same, same, RETINOPATHY)
    assert found.qwk is None
    assert found.per_class_recall == [None, None, 1.0, None, None]
    assert found.balanced_accuracy == found.accuracy == found.macro_f1 == 1.0
    assert GradeMetrics(json.loads(json.dumps(found.as_dict(), allow_nan=False))["confusion"]) == found


def test_answering_one_grade_for_all_is_chance():
    labels = torch.arange(50) % 5
    found = grade_metrics(torch.zeros(50, dtype=torch.long), labels, RETINOPATHY)
    assert found.qwk == 0.0
    assert found.balanced_accuracy == pytest.approx(0.2)


def test_rows_of_the_confusion_matrix_are_the_true_grades():
    found = grade_metrics(torch.tensor([3, 3, 3]), torch.tensor([1, 1, 0]), RETINOPATHY)
    assert found.confusion[1][3] == 2
    assert found.confusion[0][3] == 1


def test_rank_prefers_kappa_then_accuracy_and_puts_undefined_last():
    matrices = (
        [[9, 0, 0], [0, 0, 0], [0, 0, 0]],  # undefined, accuracy 1
        [[9, 1, 0], [1, 0, 0], [0, 0, 0]],  # -0.1, accuracy 0.82
        [[0, 1, 0], [1, 0, 1], [0, 1, 0]],  # 0, accuracy 0
        [[4, 0, 0], [4, 0, 0], [0, 0, 0]],  # 0, accuracy 0.5
        [[0, 2, 0], [0, 0, 2], [0, 0, 2]],  # 0.5, accuracy 0.33
    )
    ordered = [Scores(1.0, GradeMetrics(matrix)) for matrix in matrices]
    assert [entry.metrics.qwk for entry in ordered] == [None, *(pytest.approx(kappa) for kappa in (-0.1, 0.0, 0.0, 0.5))]
    mixed = [ordered[number] for number in (3, 0, 4, 2, 1)]
    assert sorted(mixed, key=lambda entry: entry.rank("qwk")) == ordered
    assert max(ordered, key=lambda entry: entry.rank("accuracy")) is ordered[0]
    losses = [Scores(loss, ordered[0].metrics) for loss in (0.3, 0.1, 0.2)]
    assert max(losses, key=lambda entry: entry.rank("loss")) is losses[1]


@pytest.mark.parametrize("predicted", [[5, 0], [-1, 0]])
def test_grades_out_of_range_are_refused(predicted):
    with pytest.raises(ValueError, match="0-4"):
        grade_metrics(torch.tensor(predicted), torch.tensor([0, 0]), RETINOPATHY)


def test_unequal_lengths_and_no_samples_are_refused():
    with pytest.raises(ValueError, match="equal"):
        grade_metrics(torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long), RETINOPATHY)
    with pytest.raises(ValueError, match="N >= 1"):
        grade_metrics(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), RETINOPATHY)


def test_a_thousand_matrices_at_once_are_a_thousand_matrices():
    """What a bootstrap computes is what a pass over a data set computes, to rounding."""
    for metric in METRICS:
        number = 2 if metric.needs == "two classes" else 5
        matrices = np.random.default_rng(0).poisson(3.0, (1000, number, number)).astype(np.float64)
        matrices[0] = np.diag([7.0, *[0.0] * (number - 1)])
        together = metric.function(matrices)
        assert together.shape == (1000,)
        for value, matrix in zip(together, matrices, strict=True):
            np.testing.assert_allclose(metric.function(matrix[None]), value, rtol=1e-13, err_msg=metric.name)


def test_every_metric_of_the_table_is_everywhere():
    found = Scores(0.5, GradeMetrics([[3, 1], [0, 2]]))
    names = [metric.name for metric in METRICS]
    assert list(found.values) == ["loss", *names]
    assert list(found.as_dict()) == ["loss", *names, "per_class_recall", "confusion"]
    assert [getattr(found.metrics, name) for name in names] == list(found.metrics.values.values())
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(AttributeError, match="kappa_of_tomorrow"):
        _ = found.metrics.kappa_of_tomorrow


def test_a_metric_that_the_classes_do_not_have_is_absent_and_kappa_is_null_without_an_order():
    three = grade_metrics(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 1]), Classes(("normal", "AMD", "glaucoma")))
    assert three.values == {
        "accuracy": 0.75,
        "balanced_accuracy": pytest.approx(5 / 6),
        "qwk": None,
        "macro_f1": pytest.approx(7 / 9),
    }
    two = grade_metrics(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1]), Classes(("no", "yes")))
    assert (two.qwk, two.sensitivity, two.specificity, two.npv) == (None, 1.0, 0.5, 1.0)
    assert two.ppv == pytest.approx(2 / 3)
    assert three.sensitivity is None


def test_an_epoch_of_an_older_last_pt_is_read():
    """Of the time when each metric was stored by itself, rounded, beside the confusion matrix that they follow from."""
    confusion = [[3, 1], [0, 2]]
    old = {"loss": 0.5, "metrics": {"accuracy": 0.8333333, "balanced_accuracy": 0.875, "qwk": 0.6666667, "macro_f1": 0.8285714,
           "per_class_recall": [0.75, 1.0], "confusion": confusion}}  # fmt: skip
    times = {"train_seconds": 1.0, "epoch_seconds": 2.0, "data_wait_seconds": 0.1, "images_per_second": 6.0}
    record = EpochRecord.from_dict({"epoch": 1, "lr": 0.1, "train": old, "test": old, "val": None, **times})
    assert record.test == record.train == Scores(0.5, GradeMetrics(confusion))
    assert record.row()["test_qwk"] == pytest.approx(0.6666667, abs=1e-7)
    assert EpochRecord.from_dict(asdict(record)) == record
