"""Metrics and their intervals, against scikit-learn or a slow reference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.metrics as oracle
import torch
from answer_cases import answers, patients

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import Interval, bootstrap, draws, patient_groups
from fastretina.metrics.predictions import Predictions
from fastretina.report.assessment import intervals, lines

NAMES = ("accuracy", "balanced_accuracy", "qwk", "macro_f1", "auroc", "auprc", "auroc_referable")


def slow_rankings(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[float]]:
    """AUROC and average precision of each class against the rest, by scikit-learn; NaN where undefined."""
    columns = [(labels == number, probabilities[:, number]) for number in range(probabilities.shape[1])]
    return {
        "auroc": [oracle.roc_auc_score(sick, scores) if 0 < sick.sum() < len(sick) else np.nan for sick, scores in columns],
        "auprc": [oracle.average_precision_score(sick, scores) if sick.any() else np.nan for sick, scores in columns],
    }


def slow_metrics(labels: np.ndarray, probabilities: np.ndarray, classes: Classes = RETINOPATHY) -> dict[str, float]:
    """By scikit-learn; NaN where undefined."""
    predicted, sick = probabilities.argmax(1), np.isin(labels, classes.referable)
    seen, every = np.union1d(labels, predicted), range(len(classes))
    by_class = slow_rankings(labels, probabilities)
    found = {
        "accuracy": oracle.accuracy_score(labels, predicted),
        "balanced_accuracy": oracle.recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0),
        "macro_f1": oracle.f1_score(labels, predicted, average="macro"),
    }
    if classes.ordinal:
        found["qwk"] = oracle.cohen_kappa_score(labels, predicted, labels=every, weights="quadratic") if len(seen) > 1 else np.nan
    if len(classes) == 2:
        recall, precision = (
            score(labels, predicted, labels=every, average=None, zero_division=np.nan)
            for score in (oracle.recall_score, oracle.precision_score)
        )
        found |= {"sensitivity": recall[1], "specificity": recall[0], "ppv": precision[1], "npv": precision[0]}
        found |= {name: values[1] for name, values in by_class.items()}
    else:
        found |= {name: np.nan if np.isnan(values).all() else np.nanmean(values) for name, values in by_class.items()}
    if classes.referable:
        scores = probabilities[:, list(classes.referable)].sum(1)
        found["auroc_referable"] = oracle.roc_auc_score(sick, scores) if 0 < sick.sum() < len(sick) else np.nan
    return found


def assert_equal(found: Interval, expected: float, where: object) -> None:
    if np.isnan(expected):
        assert found.value is None, where
    else:
        assert found.value == pytest.approx(expected, abs=1e-9), where


@pytest.mark.parametrize(
    "classes",
    [
        RETINOPATHY,
        Classes(("no", "yes"), (1,)),
        Classes(("normal", "AMD", "glaucoma"), (1, 2)),
        Classes(tuple("abcdefg"), (0, 3)),
        Classes(tuple("abcdefg"), ordinal=True),
    ],
    ids=["retinopathy", "two", "three nominal", "seven nominal", "seven ordinal"],
)
def test_the_metrics_are_those_of_scikit_learn_on_random_cases(classes):
    """Few images and ties: classes without an image, and metrics that are undefined, are among them."""
    undefined = 0
    for seed in range(40):
        labels, probabilities = answers(seed, 4 + seed, digits=0 if seed % 3 == 0 else None, classes=len(classes))
        found = bootstrap(labels, probabilities, np.arange(len(labels)), classes, resamples=2)
        expected = slow_metrics(labels, probabilities, classes)
        assert found.scalars.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(found.scalars[name], value, (seed, name))
        for name, values in slow_rankings(labels, probabilities).items():
            for interval, value in zip(found.by_class[name], values, strict=True):
                assert_equal(interval, value, (seed, name))
                undefined += np.isnan(value)
    assert undefined > 0


def test_the_mean_over_the_classes_is_scikit_learns_where_all_occur():
    labels, probabilities = answers(4, 300)
    found = bootstrap(labels, probabilities, np.arange(300), RETINOPATHY, resamples=2).scalars["auroc"].value
    assert found == pytest.approx(oracle.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"), abs=1e-9)


@pytest.mark.parametrize("count", [9, 40])
def test_the_bootstrap_is_the_slow_one_with_the_same_draws(count):
    """9 images in 5 patients: resamples without a referable eye, or of one grade alone, occur and are left out."""
    labels, probabilities = answers(count, count, digits=1)
    groups = patient_groups(patients(count))
    resampled = []
    for drawn in draws(int(groups.max()) + 1, 60, seed=3):
        images = np.concatenate([np.flatnonzero(groups == patient) for patient in drawn])
        resampled.append(slow_metrics(labels[images], probabilities[images]))
    found = bootstrap(labels, probabilities, groups, RETINOPATHY, resamples=60, seed=3).scalars
    for name in NAMES:
        low, high = np.nanpercentile([metrics[name] for metrics in resampled], [2.5, 97.5])
        assert found[name].low == pytest.approx(low, abs=1e-9), name
        assert found[name].high == pytest.approx(high, abs=1e-9), name
    assert count == 40 or any(np.isnan(metrics["auroc_referable"]) for metrics in resampled)


def test_intervals_of_eyes_that_fail_together_are_wider_by_patient():
    """Both eyes of a patient graded right, or both wrong: there are half as many independent samples, so √2 times the width."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 5, 400), 2)
    right = np.repeat(rng.random(400) < 0.7, 2)
    probabilities = np.eye(5)[np.where(right, labels, (labels + 1) % 5)]
    by_patient = bootstrap(labels, probabilities, patient_groups(patients(800)), RETINOPATHY).scalars["accuracy"]
    by_image = bootstrap(labels, probabilities, np.arange(800), RETINOPATHY).scalars["accuracy"]
    ratio = (by_patient.high - by_patient.low) / (by_image.high - by_image.low)
    assert 1.25 < ratio < 1.6
    assert by_patient.low < right.mean() < by_patient.high


def test_images_of_a_patient_are_one_group():
    assert patient_groups(["10", "7", "10", "scan", "7"]).tolist() == [0, 1, 0, 2, 1]


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    labels, probabilities = answers(1, 60)
    one, same, other = (
        bootstrap(labels, probabilities, np.arange(60), RETINOPATHY, seed=seed).scalars["qwk"] for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_without_known_patients_images_are_drawn_and_that_is_said():
    """The same answers: the interval is that of single images, and nobody reads a number of patients out of it."""
    labels, probabilities = answers(3, 60)
    known = Predictions(torch.from_numpy(probabilities).log(), torch.from_numpy(labels), torch.arange(60))
    by_patient, by_image = (Assessment.of(known, RETINOPATHY, people) for people in (patients(60), None))
    alone = bootstrap(labels, known.log_probabilities.exp().numpy(), np.arange(60), RETINOPATHY).scalars
    assert by_image.intervals == alone
    assert by_patient.intervals != alone
    assert (by_patient.patients, by_image.patients) == (30, None)
    assert (by_patient.resampled, by_image.resampled) == ("30 patients", "60 images")
    assert by_image.as_dict()["intervals"]["patients"] is None
    assert by_image.as_dict()["intervals"]["method"].startswith("percentile bootstrap by image: patients are unknown")
    assert by_patient.as_dict()["intervals"]["method"] == "percentile cluster bootstrap by patient"
    assert any("may be too narrow" in line for line in lines(by_image))
    assert "may be too narrow" in "".join(intervals(by_image).parts)
    assert not any("too narrow" in text for text in (*lines(by_patient), *intervals(by_patient).parts))


def test_metrics_that_do_not_exist_are_none():
    found = bootstrap(np.zeros(6, np.int64), np.eye(5)[[0] * 6], np.arange(6), RETINOPATHY, resamples=20).scalars
    assert found["accuracy"].value == 1.0
    for name in ("qwk", "auroc_referable"):
        assert (found[name].value, found[name].low, found[name].high) == (None, None, None)


@pytest.mark.parametrize("labels", [[0] * 20, [n % 5 for n in range(20)]], ids=["one grade", "all grades"])
def test_an_assessment_goes_into_json(labels):
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found = Assessment.of(Predictions(logits.log_softmax(1), torch.tensor(labels), torch.arange(20)), RETINOPATHY, patients(20))
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["intervals"]["patients"] == 10
    assert set(NAMES) < written["intervals"].keys()
    assert (written["auroc_referable"] is None) == (labels[1] == 0)
    assert (written["referable"] == []) == (labels[1] == 0)
    assert written["screening"]["person"]["number"] == 10
    assert written["screening"]["image"]["points"][0]["intervals"]["specificity"].keys() == {"low", "high"}
    assert [len(written[name]) for name in ("deferral", "subgroups", "sources")] == [1, 0, 0]
