"""Runs of other classes than retinopathy's, of unknown patients, without a test set and of several packings."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import sklearn.metrics as oracle
import torch
from labelled import write_labelled
from test_config import Tiny

from fastretina import evaluate, open_beton
from fastretina.errors import UsageError
from fastretina.evaluate import EvaluateConfig
from fastretina.grading import RETINOPATHY, Classes, all_known, patients_in_both
from fastretina.models.checkpoint import read_info
from fastretina.train import main
from fastretina.training import build
from fastretina.training.config import TrainConfig, as_settings, check
from fastretina.training.data import open_data
from fastretina.training.state import load_state, save_state

TWO = Classes(("no", "yes"), (1,))
SEVEN = Classes(("normal", "AMD", "glaucoma", "cataract", "myopia", "hypertension", "other"), (1, 2))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread):
    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: Tiny(outputs))


@pytest.fixture
def packed(tiny_betons, tmp_path):
    """What packs the images of `tiny_betons`, train or test, anew, with every label modulo the number of classes."""

    def pack(which: str, classes: Classes, name: str = "", shift: int = 0, **changes) -> Path:
        with open_beton(getattr(tiny_betons, which)) as images:
            labels = changes.pop("labels", [(index + shift) % len(classes) for index in range(len(images))])
            return write_labelled(tmp_path / f"{name or which}.beton", images, labels=labels, classes=classes, **changes)

    return pack


def config(train: Path | str, test: Path | str | None, out: Path, **changes) -> TrainConfig:
    settings = {"epochs": 2, "batch_size": 8, "resolution": 32, "lr": 1e-2, "seed": 7, "workers": 1, "val_fraction": 0} | changes
    return TrainConfig(train=Path(train), test=None if test is None else Path(test), out=out, **settings)


def opened(settings: TrainConfig) -> dict:
    from contextlib import ExitStack

    with ExitStack() as stack:
        return open_data(settings, stack)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("classes", [TWO, SEVEN], ids=["two", "seven"])
def test_a_run_of_other_classes_reports_them_and_evaluation_finds_the_same(packed, tmp_path, monkeypatch, capsys, classes):
    settings = config(packed("train", classes), packed("test", classes), tmp_path / "run", val_fraction=0.3)
    main(settings)
    assert "bal" in capsys.readouterr().out
    found = metrics(settings.out)
    assert Classes.stored(found["classes"]) == classes == read_info(settings.out / "best.safetensors").classes
    assert (found["selection_metric"], found["selected_on"]) == ("balanced_accuracy", "val")
    with (settings.out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels, predicted = ([int(row[column]) for row in rows] for column in ("grade", "predicted"))
    # Not as the table has them, rounded: there two may be equal that are not.
    scores = load_state(settings.out / "last.pt")["progress"]["best_test"]["log_probabilities"].exp().tolist()
    assert scores == [[pytest.approx(float(row[f"p{number}"]), abs=1e-6) for number in range(len(classes))] for row in rows]
    best = found["best"]
    assert best["qwk"] is None
    assert best["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predicted))
    if classes is TWO:
        assert best["auroc"] == best["auroc_referable"] == pytest.approx(oracle.roc_auc_score(labels, [row[1] for row in scores]))
        assert best["auprc"] == pytest.approx(oracle.average_precision_score(labels, [row[1] for row in scores]))
        assert best["sensitivity"] == pytest.approx(oracle.recall_score(labels, predicted))
    else:
        assert best["auroc"] == pytest.approx(oracle.roc_auc_score(labels, scores, multi_class="ovr", average="macro"), abs=1e-4)
        assert "sensitivity" not in best
    assert len(best["auroc_by_class"]) == len(best["auprc_by_class"]) == len(best["per_class_recall"]) == len(classes)
    text = re.sub('base64,[^"]*', "", (settings.out / "report.html").read_text())
    assert "retinopathy" not in text
    assert "QWK" not in text
    for part in (classes[0], classes[1], f"always the same {classes.noun}", classes.referable_title):
        assert part in text
    monkeypatch.setattr("fastretina.models.checkpoint.build_model", lambda arch, outputs, **_: Tiny(outputs))
    evaluate.main(EvaluateConfig(settings.out / "best.safetensors", settings.test, out=tmp_path / "again", workers=1))
    again = metrics(tmp_path / "again")
    for name in ("confusion", "auroc_by_class", "referable", "prevalence_referable"):
        assert again[name] == best[name]
    assert again["classes"] == found["classes"]
    if classes is SEVEN:
        other = packed("test", replace(SEVEN, referable=()), name="other")
        with pytest.raises(
            UsageError, match=r"other\.beton and .*best\.safetensors differ in their classes: .*referable: none.*--classes"
        ):
            evaluate.main(EvaluateConfig(settings.out / "best.safetensors", other, workers=1))


def test_sets_of_other_classes_are_refused_with_both_named(packed, tmp_path):
    settings = config(packed("train", TWO), packed("test", RETINOPATHY), tmp_path / "run")
    with pytest.raises(
        UsageError, match=r"train\.beton and --test .*test\.beton differ in their classes: no, yes .*mild.*--classes"
    ):
        main(settings)
    assert not (settings.out / "config.json").exists()


@pytest.mark.parametrize("head", ["regression", "ordinal"])
def test_heads_that_need_an_order_refuse_classes_without_one(packed, tmp_path, head):
    settings = config(packed("train", SEVEN), packed("test", SEVEN), tmp_path / "run", head=head)
    with pytest.raises(UsageError, match=rf"--head {head}: .*have no order; use --head softmax"):
        main(settings)


def test_a_metric_that_the_classes_do_not_have_cannot_choose_the_epoch(packed, tmp_path):
    settings = config(packed("train", SEVEN), packed("test", SEVEN), tmp_path / "run", select_by="qwk")
    with pytest.raises(UsageError, match=r"--select-by qwk: undefined for the classes .* one of accuracy, .*macro_f1, loss"):
        main(settings)


def test_images_without_a_grade_are_not_trained_on_and_evaluation_writes_answers_alone(
    packed, tiny_betons, tmp_path, monkeypatch, capsys
):
    bare = packed("test", RETINOPATHY, name="bare", labels=[-1] * 20)
    with pytest.raises(UsageError, match=r"bare\.beton: 20 of 20 images were packed without a grade"):
        main(config(tiny_betons.train, bare, tmp_path / "refused"))
    settings = config(tiny_betons.train, tiny_betons.test, tmp_path / "run", epochs=1)
    main(settings)
    monkeypatch.setattr("fastretina.models.checkpoint.build_model", lambda arch, outputs, **_: Tiny(outputs))
    checkpoint = settings.out / "best.safetensors"
    with pytest.raises(UsageError, match="nothing to compare with; give --out"):
        evaluate.main(EvaluateConfig(checkpoint, bare, workers=1))
    capsys.readouterr()
    assert evaluate.main(EvaluateConfig(checkpoint, bare, out=tmp_path / "answers", workers=1)) == 0
    assert "20 of 20 images were packed without a grade: there is nothing to compare with" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["predictions.csv"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text("{}")
    with pytest.raises(UsageError, match="holds the metrics of another evaluation"):
        evaluate.main(EvaluateConfig(checkpoint, bare, out=tmp_path / "other", workers=1))
    tables = []
    for path in (tmp_path / "answers" / "predictions.csv", settings.out / "predictions.csv"):
        with path.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert {row["grade"] for row in tables[0]} == {""}
    assert [row["predicted"] for row in tables[0]] == [row["predicted"] for row in tables[1]]


def test_unknown_patients_are_called_unknown_and_not_split_by(packed, tmp_path, capsys):
    """Of two images nobody knows whose they are, so that of the set it is unknown who is in it."""
    people = ["", "", *(str(n) for n in range(38))]
    train, test = packed("train", RETINOPATHY, patients=people), packed("test", RETINOPATHY)
    settings = config(train, test, tmp_path / "run", epochs=1, val_fraction=0.3, split_by="patient")
    with pytest.raises(
        UsageError, match=r"--val-fraction with --split-by patient: .*train\.beton: .* of 2 of 40 images are unknown"
    ):
        main(settings)
    main(replace(settings, split_by="image"))
    data = metrics(settings.out)["data"]
    assert data["patients_in_train_and_test"] is None
    assert data["patients_shared"]["train_test"] is None
    assert data["train"]["patients"] is None
    assert data["test"]["patients"] == 10
    assert data["train"]["images_of_unknown_patients"] + data["val"]["images_of_unknown_patients"] == 2
    assert "patients   unknown in train" in capsys.readouterr().out


def test_a_part_of_the_training_set_is_tested_on_and_shares_no_patient_with_the_rest(tiny_betons, tmp_path):
    settings = config(tiny_betons.train, None, tmp_path / "run", test_fraction=0.25, val_fraction=0.2)
    data = opened(settings)
    assert sorted(id_ for beton in data.values() for id_ in beton.ids) == list(range(40))
    sizes = {name: len(beton) for name, beton in data.items()}
    assert sizes["test"] == pytest.approx(10, abs=4)
    assert sizes["val"] == pytest.approx(8, abs=4)
    people = {name: all_known(beton.patients) for name, beton in data.items()}
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        assert patients_in_both(people[one], people[other]) == 0
    assert set(opened(replace(settings, val_fraction=0.0))["test"].ids) == set(data["test"].ids)
    main(replace(settings, epochs=1))
    found = metrics(settings.out)
    assert found["selected_on"] == "val"
    assert sum(map(sum, found["best"]["confusion"])) == sizes["test"]
    assert found["data"]["patients_shared"] == {"train_val": 0, "train_test": 0, "val_test": 0}
    assert json.loads((settings.out / "config.json").read_text())["test"] is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"test": Path("x.beton")}, "--test and --test-fraction: give one"), ({"test_fraction": 0.6}, "must lie in 0-0.5, got 0.6")],
)
def test_a_test_fraction_that_cannot_be_is_refused(tiny_betons, tmp_path, wrong, reason):
    with pytest.raises(UsageError, match=reason):
        check(replace(config(tiny_betons.train, None, tmp_path / "run", test_fraction=0.2), **wrong))


def test_a_missing_test_set_is_an_error_that_names_the_fraction(tiny_betons, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"data/test\.beton: no such file.*--test-fraction 0\.2.*fastretina pack"):
        check(config(tiny_betons.train, None, tmp_path / "run"))


def test_a_run_of_before_these_settings_goes_on(tiny_betons, tmp_path):
    """Its last.pt knows neither --test-fraction nor `auto`, nor answers on the validation set."""
    settings = config(tiny_betons.train, tiny_betons.test, tmp_path / "run", stop_after_steps=6)
    main(settings)
    state = load_state(settings.out / "last.pt")
    del state["settings"]["test_fraction"]
    state["settings"]["select_by"] = "qwk"
    del state["progress"]["best_val"]
    for record in state["progress"]["history"]:
        for name in ("train", "test"):
            del record[name]["metrics"]["ordinal"]
    save_state(settings.out / "last.pt", state)
    main(replace(settings, stop_after_steps=None))
    assert metrics(settings.out)["selection_metric"] == "qwk"
    assert metrics(settings.out)["last_epoch"] == 2
    assert as_settings(settings)["select_by"] == "auto"


def test_several_packings_are_one_set_with_metrics_of_each_and_doubles_are_told(packed, tmp_path, monkeypatch, capsys):
    """The second test packing holds images of the training set under the names of other people."""
    others = [f"other{n // 2}" for n in range(40)]
    here, there = packed("test", TWO, name="here"), packed("train", TWO, name="there", patients=others)
    settings = config(packed("train", TWO), f"{here},{there}", tmp_path / "run", epochs=1, val=Path(f"{there},{here}"))
    with pytest.raises(UsageError, match="is the test set"):
        main(settings)
    settings = replace(settings, val=None, val_fraction=0.2)
    main(settings)
    found = metrics(settings.out)
    with (settings.out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = found["sources"]["test"]
    assert [(part["name"], part["images"]) for part in parts] == [(str(here), 20), (str(there), 40)]
    for part, mine in zip(parts, (rows[:20], rows[20:]), strict=True):
        grades, predicted = ([int(row[column]) for row in mine] for column in ("grade", "predicted"))
        assert part["accuracy"] == pytest.approx(oracle.accuracy_score(grades, predicted))
        assert part["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(grades, predicted))
    assert "val" not in found["sources"]
    duplicates = found["data"]["duplicates_shared"]
    assert duplicates["train_test"] + duplicates["val_test"] == 40
    assert duplicates["train_val"] == 0
    said = capsys.readouterr().out
    assert f"duplicates {duplicates['train_test']} images of test are in train, too." in said
    text = (settings.out / "report.html").read_text()
    assert "By packing" in text
    assert str(there) in text
    monkeypatch.setattr("fastretina.models.checkpoint.build_model", lambda arch, outputs, **_: Tiny(outputs))
    evaluate.main(EvaluateConfig(settings.out / "best.safetensors", settings.test, out=tmp_path / "again", workers=1))
    assert metrics(tmp_path / "again")["sources"] == parts


def test_the_answers_on_several_packings_that_are_validated_on_are_told_apart(packed, tmp_path):
    both = f"{packed('train', TWO)},{packed('test', TWO)}"
    settings = config(both, None, tmp_path / "run", epochs=1, test_fraction=0.3, val_fraction=0.3)
    main(settings)
    found = metrics(settings.out)["sources"]
    data = opened(settings)
    for name in ("test", "val"):
        numbers = torch.from_numpy(data[name].ids) >> 40
        assert [part["images"] for part in found[name]] == [int((numbers == number).sum()) for number in (0, 1)]
        assert sum(part["images"] for part in found[name]) == len(data[name])
    assert metrics(settings.out)["data"]["patients_shared"]["train_test"] == 0


@pytest.mark.parametrize("wrong", ["{here},absent.beton", "absent.beton,{here}"])
def test_a_packing_that_is_missing_among_several_is_named(tiny_betons, tmp_path, wrong):
    with pytest.raises(UsageError, match=r"^absent\.beton: no such file"):
        check(config(wrong.format(here=tiny_betons.train), tiny_betons.test, tmp_path / "run"))
