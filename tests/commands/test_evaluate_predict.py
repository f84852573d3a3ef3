"""Grading with a trained model: the same answers by every way in, bad images reported, nothing overwritten."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastretina import evaluate, predict, train, write_beton
from fastretina.errors import CheckpointError, RunError, UsageError
from fastretina.evaluate import EvaluateConfig
from fastretina.grading import Classes
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.models import photographs
from fastretina.models.checkpoint import CheckpointInfo, save_checkpoint
from fastretina.models.heads import Softmax
from fastretina.models.inference import view_outputs
from fastretina.models.precision import Precision
from fastretina.models.resnet import build_model
from fastretina.packing.preprocessing import UNPREPARED
from fastretina.predict import PredictConfig
from fastretina.report.plots import denormalise
from fastretina.training.config import TrainConfig

FLOAT32 = Precision("cpu", None, "")

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def run(tiny_betons, tmp_path_factory) -> Path:
    """The folder of a run of two epochs on images of 64 px, the size that they are packed in."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = {"arch": "resnet10", "epochs": 2, "batch_size": 8, "resolution": 64, "seed": 3, "workers": 1, "val_fraction": 0}
    train.main(TrainConfig(train=tiny_betons.train, test=tiny_betons.test, out=out, **settings))
    return out


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def probabilities(row: dict[str, str]) -> list[float]:
    return [float(row[f"p{grade}"]) for grade in range(5)]


def test_evaluate_finds_the_metrics_of_the_run(run, tiny_betons, tmp_path, capsys):
    out = tmp_path / "evaluated"
    assert evaluate.main(EvaluateConfig(run / "best.safetensors", tiny_betons.test, out=out, batch_size=8)) == 0
    found, best = (json.loads((folder / "metrics.json").read_text()) for folder in (out, run))
    for name in ("accuracy", "balanced_accuracy", "qwk", "macro_f1", "per_class_recall", "confusion"):
        assert found[name] == best["best"][name]
    for assessed in ("intervals", "auroc_referable", "referable", "calibration"):
        assert found[assessed] == best["best"][assessed]
    assert found["intervals"]["patients"] == 10
    assert found["intervals"]["qwk"]["low"] <= found["qwk"] <= found["intervals"]["qwk"]["high"]
    assert (out / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{found['accuracy']:.4f}" in printed
    assert "4 proliferative" in printed


@pytest.mark.parametrize(("name", "said"), [("train", "the very set that this model was trained on"), ("test", "optimistic")])
def test_evaluate_says_that_the_training_has_seen_these_very_data(run, tiny_betons, tmp_path, capsys, name, said):
    copy = shutil.copy(getattr(tiny_betons, name), tmp_path / "copy.beton")
    evaluate.main(EvaluateConfig(run / "best.safetensors", copy, out=tmp_path / "out", batch_size=8))
    assert said in capsys.readouterr().err
    known = json.loads((run / "metrics.json").read_text())["data"][name]["digest"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data_digest"] == known


def test_evaluate_says_that_the_training_has_seen_most_of_these_data(tiny_betons, tmp_path, capsys):
    """The file that --val-fraction, the default, parts."""
    train.main(
        TrainConfig(
            train=tiny_betons.train, test=tiny_betons.test, val_fraction=0.3, epochs=1, batch_size=8, resolution=32, device="cpu",
            split_by="image", out=tmp_path / "run",
        )
    )  # fmt: skip
    evaluate.main(EvaluateConfig(tmp_path / "run" / "best.safetensors", tiny_betons.train, batch_size=8))
    assert "holds all that this model was trained on" in capsys.readouterr().err


def test_evaluate_says_nothing_of_data_that_the_training_has_not_seen(run, tiny_betons, tmp_path, capsys):
    images = tiny_betons.test_images
    lines = (images / "labels.csv").read_text().splitlines()[:-1]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    write_beton(tmp_path / "new.beton", images=images, labels=tmp_path / "labels.csv", size=64, workers=1)
    evaluate.main(EvaluateConfig(run / "best.safetensors", tmp_path / "new.beton", batch_size=8))
    assert "this model" not in capsys.readouterr().err


def test_answers_do_not_depend_on_the_batch(run, tiny_betons, tmp_path):
    evaluate.main(EvaluateConfig(run / "best.safetensors", tiny_betons.test, out=tmp_path, batch_size=3))
    for one, other in zip(read_csv(tmp_path / "predictions.csv"), read_csv(run / "predictions.csv"), strict=True):
        assert probabilities(one) == pytest.approx(probabilities(other), abs=1e-4)


def test_evaluate_does_not_write_into_a_run_folder(run, tiny_betons):
    before = (run / "metrics.json").read_bytes()
    with pytest.raises(UsageError, match="folder of a training run"):
        evaluate.main(EvaluateConfig(run / "best.safetensors", tiny_betons.test, out=run))
    assert (run / "metrics.json").read_bytes() == before


class Lopsided(torch.nn.Module):
    """Answers by the brightness of one corner, so that each of the eight symmetries gives another answer."""

    def forward(self, images):
        corner = images[:, 0, 0, :3]
        return torch.stack([corner[:, 0], corner[:, 1], corner[:, 2], corner.sum(1), -corner[:, 0]], dim=1)


def test_views_are_the_eight_symmetries_averaged_as_probabilities():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 4, 4)
    views = [torch.rot90(turned, quarter, (2, 3)) for turned in (images, images.flip(3)) for quarter in range(4)]
    expected = torch.stack([Lopsided()(view).softmax(1) for view in views]).mean(0)
    found = Softmax(5).answer(view_outputs(Lopsided(), images, FLOAT32, views=8)).exp()
    assert torch.allclose(found, expected, atol=1e-6)
    one = Softmax(5).answer(view_outputs(Lopsided(), images, FLOAT32)).exp()
    assert torch.allclose(one, Lopsided()(images).softmax(1), atol=1e-6)
    assert not torch.allclose(found, one, atol=1e-2)


def test_an_average_over_all_views_does_not_depend_on_how_the_image_was_held():
    torch.manual_seed(1)
    images = torch.randn(2, 3, 4, 4)
    answers = [
        Softmax(5).answer(view_outputs(Lopsided(), view, FLOAT32, views=8))
        for view in (images, torch.rot90(images, 1, (2, 3)), images.flip(2))
    ]
    assert torch.allclose(answers[0], answers[1], atol=1e-5)
    assert torch.allclose(answers[0], answers[2], atol=1e-5)


def test_eyes_are_fused_before_anything_is_said_of_the_answers(run, tiny_betons, tmp_path):
    for weight in (0.0, 0.5):
        out = tmp_path / str(weight)
        assert evaluate.main(EvaluateConfig(run / "best.safetensors", tiny_betons.test, out=out, fuse_eyes=weight)) == 0
    tables = ((tmp_path / str(weight) / "predictions.csv").read_text().splitlines() for weight in (0.0, 0.5))
    own, fused = (list(csv.DictReader(table)) for table in tables)
    for left, right in zip(own[::2], own[1::2], strict=True):  # both eyes of a patient
        mean = [(float(left[f"p{k}"]) + float(right[f"p{k}"])) / 2 for k in range(5)]
        for row in fused:
            if row["name"] in (left["name"], right["name"]):
                assert [float(row[f"p{k}"]) for k in range(5)] == pytest.approx(mean, abs=1e-5)
                assert int(row["predicted"]) == mean.index(max(mean))
    with pytest.raises(UsageError, match=r"0-0\.5"):
        evaluate.main(EvaluateConfig(run / "best.safetensors", tiny_betons.test, fuse_eyes=0.6))


@pytest.mark.parametrize("views", [0, 9])
def test_more_views_than_a_square_has_are_a_usage_error(run, tiny_betons, views):
    with pytest.raises(UsageError, match="8 symmetries"):
        evaluate.main(EvaluateConfig(run / "best.safetensors", tiny_betons.test, tta=views))
    with pytest.raises(UsageError, match="8 symmetries"):
        predict.main(PredictConfig(run / "best.safetensors", (tiny_betons.test_images,), tta=views))


def test_spoilt_weights_are_an_error_not_a_grade(tiny_betons, tmp_path):
    model = build_model("resnet18")
    with torch.no_grad():
        model.fc.bias[2] = float("nan")
    about = CheckpointInfo("resnet18", 5, 32, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "test")
    save_checkpoint(tmp_path / "nan.safetensors", model, about)
    with pytest.raises(RunError, match="not finite"):
        evaluate.main(EvaluateConfig(tmp_path / "nan.safetensors", tiny_betons.test))
    with pytest.raises(RunError, match="not finite"):
        predict.main(PredictConfig(tmp_path / "nan.safetensors", (tiny_betons.test_images,), csv=tmp_path / "grades.csv"))
    assert not (tmp_path / "grades.csv").exists()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        evaluate.main(EvaluateConfig(tmp_path / "absent.safetensors", tiny_betons.test))


def test_photographs_get_the_answers_that_the_packed_ones_got(run, tiny_betons, tmp_path):
    out = tmp_path / "grades.csv"
    assert predict.main(PredictConfig(run / "best.safetensors", (tiny_betons.test_images,), csv=out, batch_size=7)) == 0
    packed = {row["name"]: row for row in read_csv(run / "predictions.csv")}
    rows = read_csv(out)
    assert list(rows[0]) == ["path", "grade", "referable", "p0", "p1", "p2", "p3", "p4", "done", "error"]
    assert {(row["done"], row["error"]) for row in rows} == {("as it was", "")}
    assert {Path(row["path"]).stem for row in rows} == packed.keys()
    for row in rows:
        expected = packed[Path(row["path"]).stem]
        assert probabilities(row) == pytest.approx(probabilities(expected), abs=0.01)
        assert row["grade"] == expected["predicted"] or sorted(probabilities(row))[-1] - sorted(probabilities(row))[-2] < 0.02
        assert row["referable"] == ("yes" if int(row["grade"]) >= 2 else "no")


def test_a_bad_image_is_reported_and_the_others_are_graded(run, tiny_betons, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    good = sorted(tiny_betons.test_images.glob("*.jpeg"))[:3]
    for place, source in zip(("a.jpeg", "deeper/b.JPG", "=c.jpeg"), good, strict=True):
        shutil.copy(source, folder / place)
    (folder / "bad.jpg").write_bytes(good[0].read_bytes()[:300])
    (folder / "text.png").write_text("not an image")
    (folder / "notes.txt").write_text("left alone")
    (folder / ".hidden.jpeg").write_bytes(b"left alone")
    out = tmp_path / "grades.csv"
    images = (folder, tmp_path / "absent.jpeg", tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    for batch_size in (32, 2):
        assert predict.main(PredictConfig(run / "best.safetensors", images, csv=out, batch_size=batch_size)) == 1
        rows = {row["path"]: row for row in read_csv(out)}
        names = ("=c.jpeg", "a.jpeg", "bad.jpg", "deeper/b.JPG", "text.png")
        assert list(rows) == [*(str(folder / name) for name in names), str(images[1]), str(images[2])]
        for path, row in rows.items():
            good = Path(path).name in ("=c.jpeg", "a.jpeg", "b.JPG")
            assert all(bool(row[column]) == good for column in ("grade", "referable", "p0", "p4", "done"))
            assert bool(row["error"]) != good
        errors = capsys.readouterr().err
        for path, row in rows.items():
            assert not row["error"] or f"error: {path}: {row['error']}\n" in errors
        assert "3 images graded, 4 could not be" in errors
        assert "left out: 1 .txt, 1 hidden\n" in errors


def test_relative_paths_cannot_start_a_formula(run, tiny_betons, tmp_path, monkeypatch):
    shutil.copy(next(tiny_betons.test_images.glob("*.jpeg")), tmp_path / "=c.jpeg")
    monkeypatch.chdir(tmp_path)
    predict.main(PredictConfig(run / "best.safetensors", (Path("=c.jpeg"),), csv=Path("out.csv")))
    assert read_csv(Path("out.csv"))[0]["path"] == "'=c.jpeg"


def test_photographs_of_other_sizes_and_kinds_are_letterboxed_upright(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, :40] = [250, 0, 0]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels, done = prepared(tmp_path / "wide.png")
    assert done == ("letterboxed",)
    assert pixels.shape == (64, 64, 3)
    assert pixels[:15].max() <= 6  # a JPEG, as when packed
    assert pixels[-15:].max() <= 6
    assert np.abs(pixels[20:44, :28].astype(int) - [250, 0, 0]).max() <= 6
    turned = Image.fromarray(wide)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.abs(prepared(tmp_path / "turned.png")[0][:28, 20:44].astype(int) - [250, 0, 0]).max() <= 6


def prepared(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """(64, 64, 3) uint8 pixels of what a network is shown of a photograph, and what was done to it."""
    images, done = photographs.prepare(path, 64, UNPREPARED, (64,))
    return denormalise(torch.from_numpy(images[64]).permute(2, 0, 1)[None])[0], done


def test_without_csv_the_table_goes_to_standard_output(run, tiny_betons, capfd):
    assert predict.main(PredictConfig(run / "best.safetensors", (next(tiny_betons.test_images.glob("*.jpeg")),))) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "path,grade,referable,p0,p1,p2,p3,p4,done,error"
    assert len(lines) == 2


@pytest.mark.parametrize(("referable", "answers"), [((), {""}), ((0,), {"yes", "no"})], ids=["none", "the first"])
def test_what_is_referable_is_what_the_checkpoint_says(tiny_betons, tmp_path, referable, answers):
    classes = Classes(("normal", "AMD"), referable)
    about = CheckpointInfo("resnet18", 2, 64, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "auto", "test", classes=classes)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "best.safetensors", build_model("resnet18", 2), about)
    predict.main(PredictConfig(tmp_path / "best.safetensors", (tiny_betons.test_images,), csv=tmp_path / "out.csv"))
    rows = [row for row in read_csv(tmp_path / "out.csv") if row["grade"]]
    assert len(rows) == 20
    assert all(row["referable"] == ("yes" if row["grade"] == "0" else "no") for row in rows) or not referable
    assert {row["referable"] for row in rows} <= answers


def test_no_image_at_all_is_a_usage_error(run):
    with pytest.raises(UsageError, match="at least one"):
        predict.main(PredictConfig(run / "best.safetensors"))


def test_only_a_bounded_number_of_images_is_in_memory(monkeypatch, tmp_path):
    lock, alive, most = threading.Lock(), [0], [0]

    def counted(path, size, preparation, resolutions):
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return {8: np.zeros((8, 8, 3), np.float32)}, ()

    monkeypatch.setattr(photographs, "prepare", counted)
    files = (photographs.Photograph(Path(str(number)), str(number)) for number in range(1000))
    seen = 0
    for _ in photographs.prepared(files, 8, UNPREPARED, (8,), workers=2, ahead=12):
        seen += 1
        with lock:
            alive[0] -= 1
    assert seen == 1000
    assert most[0] <= 13
