"""Grad-CAM: the maps are what the paper defines, lie where the evidence is, and leave grades, names and other files alone."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import threading
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastretina import predict
from fastretina.errors import RunError, UsageError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.models import photographs
from fastretina.models.checkpoint import CheckpointInfo, save_checkpoint
from fastretina.models.gradcam import GradCam, Target
from fastretina.models.heads import HEADS, HeadName
from fastretina.models.inference import view_outputs
from fastretina.models.precision import Precision
from fastretina.models.resnet import build_model
from fastretina.packing.preprocessing import Preparation
from fastretina.predict import PredictConfig
from fastretina.report.overlays import EXTENSION, OverlayFolder, overlay, picture, relative_heat, upright

FLOAT32 = Precision("cpu", None, "")
SIDE = 64


def target_of(head: HeadName, grades: torch.Tensor, num_classes: int = 5) -> Target:
    return partial(HEADS[head](num_classes).target, grades=grades)


# ---- the maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_maps_are_the_head_s_own_weighting_of_the_last_features(arch):
    """Where a mean and one linear layer follow, Grad-CAM is CAM (Selvaraju et al. 2017, section 3.1), which needs no gradient."""
    torch.manual_seed(0)
    model = build_model(arch).eval()
    images = torch.randn(3, 3, 96, 96)
    grades = torch.tensor([4, 0, 2])
    features: list[torch.Tensor] = []
    hook = model.layer4.register_forward_hook(lambda module, inputs, output: features.append(output.detach()))
    with torch.no_grad():
        expected_outputs = model(images)
    hook.remove()
    expected = torch.einsum("bc,bchw->bhw", model.fc.weight.detach()[grades].double(), features[0].double()).relu() / 9

    cam = GradCam(model, "layer4")
    with torch.no_grad():
        outputs = cam(images)
        (heat,) = cam.heat(target_of("softmax", grades))
    assert torch.allclose(outputs, expected_outputs, atol=1e-6)
    assert not outputs.requires_grad
    assert heat.shape == (3, 3, 3)
    assert heat.dtype == torch.float32
    assert float(expected.max()) > 0
    assert torch.allclose(heat.double(), expected, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize(("head", "evidence"), [("regression", [[1], [1]]), ("ordinal", [[1, 1, 1, 0], [-1, 0, 0, 0]])])
def test_other_heads_are_explained_by_their_own_evidence(head, evidence):
    torch.manual_seed(0)
    model = build_model("resnet18", HEADS[head](5).outputs)
    images, grades = torch.randn(2, 3, 96, 96), torch.tensor([3, 0])
    features: list[torch.Tensor] = []
    model.layer4.register_forward_hook(lambda module, inputs, output: features.append(output.detach()))
    cam = GradCam(model, "layer4")
    cam(images)
    (heat,) = cam.heat(target_of(head, grades))
    weights = torch.tensor(evidence, dtype=torch.float32) @ model.fc.weight
    assert torch.allclose(heat, torch.einsum("bc,bchw->bhw", weights, features[0]).relu() / 9, atol=1e-6)
    assert (heat.amax(dim=(1, 2)) > 0).all()


def test_nothing_is_recorded_before_the_explained_layer():
    model = build_model("resnet18")
    cam = GradCam(model, "layer4")
    seen = []
    model.layer3.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    cam(torch.randn(1, 3, SIDE, SIDE))
    assert seen == [False, True]
    cam.heat(target_of("softmax", torch.tensor([1])))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_under_autocast_the_maps_are_float32_and_nearly_the_same():
    torch.manual_seed(0)
    cam = GradCam(build_model("resnet18"), "layer4")
    images, target = torch.randn(2, 3, 96, 96), target_of("softmax", torch.tensor([1, 4]))
    view_outputs(cam, images, FLOAT32)
    (exact,) = cam.heat(target)
    view_outputs(cam, images, Precision("cpu", torch.bfloat16, ""))
    (found,) = cam.heat(target)
    assert found.dtype == torch.float32
    assert torch.allclose(found, exact, atol=0.05 * float(exact.max()))


class Spotter(nn.Module):
    """Is there a bright patch? Three convolutions, the mean, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        sizes = itertools.pairwise((3, 16, 16, 16))
        convolutions = [(nn.Conv2d(one, other, 3, stride=2, padding=1), nn.ReLU()) for one, other in sizes]
        self.layer4 = nn.Sequential(*itertools.chain(*convolutions))
        self.fc = nn.Linear(16, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer4(images).mean(dim=(2, 3)))


def patched(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, 3, 64, 64) noise, half of it with a bright patch of 12 x 12 px well inside one quadrant; (B,) whether; (B,) 0-3 where."""
    images = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    present = torch.arange(count) % 2
    quadrants = torch.randint(4, (count,), generator=generator)
    corners = 32 * torch.stack((quadrants // 2, quadrants % 2), dim=1) + torch.randint(4, 17, (count, 2), generator=generator)
    for image, is_there, (row, column) in zip(images, present, corners.tolist(), strict=True):
        image[:, row : row + 12, column : column + 12] += 2.0 * is_there
    return images, present, quadrants


@pytest.fixture(scope="module")
def spotter() -> Spotter:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Spotter()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        images, present, _ = patched(32, generator)
        loss = nn.functional.cross_entropy(model(images), present)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("views", [1, 8])
def test_the_heat_lies_on_what_the_answer_rests_on(spotter, views):
    images, present, quadrants = patched(64, torch.Generator().manual_seed(2))
    cam = GradCam(spotter, "layer4")
    with torch.no_grad():
        answers = HEADS["softmax"](2).answer(view_outputs(cam, images, FLOAT32, views)).argmax(dim=1)
        maps = cam.heat(target_of("softmax", answers, 2))
    assert (answers == present).all()
    assert len(maps) == views
    heat = relative_heat(upright(maps))
    found = present == 1
    peaks = heat.flatten(1).argmax(dim=1)
    rows, columns = peaks // heat.shape[2] >= heat.shape[1] // 2, peaks % heat.shape[2] >= heat.shape[2] // 2
    assert ((2 * rows + columns) == quadrants)[found].all()
    shares = torch.stack([heat[n, 4 * (q // 2) :, 4 * (q % 2) :][:4, :4].sum() / heat[n].sum() for n, q in enumerate(quadrants)])
    assert float(shares[found].min()) > 0.6


def test_heat_is_relative_and_zero_where_nothing_speaks_for_the_answer():
    maps = torch.tensor([[[0.0, 2.0], [1.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(relative_heat(maps), torch.tensor([[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))


# ---- the pictures ----------------------------------------------------------------------------------------------------


def test_there_is_colour_where_there_is_heat_and_nowhere_else():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    heat = np.zeros((4, 4), np.float32)
    red_free = np.repeat(pixels[..., 1:2], 3, axis=2)
    assert np.array_equal(overlay(pixels, heat), red_free)
    heat[3, 3] = 1.0
    changed = (overlay(pixels, heat) != red_free).any(axis=2)
    assert not changed[:25].any()
    assert not changed[:, :25].any()
    assert changed[30:, 30:].all()


@pytest.mark.parametrize("side", [32, 512, 700])
def test_a_picture_has_the_photograph_on_the_left_and_text_below(side):
    pixels = np.full((side, side, 3), (200, 90, 60), np.uint8)
    shown = np.asarray(Image.open(BytesIO(picture(pixels, np.eye(3, dtype=np.float32), "2 moderate, 87.3 %", "10_left.jpeg"))))
    panel = max(512, side)
    assert shown.shape[1] >= 2 * panel
    assert np.abs(shown[:panel, :panel].astype(int) - pixels[0, 0]).max() < 20  # JPEG's blocks at the edges
    assert np.abs(shown[:panel, -panel:].astype(int) - pixels[0, 0]).max() > 50
    for half in (shown[panel:, :panel], shown[panel:, -panel:]):
        assert half.max() > 200
        assert half[:, -2:].max() < 40, "text runs out of the picture"


@pytest.mark.parametrize(
    "name", ["x" * 250, "日本" * 40 + ".png", "a\nb\x1b[2J\u202egpj.exe", os.fsdecode(b"\xff\xfe.png"), "$x_{1}$"]
)
def test_no_name_breaks_a_picture(name):
    data = picture(np.zeros((32, 32, 3), np.uint8), np.zeros((1, 1), np.float32), "0 no DR, 99.0 %", name)
    shown = np.asarray(Image.open(BytesIO(data)))
    assert shown[512:, :500].max() > 200
    assert shown[512:, 505:520].max() < 40, "the name runs into the other half"


# ---- the names -------------------------------------------------------------------------------------------------------


def test_names_mirror_the_folders_given_and_never_meet(tmp_path):
    photos, more = tmp_path / "photos", tmp_path / "more"
    for folder in (photos, more):
        folder.mkdir()
    folder = OverlayFolder(tmp_path / "out", [photos, more, tmp_path / "single.png"])
    images = [
        photos / "a.jpg",
        photos / "a.png",
        photos / "deep/er/b.jpeg",
        more / "a.jpg",
        more / "a-2.jpg",
        more / "a.jpg",
        tmp_path / "single.png",
        photos / "../elsewhere/a.jpg",
        photos / "x.png",
        photos / "x.jpeg/y.png",
        photos / ("n" * 251 + ".png"),
        photos / ("n" * 250 + "m.png"),
        photos / os.fsdecode(b"\xff\xff.png"),
    ]
    places = [folder.place(image) for image in images]
    assert [str(place.relative_to(tmp_path / "out")) for place in places[:10]] == [
        "a.jpeg", "a-2.jpeg", "deep/er/b.jpeg", "a-3.jpeg", "a-2-2.jpeg", "a-4.jpeg", "single.jpeg", "a-5.jpeg", "x.jpeg",
        "x.jpe_/y.jpeg",
    ]  # fmt: skip
    assert len(set(places)) == len(images)
    for place in places:
        assert place.resolve().is_relative_to((tmp_path / "out").resolve())
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_name(f".{place.name}.tmp").write_bytes(b"the longest name that is needed")
        place.write_bytes(b"")


@pytest.mark.parametrize(("given", "image"), [(".", "c/x.jpg"), ("..", "../b/c/x.jpg"), ("../b", "../b/c/x.jpg")])
def test_a_folder_given_by_dots_is_mirrored_too(tmp_path, monkeypatch, given, image):
    (tmp_path / "a/b/c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    folder = OverlayFolder(tmp_path / "out", [Path(given)])
    assert folder.place(Path(image)) == tmp_path / "out" / ("b/c/x.jpeg" if given == ".." else "c/x.jpeg")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    save_checkpoint(
        path, build_model("resnet18"), CheckpointInfo("resnet18", 5, SIDE, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "test")
    )
    return path


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("tta", [1, 5])
def test_explaining_changes_no_answer(checkpoint, tiny_betons, tmp_path, tta):
    given = (tiny_betons.test_images,)
    plain, explained = tmp_path / "plain.csv", tmp_path / "explained.csv"
    predict.main(PredictConfig(checkpoint, given, csv=plain, tta=tta, batch_size=8))
    out = tmp_path / "overlays"
    assert predict.main(PredictConfig(checkpoint, given, csv=explained, tta=tta, batch_size=8, explain=out)) == 0
    assert len(rows(plain)) == 21
    for one, other in zip(rows(plain)[1:], rows(explained)[1:], strict=True):
        assert (one[:3], one[8:]) == (other[:3], other[8:])
        assert [float(cell) for cell in one[3:8]] == pytest.approx([float(cell) for cell in other[3:8]], abs=1e-5)
    expected = {path.with_suffix(EXTENSION).name for path in tiny_betons.test_images.glob("*.jpeg")}
    assert {path.name for path in out.iterdir()} == expected
    for path in out.iterdir():
        with Image.open(path) as image:
            image.load()


def test_a_bad_image_has_no_overlay_and_the_others_have(checkpoint, tiny_betons, tmp_path):
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    good = sorted(tiny_betons.test_images.glob("*.jpeg"))
    hostile = os.fsdecode(b"\xff\xfe.jpg")
    for name, source in zip(("a.jpg", "deeper/a.jpg", "-rf $(x);.jpeg", "n" * 251 + ".jpg", hostile), good, strict=False):
        shutil.copy(source, photos / name)
    (photos / "bad.jpg").write_bytes(good[0].read_bytes()[:300])
    out = tmp_path / "new" / "overlays"
    assert predict.main(PredictConfig(checkpoint, (photos, photos / "a.jpg"), csv=tmp_path / "g.csv", explain=out)) == 1
    found = {os.fsencode(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {
        b"a.jpeg", b"a-2.jpeg", b"deeper/a.jpeg", b"-rf $(x);.jpeg", b"n" * 230 + b".jpeg", b"\xff\xfe.jpeg"
    }  # fmt: skip
    assert len(rows(tmp_path / "g.csv")) == 1 + 6 + 1


@pytest.mark.parametrize("where", ["photos", "photos/out", "link/out"])
def test_overlays_are_never_written_among_the_photographs(checkpoint, tiny_betons, tmp_path, where):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    shutil.copy(next(tiny_betons.test_images.glob("*.jpeg")), tmp_path / "photos" / "a.jpeg")
    with pytest.raises(UsageError, match="lies in"):
        predict.main(PredictConfig(checkpoint, (tmp_path / "photos",), csv=tmp_path / "g.csv", explain=tmp_path / where))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpeg"]


def test_an_overlay_replaces_no_file(checkpoint, tiny_betons, tmp_path):
    source = shutil.copy(next(tiny_betons.test_images.glob("*.jpeg")), tmp_path / "a.jpeg")
    before = source.read_bytes()
    with pytest.raises(UsageError, match="new or an empty"):
        predict.main(PredictConfig(checkpoint, (source,), csv=tmp_path / "g.csv", explain=tmp_path))
    assert source.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_graded(checkpoint, tiny_betons, tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "prepare", lambda *_: pytest.fail("an image was read"))
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/overlays")):
        with pytest.raises(RunError, match=f"--explain {path}: cannot be written"):
            predict.main(PredictConfig(checkpoint, (tiny_betons.test_images,), csv=tmp_path / "g.csv", explain=path))
    assert not (tmp_path / "g.csv").exists()


def test_a_disk_that_fails_midway_is_an_error_that_names_the_overlay(checkpoint, tiny_betons, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(path: Path, data: bytes) -> None:
        raise RunError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr("fastretina.report.overlays.write_bytes", full)
    with pytest.raises(RunError, match=r"left\.jpeg: .*No space"):
        predict.main(PredictConfig(checkpoint, (tiny_betons.test_images,), csv=tmp_path / "g.csv", explain=out))
    assert list(out.iterdir()) == []
    assert not (tmp_path / "g.csv").exists()


# ---- many images -----------------------------------------------------------------------------------------------------


def test_twenty_thousand_images_are_graded_as_they_are_found(tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    for number in range(20):
        (photos / str(number)).mkdir(parents=True)
        for image in range(1000):
            (photos / str(number) / f"{image}.jpeg").touch()
    lock, counts, most = threading.Lock(), {"prepared": 0, "graded": 0}, [0]

    def prepare(
        path: Path, size: int, preparation: Preparation, resolutions: set[int]
    ) -> tuple[dict[int, np.ndarray], tuple[str, ...]]:
        with lock:
            counts["prepared"] += 1
            most[0] = max(most[0], counts["prepared"] - counts["graded"])
        return {size: np.zeros((size, size, 3), np.float32)}, ()

    class Same(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with lock:
                counts["graded"] += len(images)
            return images.new_zeros(len(images), 5)

    grader = CheckpointInfo("resnet18", 5, 2, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "test")
    monkeypatch.setattr("fastretina.models.grader.open_checkpoint", lambda *_: (Same(), grader, torch.device("cpu"), FLOAT32))
    monkeypatch.setattr(photographs, "prepare", prepare)
    assert predict.main(PredictConfig(tmp_path / "x.safetensors", (photos,), csv=tmp_path / "g.csv", batch_size=32, workers=2)) == 0
    assert counts == {"prepared": 20_000, "graded": 20_000}
    assert most[0] <= 2 * 32 + 2 * 2
    assert "20,000 images graded, 0 could not be" in capsys.readouterr().err
