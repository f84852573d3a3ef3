"""Photographs prepared while packing, and the same preparation wherever a model trained on them looks at others."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import simplejpeg
import torch
from PIL import Image

from fastretina import Loader, evaluate, predict, train, write_beton
from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import BetonError, CheckpointError, ConvertError, JpegError, UsageError
from fastretina.evaluate import EvaluateConfig
from fastretina.models import photographs
from fastretina.models.checkpoint import CheckpointInfo, read_info, save_checkpoint
from fastretina.models.resnet import build_model
from fastretina.packing.fundus import find_disc
from fastretina.packing.preprocessing import UNPREPARED, Preparation, common_preparation, preparation_of
from fastretina.packing.reencode import reencode, square
from fastretina.predict import PredictConfig
from fastretina.sample.camera import CameraSettings, Eye, render
from fastretina.sample.lesions import LesionSettings
from fastretina.train import TrainConfig

SIZE = 128
FUNDUS = Preparation("fundus")
LOCAL = Preparation("fundus", "local")


def photograph(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    """An eye of the sample's camera, 320 px, anywhere in a black frame."""
    eye = render(Eye(1, seed, "left", seed % 5), LesionSettings(), CameraSettings(overflow=0))
    rng = np.random.default_rng(seed)
    frame = Image.new("RGB", (width, height))
    frame.paste(Image.fromarray(eye).resize((320, 320)), (int(rng.integers(width - 320)), int(rng.integers(height - 320))))
    return frame


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95} | options))
    return out.getvalue()


BLACK = encoded(Image.new("RGB", (640, 480)))
CLOSE = encoded(photograph(1).resize((2560, 1920)).crop((1400, 800, 1700, 1000)))  # nothing but retina


def folder(path: Path, files: dict[str, bytes]) -> Path:
    """Images and labels.csv in Kaggle's layout."""
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    rows = [f"{name.rpartition('.')[0]},{number % 5}\n" for number, name in enumerate(files)]
    (path / "labels.csv").write_text("image,level\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs, one of them of the size to pack and one a PNG, EXIF-rotated another."""
    images = [photograph(seed) for seed in range(6)]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {f"{number}_left.jpeg": encoded(image) for number, image in enumerate(images[:4])}
    files["0_right.jpeg"] = encoded(images[0].crop((0, 0, 480, 480)).resize((SIZE, SIZE)))
    files["4_left.png"] = encoded(images[4], "PNG")
    files["5_left.jpeg"] = encoded(images[5], exif=exif)
    return folder(tmp_path_factory.mktemp("photos") / "in", files)


def pack(out: Path, images: Path, **options: object):
    return write_beton(out, images=images, labels=images / "labels.csv", size=SIZE, **options)  # type: ignore[arg-type]


def test_with_a_crop_every_image_shows_the_disc_and_none_passes_through(photos: Path, tmp_path: Path) -> None:
    summary = pack(tmp_path / "o.beton", photos, crop="fundus")
    assert (summary.passed, summary.reencoded) == (0, {"crop fundus": 7})
    assert "(crop fundus 7)" in str(summary)
    with Beton(tmp_path / "o.beton") as beton:
        assert preparation_of(beton) == FUNDUS
        for number in range(len(beton)):
            disc = find_disc(simplejpeg.decode_jpeg(beton.jpeg(number)))
            assert disc.radius == pytest.approx(SIZE / 2, rel=0.03)
            assert (disc.x, disc.y) == pytest.approx(((SIZE - 1) / 2,) * 2, abs=1.5)


def test_prepared_packing_does_not_depend_on_the_number_of_workers(photos: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        pack(tmp_path / f"{workers}.beton", photos, crop="fundus", contrast="local", workers=workers)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()


def test_without_preparation_the_provenance_does_not_mention_it(photos: Path, tmp_path: Path) -> None:
    summary = pack(tmp_path / "o.beton", photos)
    assert summary.passed == 1
    with Beton(tmp_path / "o.beton") as beton:
        assert "preparation" not in beton.provenance
        assert preparation_of(beton) == UNPREPARED


@pytest.mark.parametrize("preparation", [UNPREPARED, FUNDUS, LOCAL, Preparation("none", "local")], ids=str)
def test_predict_sees_what_was_packed(preparation: Preparation, photos: Path, tmp_path: Path) -> None:
    pack(tmp_path / "o.beton", photos, crop=preparation.crop, contrast=preparation.contrast)
    for resolution in (SIZE, SIZE // 2 - 3, SIZE + 5):
        with Loader(tmp_path / "o.beton", batch_size=1, train=False, resolution=resolution, workers=1) as loader:
            for name, batch in zip(loader.dataset.names, loader, strict=True):
                path = next(photos.glob(f"{name}.*"))
                images, _ = photographs.prepare(path, SIZE, preparation, (resolution,))
                assert torch.equal(torch.from_numpy(images[resolution]).permute(2, 0, 1), batch.images[0])


def test_local_contrast_is_grey_in_the_disc_and_black_outside() -> None:
    pixels = np.asarray(square(encoded(photograph(2)), SIZE, LOCAL).image)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    away = np.hypot(x, y) / (SIZE / 2)
    assert not pixels[away > 1.01].any()
    assert np.median(pixels[away < 0.95], axis=0) == pytest.approx([128, 128, 128], abs=6)


def test_a_black_image_is_a_bad_row(tmp_path: Path) -> None:
    images = folder(tmp_path / "in", {"1_left.jpeg": encoded(photograph(1)), "2_left.jpeg": BLACK})
    for options in ({}, {"crop": "fundus"}, {"contrast": "local"}):
        with pytest.raises(ConvertError, match=r"labels\.csv, line 3: .*2_left\.jpeg: nothing to see: .* dark all over"):
            pack(tmp_path / "o.beton", images, **options)
    summary = pack(tmp_path / "o.beton", images, crop="fundus", on_bad="skip", max_bad="1")
    assert (summary.images, summary.skipped) == (1, 1)
    assert "dark all over" in (tmp_path / "o.beton.skipped.csv").read_text()


def test_where_the_retina_fills_the_frame_it_is_not_packed_as_cropped_but_graded_whole(tmp_path: Path) -> None:
    images = folder(tmp_path / "in", {"1_left.jpeg": encoded(photograph(1)), "2_left.jpeg": CLOSE})
    with pytest.raises(ConvertError, match=r"line 3: .*2_left\.jpeg: nothing to crop to: .*pack without --crop"):
        pack(tmp_path / "o.beton", images, crop="fundus")
    summary = pack(tmp_path / "o.beton", images, crop="fundus", on_bad="skip", max_bad="1")
    assert (summary.reencoded, summary.skipped) == ({"crop fundus": 1}, 1)
    whole = square(CLOSE, SIZE, FUNDUS)
    assert (whole.done, whole.no_crop) == (("whole frame",), "whole frame")
    assert np.array_equal(np.asarray(whole.image), np.asarray(square(CLOSE, SIZE).image))
    assert photographs.prepare(images / "2_left.jpeg", SIZE, LOCAL, (SIZE,))[1] == ("whole frame", "local contrast")


def test_large_photographs_are_decoded_small_and_their_small_discs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    eye = Image.fromarray(render(Eye(1, 3, "left", 3), LesionSettings(), CameraSettings(overflow=0)))
    frames = []
    for side in (1750, 800):
        frames.append(Image.new("RGB", (2400, 1800)))
        frames[-1].paste(eye.resize((side, side)), (300, 20))
    expected = [square(encoded(frame, "PNG"), SIZE, FUNDUS).image for frame in frames]
    sizes, decode = [], simplejpeg.decode_jpeg

    def spy(*arguments: object, **options: object) -> np.ndarray:
        pixels = decode(*arguments, **options)
        sizes.append((pixels.shape[1], pixels.shape[0]))
        return pixels

    jpegs = [encoded(frame) for frame in frames]
    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    found = [square(data, SIZE, FUNDUS).image for data in jpegs]
    # 1/8 leaves 1.5 times 128 px of the large disc; of the small one 100 px, which 1/4 doubles.
    assert sizes == [(300, 225), (300, 225), (600, 450)]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean() < 3


@pytest.mark.parametrize("options", [{"crop": "disc"}, {"contrast": "clahe"}])
def test_unknown_preparations_are_usage_errors(options: dict[str, str], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--(crop|contrast) '(disc|clahe)'"):
        pack(tmp_path / "o.beton", photos, **options)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).parents[2] / "tools" / "write_beton.py"
    environment = os.environ | {"PYTHONPATH": str(tool.parent.parent)}
    call = [sys.executable, str(tool), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, env=environment)


def test_the_command_crops_names_it_and_exits_by_what_happened(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.beton"
    where = ("--images", photos, "--labels", photos / "labels.csv", "--out", out, "--size", SIZE)
    done = command(*where, "--crop", "fundus", "--contrast", "local")
    assert done.returncode == 0, done.stderr
    assert "re-encoded at quality 95, 4:4:4: 7 (crop fundus and contrast local 7)" in done.stdout
    with Beton(out) as beton:
        assert preparation_of(beton) == LOCAL
    assert command(*where, "--crop", "circle").returncode == 2
    black = folder(tmp_path / "black", {"1_left.jpeg": BLACK})
    done = command("--images", black, "--labels", black / "labels.csv", "--out", out, "--crop", "fundus")
    assert done.returncode == 1
    assert "line 2" in done.stderr
    assert "dark all over" in done.stderr


# ---- from the .beton to the checkpoint and back ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cropped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train and test, 20 photographs each, packed with --crop fundus."""
    root = tmp_path_factory.mktemp("cropped")
    for name, first in (("train", 0), ("test", 20)):
        images = folder(root / name, {f"{seed}_left.jpeg": encoded(photograph(seed)) for seed in range(first, first + 20)})
        write_beton(root / f"{name}.beton", images=images, labels=images / "labels.csv", size=64, crop="fundus")
    return root / "train.beton", root / "test.beton"


def test_a_checkpoint_carries_the_preparation_of_its_training_set(cropped, tiny_betons, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    settings = {"epochs": 1, "batch_size": 20, "resolution": 32, "workers": 1, "val_fraction": 0}
    train.main(TrainConfig(train=cropped[0], test=cropped[1], out=out, **settings))
    assert read_info(out / "best.safetensors").preparation == FUNDUS

    assert evaluate.main(EvaluateConfig(out / "best.safetensors", cropped[1])) == 0
    with pytest.raises(UsageError) as refused:
        evaluate.main(EvaluateConfig(out / "best.safetensors", tiny_betons.test))
    for named in (tiny_betons.test, out / "best.safetensors", "--crop fundus --contrast none"):
        assert str(named) in str(refused.value)

    seen = []

    def spy(
        path: Path, size: int, preparation: Preparation, resolutions: set[int]
    ) -> tuple[dict[int, np.ndarray], tuple[str, ...]]:
        seen.append(preparation)
        return {side: np.zeros((side, side, 3), np.float32) for side in resolutions}, ()

    monkeypatch.setattr(photographs, "prepare", spy)
    predict.main(PredictConfig(out / "best.safetensors", (tiny_betons.test_images,), csv=tmp_path / "grades.csv"))
    assert seen == [FUNDUS] * 20


@pytest.mark.parametrize("preparation", [UNPREPARED, FUNDUS], ids=str)
def test_predict_rejects_a_black_photograph(preparation: Preparation, tmp_path: Path) -> None:
    (tmp_path / "black.jpeg").write_bytes(BLACK)
    with pytest.raises(JpegError, match="dark all over"):
        photographs.prepare(tmp_path / "black.jpeg", 64, preparation, (64,))


@pytest.mark.parametrize("other", ["test", "val"])
def test_sets_that_were_prepared_differently_are_refused_by_name(other: str, cropped, tiny_betons, tmp_path) -> None:
    files = {"train": cropped[0], "test": cropped[1], other: tiny_betons.test}
    with pytest.raises(UsageError) as refused:
        train.main(TrainConfig(**files, val_fraction=0, out=tmp_path / "run"))
    for named in (f"--train {cropped[0]}", "--crop fundus", f"--{other} {tiny_betons.test}", "--crop none"):
        assert named in str(refused.value)
    with Beton(tiny_betons.train) as one, Beton(tiny_betons.test) as two:
        assert common_preparation({"train": one, "test": two}) == UNPREPARED


def grader(preparation: Preparation) -> CheckpointInfo:
    ones = (1.0, 1.0, 1.0)
    return CheckpointInfo("resnet18", 5, 32, ones, ones, 1, "float32", "qwk", "test", preparation=preparation)


def test_a_checkpoint_from_before_preparations_means_none(tmp_path: Path) -> None:
    path, model = tmp_path / "best.safetensors", build_model("resnet18")
    save_checkpoint(path, model, grader(LOCAL))
    assert read_info(path) == grader(LOCAL)
    stored = grader(LOCAL).metadata()
    stored.pop("preparation")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, metadata=stored))
    assert read_info(path) == grader(UNPREPARED)


def test_preparations_unknown_to_this_version_are_errors(tmp_path: Path) -> None:
    for unknown in ({"crop": "macula"}, {"crop": "fundus", "hair": "removed"}, ["fundus"], "fundus"):
        path = tmp_path / "o.beton"
        with BetonWriter(path, 1) as writer:
            payload = reencode(encoded(photograph(0)), 64).jpeg
            writer.add(payload, 0, name="a", label=0, id=0, width=64, height=64)
            writer.finish({"preparation": unknown})
        with Beton(path) as beton, pytest.raises(BetonError, match="does not know"):
            preparation_of(beton)
        path = tmp_path / "best.safetensors"
        stored = grader(LOCAL).metadata() | {"preparation": json.dumps(unknown)}
        path.write_bytes(safetensors.torch.save({}, metadata=stored))
        with pytest.raises(CheckpointError, match="not that of a fastretina checkpoint"):
            read_info(path)
