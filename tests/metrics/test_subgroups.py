"""Subgroups and packings: each against the same metrics of its images alone, and a slow bootstrap."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.metrics as oracle
from answer_cases import answers, patients, predictions, stored

from fastretina.beton.joined import SOURCE_BIT
from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.grading import RETINOPATHY, Classes
from fastretina.metrics.assessment import Assessment
from fastretina.metrics.bootstrap import draws, patient_groups, resample
from fastretina.metrics.cases import Cases
from fastretina.metrics.operating import Operating, Threshold
from fastretina.metrics.screening import rules
from fastretina.metrics.sources import by_source
from fastretina.metrics.subgroups import Division, group_columns, subgroup_rule

FROZEN = Operating((Threshold("youden", 0.7, None, 0.8, 0.8), Threshold("high-sensitivity", 0.3, 0.9, 0.9, 0.5)), 90, 30, None)


@pytest.mark.parametrize("seed", range(8))
def test_subgroups_are_measured_as_their_images_alone(seed):
    count = 20 + 20 * seed
    labels, probabilities = answers(seed, count, digits=seed % 2 or None)
    camera = np.random.default_rng(seed).choice(["wide", "", "narrow"], count, p=[0.7, 0.2, 0.1])
    given, owner = predictions(labels, probabilities), patients(count)
    found = Assessment.of(given, RETINOPATHY, owner, groups={"camera": camera.tolist()}, operating=FROZEN)
    (cameras,) = found.subgroups
    assert [part.name for part in cameras.parts] == [*sorted({*camera} - {""}), *(["unknown"] if "" in camera else [])]
    for part in cameras.parts:
        mine = camera == part.name.replace("unknown", "")
        true, said, scores = labels[mine], given.predicted.numpy()[mine], stored(given)[mine][:, 2:].sum(axis=1)
        ill, referred = true >= 2, scores >= 0.3
        assert (part.images, part.people, part.referable) == (mine.sum(), len({*np.array(owner)[mine]}), ill.sum())
        expected = {
            "accuracy": oracle.accuracy_score(true, said),
            "balanced_accuracy": oracle.recall_score(true, said, labels=np.unique(true), average="macro", zero_division=0),
            "qwk": oracle.cohen_kappa_score(true, said, weights="quadratic", labels=range(5)) if len({*true, *said}) > 1 else None,
            "auroc_referable": oracle.roc_auc_score(ill, scores) if len({*ill}) > 1 else None,
            "sensitivity": referred[ill].mean() if ill.any() else None,
            "specificity": (~referred[~ill]).mean() if not ill.all() else None,
        }
        assert part.values == {name: value if value is None else pytest.approx(value) for name, value in expected.items()}
        assert part.small == (mine.sum() < 30 or ill.sum() < 10 or (~ill).sum() < 10)
    assert found.subgroup_rule.name == "high-sensitivity"


def test_intervals_of_a_subgroup_are_of_resamples_of_all_people_some_of_which_lack_it():
    labels, probabilities = answers(3, 30, digits=1)
    owner, rare = patient_groups(patients(30)), ["yes" if number in (3, 8) else "no" for number in range(30)]
    asked = subgroup_rule(rules(RETINOPATHY, FROZEN))
    division = Division.by_value(rare, Cases.images(labels, probabilities, owner, RETINOPATHY))
    right, slow = probabilities.argmax(axis=1) == labels, []
    for drawn in draws(15, 80, seed=1):
        rows = [row for person in drawn for row in (3, 8) if owner[row] == person]
        slow.append(right[rows].mean() if rows else np.nan)
    assert np.isnan(slow).any()
    weights = np.stack([np.bincount(drawn, minlength=15) for drawn in draws(15, 80, seed=1)], axis=1).astype(np.float64)
    measured = division.statistics(RETINOPATHY, asked)[1](weights)
    np.testing.assert_allclose(measured["accuracy"], slow)
    assert np.isnan(measured["qwk"][np.isnan(slow)]).all()
    interval = resample(15, {"rare": division.statistics(RETINOPATHY, asked)}, resamples=80, seed=1)["rare"][1]["accuracy"]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.nanpercentile(slow, [2.5, 97.5])))


@pytest.mark.parametrize(
    ("images", "ill", "small"), [(29, 14, True), (30, 10, False), (30, 9, True), (30, 20, False), (30, 21, True)]
)
def test_what_is_small_is_said(images, ill, small):
    labels = np.repeat([2, 0], [ill, images - ill])
    found = Assessment.of(predictions(labels, answers(1, images)[1]), RETINOPATHY, None, groups={"sex": ["f"] * images})
    assert found.subgroups[0].parts[0].small == small
    assert found.subgroups[0].parts[0].people is None  # unknown, which is not the number of images
    nobody = Classes(RETINOPATHY.names)
    found = Assessment.of(predictions(labels, answers(1, images)[1]), nobody, None, groups={"sex": ["f"] * images})
    assert found.subgroups[0].parts[0].small == (images < 30)
    assert found.subgroups[0].parts[0].values.keys() == {"accuracy", "balanced_accuracy"}
    assert found.subgroups[0].parts[0].referable is None


def test_a_column_of_more_than_20_values_is_left_out_and_the_side_of_the_eye_is_a_column():
    labels, probabilities = answers(1, 84)
    columns = {"age": [str(number % 21) for number in range(84)], "site": [str(number % 20) for number in range(84)]}
    eyes = [("left", "right", None)[number % 3] for number in range(84)]
    found = Assessment.of(predictions(labels, probabilities), RETINOPATHY, patients(84), groups=columns, eyes=eyes)
    eye, age, site = found.subgroups
    assert ([part.name for part in eye.parts], eye.left_out) == (["left", "right", "unknown"], False)
    assert (age.column, age.count, age.left_out, age.parts) == ("age", 21, True, ())
    assert (site.count, site.left_out, len(site.parts)) == (20, False, 20)
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))["subgroups"]
    assert written[1] == {"column": "age", "values": 21, "left_out": True, "parts": []}
    assert written[0]["parts"][0]["intervals"]["accuracy"] == eye.parts[0].intervals["accuracy"].bounds
    assert found.subgroup_rule.name == "answer"  # no threshold is frozen


def test_packings_are_subgroups_in_their_order_and_one_may_have_no_image_in_the_set():
    labels, probabilities = answers(2, 60)
    numbers = np.repeat([2, 0], [20, 40])
    given = predictions(labels, probabilities, (numbers << SOURCE_BIT) + np.arange(60))
    paths = ["a.beton", "b.beton", "c.beton"]
    found = Assessment.of(given, RETINOPATHY, patients(60), operating=FROZEN, sources=paths).sources
    assert [(part.name, part.images, part.people) for part in found] == [
        ("a.beton", 40, 20),
        ("b.beton", 0, 0),
        ("c.beton", 20, 10),
    ]
    assert found[0].values["accuracy"] == pytest.approx((given.predicted.numpy() == labels)[20:].mean())
    assert set(found[1].values.values()) == {None}
    assert found == tuple(by_source(given, paths, RETINOPATHY, patients(60), FROZEN))
    assert by_source(given, paths[:1], RETINOPATHY) == []


def test_the_packers_group_columns_and_the_quality_are_read_for_the_rows_asked_for(tmp_path):
    columns = {"patient": list("aabb"), "quality": ["1", "", "2", "1"], "group sex": ["f", "m", "", "f"], "group none": [""] * 4}
    with BetonWriter(tmp_path / "a.beton", 4, columns=list(columns)) as writer:
        for number, text in enumerate(zip(*columns.values(), strict=True)):
            writer.add(b"jpeg", 0, name=str(number), label=0, id=number, width=1, height=1, text=text)
        writer.finish({"classes": RETINOPATHY.as_dict()})
    with Beton(tmp_path / "a.beton") as beton:
        assert group_columns(beton, [3, 0, 1]) == {"quality": ["1", "1", ""], "sex": ["f", "f", "m"]}
