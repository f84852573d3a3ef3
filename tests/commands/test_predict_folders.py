"""predict on what clinics have: each photograph has a row, whatever it is called; the rest is counted; no traceback at any end."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_cases import dicom_of
from test_pack import jpeg, picture, save

from fastretina import predict
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.loading.single import network_image
from fastretina.models import photographs
from fastretina.models.checkpoint import CheckpointInfo, save_checkpoint
from fastretina.models.resnet import build_model
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.packing.reencode import reencode
from fastretina.predict import PredictConfig

PHOTO = picture(96, 64)


def checkpoint(path: Path, preparation: Preparation) -> Path:
    torch.manual_seed(0)
    about = CheckpointInfo("resnet18", 5, 32, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "test", preparation=preparation)
    save_checkpoint(path, build_model("resnet18"), about)
    return path


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("grader") / "best.safetensors", Preparation())


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder as a camera's program writes it, and one elsewhere that a link leads to."""
    photo, folder = jpeg(PHOTO), tmp_path / "export"
    half = len(photo) - 300
    files = {
        "1_OD.JPG": photo, "2_OS": photo, "3_OS.JPG_large": photo, "4.gif": save(PHOTO.quantize(64), "GIF"),
        "5.dcm": dicom_of(PHOTO, photo), "1.2.840.7": dicom_of(PHOTO),
        "a_broken.dcm": bytes(128) + b"DICM" + bytes(900), "b.heic": b"\0\0\0\x18ftypheic" + bytes(500),
        "c_half.jpg": photo[:half] + bytes(len(photo) - half - 2) + photo[-2:],
        "Thumbs.db": b"x", ".DS_Store": b"x", "._1_OD.JPG": b"\0\5\x16\7", "DICOMDIR": dicom_of(PHOTO), "list.csv": b"a,b\n",
    }  # fmt: skip
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (tmp_path / "nas").mkdir()
    (tmp_path / "nas" / "6_OD.jpg").write_bytes(photo)
    (tmp_path / "nas" / "back").symlink_to("../export")
    (folder / "2024-05").symlink_to("../nas")
    return folder


GOOD = {"1_OD.JPG", "2_OS", "3_OS.JPG_large", "4.gif", "5.dcm", "1.2.840.7"}
BAD = {
    "a_broken.dcm": "DICOM",
    "b.heic": "HEIC files are not read; export",
    "c_half.jpg": "cannot be decoded: Corrupt JPEG data",
}


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.mark.usefixtures("one_thread")
def test_every_photograph_has_a_row_and_the_rest_is_counted(grader: Path, export: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "grades.csv"
    assert predict.main(PredictConfig(grader, (export,), csv=out, workers=1)) == 1
    rows = table(out)
    assert set(rows) == {str(export / name) for name in GOOD | BAD.keys()}
    for name in GOOD:
        row = rows[str(export / name)]
        assert (row["done"], row["error"]) == ("letterboxed", "")
        assert row["grade"] in "01234"
    for name, reason in BAD.items():
        row = rows[str(export / name)]
        assert reason in row["error"]
        assert not any(row[column] for column in ("grade", "referable", "p0", "p1", "p2", "p3", "p4", "done"))
    assert rows[str(export / "5.dcm")]["p0"] == rows[str(export / "1_OD.JPG")]["p0"]
    told = capsys.readouterr().err
    assert "left out: 1 .csv, 1 .db, 1 DICOMDIR, 2 hidden, 1 linked folder (--follow-links)\n" in told
    assert "6 images graded, 3 could not be" in told
    assert not out.read_bytes().startswith(b"\xef\xbb\xbf")


@pytest.mark.usefixtures("one_thread")
def test_links_are_followed_when_asked_and_what_is_no_image_is_no_failure(
    grader: Path, export: Path, tmp_path: Path, capsys
) -> None:
    for name in BAD:
        (export / name).unlink()
    assert predict.main(PredictConfig(grader, (export,), csv=tmp_path / "a.csv", workers=1, follow_links=True)) == 0
    assert set(table(tmp_path / "a.csv")) == {str(export / name) for name in GOOD | {"2024-05/6_OD.jpg"}}
    assert "1 link to a folder that was searched already" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_the_row_says_what_was_done(tmp_path: Path) -> None:
    local = checkpoint(tmp_path / "local.safetensors", Preparation("fundus", "local"))
    plain = checkpoint(tmp_path / "plain.safetensors", Preparation())
    square = picture(32, 32)
    files = {
        "same.jpg": jpeg(square), "larger.jpg": jpeg(picture(64, 64)), "wide.jpg": jpeg(PHOTO),
        "pages.tif": save(square, "TIFF", save_all=True, append_images=[square]),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    for path, expected in (
        (plain, {"same": "as it was", "larger": "scaled", "wide": "letterboxed", "pages": "as it was; first of several pages"}),
        (local, dict.fromkeys(("same", "larger", "wide"), "whole frame; local contrast")),
    ):
        assert predict.main(PredictConfig(path, (tmp_path / "in",), csv=tmp_path / "a.csv", workers=1)) == 0
        done = {Path(name).stem: row["done"] for name, row in table(tmp_path / "a.csv").items()}
        assert {name: done[name] for name in expected} == expected


@pytest.mark.usefixtures("one_thread")
def test_a_table_with_other_than_ascii_names_says_that_it_is_utf_8(grader: Path, tmp_path: Path, capfdbinary) -> None:
    (tmp_path / "Zoë.jpg").write_bytes(jpeg(PHOTO))
    predict.main(PredictConfig(grader, (tmp_path / "Zoë.jpg",), csv=tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbfpath,grade,")
    assert list(table(tmp_path / "a.csv")) == [str(tmp_path / "Zoë.jpg")]
    predict.main(PredictConfig(grader, (tmp_path / "Zoë.jpg",)))
    assert capfdbinary.readouterr().out.startswith(b"path,grade,")


def test_who_reads_only_the_head_of_the_table_sees_no_traceback(grader: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(PHOTO))
    command = [sys.executable, "-m", "fastretina.predict", "--checkpoint", str(grader), "--batch-size", "1", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(predict.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"path,grade")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


@pytest.mark.usefixtures("one_thread")
def test_packing_and_grading_see_the_same_pixels_of_every_kind(tmp_path: Path) -> None:
    for kind, data in (("a.gif", save(PHOTO.quantize(64), "GIF")), ("b.dcm", dicom_of(PHOTO)), ("c", save(PHOTO, "JPEG2000"))):
        (tmp_path / kind).write_bytes(data)
        images, _ = photographs.prepare(tmp_path / kind, 64, UNPREPARED, (64,))
        assert np.array_equal(images[64], network_image(reencode(data, 64).jpeg, 64, 64))
