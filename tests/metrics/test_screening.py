"""Screening by image, eye pair and person: against pandas, scikit-learn, and a slow bootstrap with the same draws."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as oracle
from answer_cases import answers, patients, predictions, stored

from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import Interval, at_the_end, draws, patient_groups, resample
from fastretina.metrics.cases import Cases
from fastretina.metrics.operating import Operating, Threshold, fit_operating
from fastretina.metrics.screening import referring, rules

FROZEN = Operating((Threshold("high-sensitivity", 0.3, 0.9, 0.9, 0.5), Threshold("youden", 0.6, None, 0.8, 0.8)), 90, 30, None)
SIDES = ("left", "right", None)


def people_of(seed: int, count: int) -> tuple[list[str], list[str | None]]:
    """Patients of one to five images, in no order, and sides of which some are unknown."""
    rng = np.random.default_rng([seed, 7])
    return [str(n) for n in rng.integers(0, max(1, count // 2), count)], [
        SIDES[n] for n in rng.choice(3, count, p=[0.45, 0.45, 0.1])
    ]


def table(seed: int, count: int, classes: Classes = RETINOPATHY) -> tuple[pd.DataFrame, Assessment]:
    """A row an image, and the assessment of the same images."""
    labels, probabilities = answers(seed, count, digits=seed % 3 or None, classes=len(classes))
    given = predictions(labels, probabilities)
    owner, eyes = people_of(seed, count)
    predicted, scores = given.predicted.numpy(), stored(given)[:, list(classes.referable)].sum(axis=1)
    rows = {"label": labels, "predicted": predicted, "score": scores, "patient": owner, "eye": eyes}
    frame = pd.DataFrame(rows).assign(
        ill=np.isin(labels, classes.referable), answer=np.isin(predicted, classes.referable), half=scores >= 0.5
    )
    frame = frame.assign(**{threshold.name: scores >= threshold.value for threshold in FROZEN.thresholds})
    return frame, Assessment.of(given, classes, owner, eyes=eyes, operating=FROZEN)


def paired(group: pd.DataFrame) -> bool:
    return len(group) == 2 and set(group["eye"]) == {"left", "right"}


def assert_same(found: float | None, expected: float) -> None:
    assert found == (None if np.isnan(expected) else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("classes", [RETINOPATHY, Classes(("AMD", "normal", "glaucoma"), (0, 2))], ids=["ordinal", "nominal"])
def test_units_and_operating_points_are_those_of_pandas_and_scikit_learn(seed, classes, monkeypatch):
    monkeypatch.setattr(resample, "__defaults__", (2, 0))  # the bounds are of no interest here
    images, found = table(seed, 6 + 6 * seed, classes)
    columns = ["label", "predicted", "score", "ill", "answer", "half", "high-sensitivity", "youden"]
    persons = images.groupby("patient")[columns].max()
    pairs = images.groupby("patient").filter(paired).groupby("patient")[columns].max()
    units = {"image": images, "person": persons} | ({"eye pair": pairs} if len(pairs) else {})
    assert found.screening.keys() == units.keys()
    assert found.unknown == (
        {} if len(pairs) else {"eye pair": "no patient has two images, one of the left and one of the right eye"}
    )
    for unit, expected in units.items():
        screening, both = found.screening[unit], expected["ill"].nunique() == 2
        assert (screening.unit, screening.number, screening.referable) == (unit, len(expected), int(expected["ill"].sum()))
        values = {name: interval.value for name, interval in screening.intervals.items()}
        area = oracle.roc_auc_score(expected["ill"], expected["score"]) if both else np.nan
        assert_same(values["auroc"], area)
        precision = oracle.average_precision_score(expected["ill"], expected["score"]) if expected["ill"].any() else np.nan
        assert_same(values["auprc"], precision)
        assert (screening.roc is None) == (not both)
        if classes.ordinal:
            assert_same(values["accuracy"], oracle.accuracy_score(expected["label"], expected["predicted"]))
            if len({*expected["label"], *expected["predicted"]}) > 1:
                assert_same(
                    values["qwk"],
                    oracle.cohen_kappa_score(expected["label"], expected["predicted"], weights="quadratic", labels=range(5)),
                )
            else:
                assert values["qwk"] is None
        assert classes.ordinal == ("qwk" in values)
        assert [point.name for point in screening.points] == ["answer", "half", "high-sensitivity", "youden"]
        for point in screening.points:
            tn, fp, fn, tp = oracle.confusion_matrix(expected["ill"], expected[point.name], labels=[False, True]).ravel()
            assert (point.tp, point.fp, point.fn, point.tn) == (tp, fp, fn, tn)
            for name, above, below in (
                ("sensitivity", tp, tp + fn), ("specificity", tn, tn + fp), ("ppv", tp, tp + fp), ("npv", tn, tn + fn),
            ):  # fmt: skip
                assert_same(getattr(point, name).value, above / below if below else np.nan)


@pytest.mark.parametrize("unit", ["image", "eye pair", "person"])
def test_intervals_of_every_unit_are_those_of_a_slow_bootstrap_by_person_with_the_same_draws(unit):
    labels, probabilities = answers(4, 40, digits=1)
    owner, eyes = patient_groups(patients(40)), ["left", "right"] * 19 + ["left", "left"]
    asked = rules(RETINOPATHY, FROZEN)
    images = Cases.images(labels, probabilities, owner, RETINOPATHY)
    cases = {"image": images, "eye pair": images.pairs(eyes), "person": images.persons()}[unit]
    assert len(cases) == {"image": 40, "eye pair": 19, "person": 20}[unit]
    found = resample(20, {"units": [referring(cases, RETINOPATHY, asked)]}, resamples=60, seed=5)["units"][0]
    slow: dict[str, list[float]] = {"auroc": [], "accuracy": [], "high-sensitivity sensitivity": [], "youden ppv": []}
    for drawn in draws(20, 60, seed=5):
        rows = np.concatenate([np.flatnonzero(cases.owner == person) for person in drawn])
        ill, scores = cases.ill[rows], cases.scores[rows]
        slow["auroc"].append(oracle.roc_auc_score(ill, scores) if 0 < ill.sum() < len(ill) else np.nan)
        slow["accuracy"].append((cases.labels[rows] == cases.predicted[rows]).mean())
        slow["high-sensitivity sensitivity"].append((scores[ill] >= 0.3).mean() if ill.any() else np.nan)
        slow["youden ppv"].append(ill[scores >= 0.6].mean() if (scores >= 0.6).any() else np.nan)
    for name, values in slow.items():
        low, high = np.nanpercentile(values, [2.5, 97.5])
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=1e-9), name


def test_referable_classes_need_not_be_the_last_and_may_be_none():
    classes = Classes(("AMD", "normal", "glaucoma"), (0, 2))
    labels, probabilities = answers(1, 80, classes=3)
    found = Assessment.of(predictions(labels, probabilities), classes, patients(80))
    assert [point.rule for point in found.operating_points] == ["the model says AMD or glaucoma", "p0 + p2 ≥ 0.5"]
    assert found.operating_points == found.screening["image"].points
    nobody = Assessment.of(predictions(labels, probabilities), Classes(classes.names), patients(80), operating=None)
    assert (nobody.screening, nobody.unknown, nobody.operating_points, nobody.decision) == ({}, {}, (), None)
    written = nobody.as_dict()
    assert (written["prevalence_referable"], written["auroc_referable"], written["referable"]) == (None, None, [])


def test_thresholds_that_refer_whom_they_were_fitted_on_reach_there_what_they_said():
    """The same answers, stored as float32 logarithms in between: none of the images falls below its own threshold."""
    labels, probabilities = answers(7, 200)
    given = predictions(labels, probabilities)
    frozen = fit_operating(labels, stored(given), RETINOPATHY)
    found = Assessment.of(given, RETINOPATHY, None, operating=frozen).screening["image"]
    for threshold in frozen.thresholds:
        point = found.point(threshold.name)
        assert point.threshold == threshold.value
        assert (point.sensitivity.value, point.specificity.value) == pytest.approx((threshold.sensitivity, threshold.specificity))


def test_the_points_of_the_model_alone_are_there_where_it_has_no_frozen_thresholds():
    labels, probabilities = answers(7, 40)
    found = Assessment.of(predictions(labels, probabilities), RETINOPATHY, None)
    assert [point.name for point in found.screening["image"].points] == ["answer", "half"]
    assert found.as_dict()["operating"] is None


@pytest.mark.parametrize(
    ("owner", "eyes", "unknown"),
    [
        (None, None, {"person": "of 6 of 6 images it is unknown whose they are"}),
        (["a", "a", None, "b", None, "c"], None, {"person": "of 2 of 6 images it is unknown whose they are"}),
        (list("aabbcc"), None, {"eye pair": "which eye the images show is unknown"}),
        (list("aabbcc"), [None] * 6, {"eye pair": "which eye the images show is unknown"}),
        (
            list("aabbbc"),
            ["left", "left", "left", "right", None, "right"],
            {"eye pair": "no patient has two images, one of the left and one of the right eye"},
        ),
    ],
    ids=["nobody known", "some known", "no eyes", "unknown eyes", "no pairs"],
)
def test_units_that_cannot_be_told_are_left_out_and_it_is_said_why(owner, eyes, unknown):
    labels, probabilities = answers(7, 6)
    found = Assessment.of(predictions(labels, probabilities), RETINOPATHY, owner, eyes=eyes)
    for unit, why in unknown.items():
        assert found.unknown[unit] == why
        assert unit not in found.screening
    assert "image" in found.screening
    assert found.as_dict()["screening_unknown"] == found.unknown
    assert (found.patients is None) == ("person" in unknown)


def test_data_of_the_well_alone_have_a_specificity_and_no_sensitivity():
    labels, probabilities = answers(7, 30)
    found = Assessment.of(predictions(np.zeros_like(labels), probabilities), RETINOPATHY, patients(30), operating=FROZEN)
    assert found.operating_points == ()  # as a report has them: pairs of both
    point = found.screening["person"].point("youden")
    assert (point.sensitivity.value, point.sensitivity.low) == (None, None)
    assert point.specificity.low <= point.specificity.value <= point.specificity.high


@pytest.mark.parametrize(("people", "value"), [(1, 1.0), (5, 0.0), (58, 1.0), (300, 0.0)])
def test_a_rate_without_an_exception_has_the_exact_interval_of_so_many_people(people, value):
    from scipy.stats import binomtest

    exact = binomtest(int(value * people), people).proportion_ci(0.95, "exact")
    found = at_the_end(Interval(value, value, value), people)
    assert (found.value, found.low, found.high) == pytest.approx((value, exact.low, exact.high))


def test_rates_between_the_ends_and_undefined_ones_keep_the_interval_that_they_have():
    for kept in (Interval(0.5, 0.4, 0.6), Interval(None, None, None), Interval(1.0, 0.9, 1.0)):
        assert at_the_end(kept, 0 if kept.value == 1.0 else 9) == kept


def test_a_perfect_model_is_not_said_to_be_perfect_for_other_people():
    labels = np.repeat([0, 2], 10)
    probabilities = np.eye(5)[labels]
    screened = Assessment.of(predictions(labels, probabilities), RETINOPATHY, [str(n // 2) for n in range(20)]).screening
    for unit, people in (("image", 5), ("person", 5)):
        point = screened[unit].point("answer")
        for rate in ("sensitivity", "specificity", "ppv", "npv"):
            interval = getattr(point, rate)
            assert (interval.value, interval.high) == (1.0, 1.0)
            assert interval.low == pytest.approx(0.025 ** (1 / people))
