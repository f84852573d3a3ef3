"""One grader for everybody: predict, evaluate and other programs get the same answers, to the bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fastretina import Grader, evaluate, open_beton, predict, train
from fastretina.errors import CheckpointError, UsageError
from fastretina.evaluate import EvaluateConfig
from fastretina.metrics.operating import Operating, Threshold
from fastretina.models.checkpoint import load_checkpoint, read_info, save_checkpoint
from fastretina.predict import PredictConfig
from fastretina.training.config import TrainConfig


@pytest.fixture(scope="module")
def runs(undrawn, tiny_betons, tmp_path_factory, one_thread_here) -> list[Path]:
    """Checkpoints of three trainings with validation data: softmax at 64 px, regression at 48 px, CORN at 64 px."""
    out = tmp_path_factory.mktemp("runs")
    for number, (head, resolution) in enumerate((("softmax", 64), ("regression", 48), ("ordinal", 64))):
        settings = {
            "arch": "resnet10",
            "head": head,
            "resolution": resolution,
            "seed": number,
            "epochs": 1,
            "batch_size": 8,
            "workers": 1,
        }
        train.main(TrainConfig(train=tiny_betons.train, test=tiny_betons.test, val_fraction=0.3, out=out / str(number), **settings))
    return [out / str(number) / "best.safetensors" for number in range(3)]


@pytest.fixture(scope="module")
def one_thread_here():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def probabilities(rows: list[dict[str, str]] | pd.DataFrame) -> np.ndarray:
    """(N, 5) float64 of a table of rows, by the images' names."""
    table = pd.DataFrame(rows)
    name = table["name"] if "name" in table else table["path"]
    table.index = name.map(lambda text: Path(text).stem)
    return table.sort_index()[[f"p{grade}" for grade in range(5)]].astype(float).to_numpy()


def as_written(values: np.ndarray) -> np.ndarray:
    """As a CSV holds them, with six digits."""
    return np.vectorize(lambda value: float(f"{value:.6g}"))(values)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("which", "views"), [((0,), 1), ((1,), 3), ((2,), 1), ((0, 1, 2), 2)], ids=["softmax", "regression", "corn", "ensemble"]
)
def test_predict_evaluate_and_grader_agree_to_the_bit(runs, tiny_betons, tmp_path, which, views):
    given, photos = ",".join(str(runs[number]) for number in which), sorted(tiny_betons.test_images.glob("*.jpeg"))
    predict.main(PredictConfig(Path(given), tuple(photos), csv=tmp_path / "p.csv", batch_size=7, tta=views, workers=1))
    evaluate.main(EvaluateConfig(Path(given), tiny_betons.test, out=tmp_path / "e", batch_size=7, tta=views, workers=1))
    table = Grader.load([runs[number] for number in which], tta=views).grade(photos, batch_size=7, workers=1)
    predicted, evaluated = rows_of(tmp_path / "p.csv"), rows_of(tmp_path / "e" / "predictions.csv")
    for rows in (predicted, evaluated):
        assert np.array_equal(probabilities(rows), as_written(probabilities(table)))
    assert [int(row["grade"]) for row in predicted] == table["grade"].tolist()
    assert {row["name"]: int(row["predicted"]) for row in evaluated} == {
        Path(name).stem: grade for name, grade in zip(table["name"], table["grade"], strict=True)
    }
    warned = json.loads((tmp_path / "e" / "metrics.json").read_text())["warnings"]
    assert warned == ["The temperature and the thresholds were frozen on answers without --tta"] * (views > 1)
    if len(which) > 1:
        unsure = as_written(table["uncertainty"].to_numpy()).tolist()
        assert [float(row["uncertainty"]) for row in predicted] == unsure
        assert {float(row["uncertainty"]) for row in evaluated} == set(unsure)
    else:
        assert "uncertainty" not in table


def test_an_ensemble_answers_with_the_mean_of_its_members_probabilities(runs, tiny_betons):
    photos = sorted(tiny_betons.test_images.glob("*.jpeg"))
    alone = [probabilities(Grader.load(path).grade(photos, workers=1)) for path in runs]
    together = Grader.load(runs).grade(photos, workers=1)
    assert probabilities(together) == pytest.approx(np.mean(alone, axis=0), abs=1e-6)
    entropies = [-(p * np.log(p)).sum(axis=1) for p in (np.mean(alone, axis=0), *alone)]
    expected = entropies[0] - np.mean(entropies[1:], axis=0)
    assert together.set_index(together["name"].map(lambda x: Path(x).stem)).sort_index()["uncertainty"].to_numpy() == pytest.approx(
        expected, abs=1e-6
    )


def test_files_bytes_arrays_and_pictures_are_graded_alike(runs, tiny_betons):
    path = next(tiny_betons.test_images.glob("*.jpeg"))
    picture = Image.open(path)
    table = Grader.load(runs[0]).grade([path, path.read_bytes(), np.asarray(picture), picture, str(path)], workers=1)
    assert table["name"].tolist() == [str(path), "image 2", "image 3", "image 4", str(path)]
    assert table["error"].isna().all()
    found = table[[f"p{grade}" for grade in range(5)]].to_numpy()
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[4])
    assert np.array_equal(found[2], found[3])  # both are encoded once more
    assert found[2] == pytest.approx(found[0], abs=0.1)


def test_a_picture_is_graded_upright_and_in_rgb(runs, tiny_betons, tmp_path):
    pixels = np.asarray(Image.open(next(tiny_betons.test_images.glob("*.jpeg"))))
    turned = Image.fromarray(np.rot90(pixels))  # to be shown turned by 90 degrees clockwise
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        table = Grader.load(runs[0]).grade([pixels, opened, tmp_path / "turned.png", Image.fromarray(pixels).convert("RGBA")])
    found = table[[f"p{grade}" for grade in range(5)]].to_numpy()
    for other in found[1:]:
        assert np.array_equal(found[0], other)


def test_what_cannot_be_graded_has_its_reason_in_the_table_and_the_rest_is_graded(runs, tiny_betons, tmp_path):
    good = next(tiny_betons.test_images.glob("*.jpeg"))
    (tmp_path / "torn.jpeg").write_bytes(good.read_bytes()[:400])
    table = Grader.load(runs[0]).grade(
        [tmp_path / "torn.jpeg", good, b"no picture", tmp_path / "none.png", np.zeros((64, 64, 3), "u1")]
    )
    assert table["grade"].isna().tolist() == [True, False, True, True, True]
    assert table["error"].notna().tolist() == [True, False, True, True, True]
    assert "dark all over" in table["error"].iloc[4]
    assert table.loc[~table["error"].isna(), ["referable", "p0", "done"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("given", "said"),
    [(np.zeros((8, 8, 3)), "float64"), (3, "a int"), (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"), (None, "NoneType")],
)
def test_what_is_no_photograph_is_a_usage_error(runs, given, said):
    with pytest.raises(UsageError, match=rf"image 1: is .*{said}"):
        Grader.load(runs[0]).grade([given])


def test_nothing_to_grade_is_an_empty_table(runs):
    assert list(Grader.load(runs[0]).grade([]).columns) == [
        "name",
        "grade",
        "referable",
        *(f"p{g}" for g in range(5)),
        "done",
        "error",
    ]


def with_thresholds(path: Path, target: Path, values: dict[str, float] | None) -> Path:
    """A copy of a checkpoint with other frozen thresholds."""
    model, info = load_checkpoint(path)
    frozen = None if values is None else Operating(tuple(Threshold(n, v, None, 1.0, 1.0) for n, v in values.items()), 9, 4, "d")
    save_checkpoint(target, model, type(info)(**{**vars(info), "operating": frozen}))
    return target


def test_a_threshold_is_taken_by_its_name_or_as_a_number(runs, tiny_betons, tmp_path):
    photos = sorted(tiny_betons.test_images.glob("*.jpeg"))
    plain = Grader.load(runs[0]).grade(photos, workers=1)
    scores = plain[["p2", "p3", "p4"]].sum(axis=1)
    middle = float(np.sort(scores)[9:11].mean())
    path = with_thresholds(runs[0], tmp_path / "one.safetensors", {"high-sensitivity": middle, "youden": 0.0})
    grader = Grader.load(path)
    for asked, value in (("high-sensitivity", middle), (middle, middle), (str(middle), middle), ("youden", 0.0)):
        table = grader.grade(photos, threshold=asked, workers=1)
        assert table["referable"].tolist() == (scores >= value).tolist(), asked
        assert table["grade"].tolist() == plain["grade"].tolist()
    predict.main(PredictConfig(path, tuple(photos), csv=tmp_path / "p.csv", threshold="high-sensitivity", workers=1))
    rows = rows_of(tmp_path / "p.csv")
    assert [row["referable"] for row in rows] == ["yes" if score >= middle else "no" for score in scores]
    assert plain["referable"].tolist() == (plain["grade"] >= 2).tolist()


@pytest.mark.parametrize("asked", ["high-specificity", "1.5", "-0.1", "nan", "much"])
def test_an_unknown_threshold_is_a_usage_error(runs, tmp_path, asked):
    path = with_thresholds(runs[0], tmp_path / "one.safetensors", {"high-sensitivity": 0.3})
    with pytest.raises(UsageError, match=f"--threshold {asked}: (one of high-sensitivity, or a number|a probability)"):
        Grader.load(path).threshold(asked)


def test_without_frozen_thresholds_their_names_are_refused_and_the_checkpoint_is_named(runs, tmp_path):
    path = with_thresholds(runs[0], tmp_path / "one.safetensors", None)
    for grader in (Grader.load(path), Grader.load([runs[1], path])):
        assert grader.operating is None
        with pytest.raises(UsageError, match=r"one\.safetensors: has no frozen thresholds: .*validation data"):
            grader.threshold("high-sensitivity")
        assert grader.threshold("0.25") == 0.25


def test_the_thresholds_of_an_ensemble_are_the_means_of_its_members(runs):
    values = [read_info(path).operating.named("high-sensitivity").value for path in runs]
    assert Grader.load(runs).threshold("high-sensitivity") == pytest.approx(np.mean(values))


def test_models_that_do_not_go_together_are_refused_by_name(runs, tmp_path):
    model, info = load_checkpoint(runs[0])
    for name, other in (("classes", {"classes": type(info.classes)(("a", "b", "c", "d", "e"))}), ("size", {"size": 65})):
        save_checkpoint(tmp_path / "other.safetensors", model, type(info)(**{**vars(info), **other}))
        with pytest.raises(UsageError, match=rf"0/best\.safetensors and .*other\.safetensors make no ensemble: .*{name}"):
            Grader.load([runs[0], tmp_path / "other.safetensors"])


def test_a_folder_stands_for_the_checkpoint_in_it(runs, tmp_path):
    assert Grader.load(runs[0].parent).members[0].path == runs[0]
    with pytest.raises(CheckpointError, match=f"{tmp_path}: a folder without a checkpoint"):
        Grader.load(tmp_path)
    with pytest.raises(UsageError, match="at least one"):
        Grader.load([])


def test_a_checkpoint_keeps_what_its_validation_data_gave_and_whose_they_were(runs):
    for path in runs:
        info, metrics = read_info(path), json.loads((path.parent / "metrics.json").read_text())
        assert info.size == 64
        assert info.operating is not None
        assert info.operating.data == metrics["data"]["val"]["digest"] == info.data["val"]
        assert (info.operating.images, info.operating.referable) == (
            metrics["data"]["val"]["images"],
            sum(metrics["data"]["val"]["grades"][2:]),
        )
        assert info.decision is not None
        assert info.operating.as_dict() == metrics["best"]["operating"]


def test_poisoned_test_labels_change_no_threshold_no_temperature_and_no_weight(runs, tiny_betons, tmp_path):
    from fastretina import write_beton

    folder = tiny_betons.test_images
    lines = (folder / "labels.csv").read_text().splitlines()
    poisoned = [lines[0], *(f"{line.split(',')[0]},{4 - int(line.split(',')[1])}" for line in lines[1:])]
    (tmp_path / "labels.csv").write_text("\n".join(poisoned) + "\n")
    write_beton(tmp_path / "test.beton", images=folder, labels=tmp_path / "labels.csv", size=64, workers=1)
    with open_beton(tmp_path / "test.beton") as other, open_beton(tiny_betons.test) as beton:
        assert other.labels.tolist() != beton.labels.tolist()
    out = tmp_path / "run"
    settings = {"arch": "resnet10", "head": "softmax", "resolution": 64, "seed": 0, "epochs": 1, "batch_size": 8, "workers": 1}
    train.main(TrainConfig(train=tiny_betons.train, test=tmp_path / "test.beton", val_fraction=0.3, out=out, **settings))
    (one, about), (other, same) = load_checkpoint(out / "best.safetensors"), load_checkpoint(runs[0])
    assert about == same
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    metrics = [json.loads((path / "metrics.json").read_text())["best"] for path in (out, runs[0].parent)]
    assert metrics[0]["confusion"] != metrics[1]["confusion"]
    assert metrics[0]["operating"] == metrics[1]["operating"]


def test_evaluate_fits_nothing_on_the_data_that_it_evaluates(runs, tiny_betons, tmp_path):
    for data, out in ((tiny_betons.test, tmp_path / "test"), (tiny_betons.train, tmp_path / "train")):
        evaluate.main(EvaluateConfig(runs[0], data, out=out, workers=1))
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("test", "train")]
    frozen = read_info(runs[0]).operating
    for metrics in found:
        assert metrics["operating"] == frozen.as_dict()
        named = {point["name"]: point["threshold"] for point in metrics["referable"]}
        assert {one.name: one.value for one in frozen.thresholds}.items() <= named.items()
        assert metrics["calibration"] != metrics["calibration_before"]
