"""Models have torchvision's keys and five outputs; weights are checked before use, and never silently left out."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from fastretina.errors import CheckpointError, UsageError
from fastretina.models.gradcam import GradCam
from fastretina.models.heads import head_layer
from fastretina.models.options import BACKBONES
from fastretina.models.resnet import build_model


@pytest.fixture(scope="module")
def imagenet_like() -> dict[str, torch.Tensor]:
    """A state with 1000 classes, as torchvision's files have."""
    torch.manual_seed(3)
    return torchvision.models.resnet18().state_dict()


RESNETS = [arch for arch in BACKBONES if arch.startswith("resnet")]


def save_with_digest(state, folder: Path, wrong: bool = False) -> Path:
    torch.save(state, folder / "plain.pth")
    digest = hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()[:8]
    # Letters make it a digest and not a date; a digest of digits alone is unlikely but must not fail this test.
    digest = (
        "deadbeef"
        if wrong
        else digest
        if not digest.isdigit()
        else hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()[:24]
    )
    return (folder / "plain.pth").rename(folder / f"resnet18-{digest}.pth")


@pytest.mark.parametrize("arch", [arch for arch in RESNETS if arch != "resnet10"])
def test_every_architecture_has_five_outputs_and_torchvisions_keys(arch):
    with torch.device("meta"):
        model = build_model(arch)
        reference = torchvision.models.get_model(arch)
    assert model.fc.out_features == 5
    assert list(model.state_dict()) == list(reference.state_dict())


def test_a_resnet10_is_a_resnet18_without_the_second_block_of_each_stage():
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_model("resnet10").state_dict().items()}
        larger = {name: value.shape for name, value in build_model("resnet18").state_dict().items()}
    assert shapes == {name: shape for name, shape in larger.items() if not re.match(r"layer\d\.1\.", name)}


@pytest.mark.parametrize("arch", RESNETS)
def test_every_architecture_has_its_grad_cam_layer_and_a_linear_head(arch):
    with torch.device("meta"):
        model = build_model(arch)
    model.get_submodule(BACKBONES[arch].gradcam)
    name, head = head_layer(model)
    assert model.get_submodule(name) is head
    assert head.out_features == 5


def test_grad_cam_explains_a_layer_whose_output_is_changed_in_place():
    layers = torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(inplace=True), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    model, images = torch.nn.Sequential(*layers, torch.nn.Linear(4, 5)), torch.rand(2, 3, 8, 8)
    expected = model(images).detach()
    cam = GradCam(model, "0")
    assert torch.equal(cam(images), expected)
    (heat,) = cam.heat(lambda outputs: outputs[:, 0])
    assert heat.shape == (2, 8, 8)


def test_weights_and_activations_are_channels_last():
    model = build_model("resnet18")
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    features = model.maxpool(model.conv1(torch.zeros(2, 3, 64, 64).to(memory_format=torch.channels_last)))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_backbone_is_loaded_and_a_head_of_1000_classes_replaced(imagenet_like, tmp_path, kind):
    path = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(imagenet_like, path)
    else:
        safetensors.torch.save_file(imagenet_like, path)
    state = build_model("resnet18", weights=path).state_dict()
    assert state["fc.weight"].shape == (5, 512)
    assert all(torch.equal(value, imagenet_like[key]) for key, value in state.items() if not key.startswith("fc."))


def test_a_head_of_the_right_size_is_kept(tmp_path):
    first = build_model("resnet18")
    torch.save(first.state_dict(), tmp_path / "mine.pth")
    assert torch.equal(build_model("resnet18", weights=str(tmp_path / "mine.pth")).fc.weight, first.fc.weight)


def test_the_digest_in_the_name_is_checked(imagenet_like, tmp_path):
    build_model("resnet18", weights=save_with_digest(imagenet_like, tmp_path))
    wrong = save_with_digest(imagenet_like, tmp_path, wrong=True)
    with pytest.raises(CheckpointError, match=r"resnet18-deadbeef\.pth: the file's sha256 begins [0-9a-f]{8}, not deadbeef"):
        build_model("resnet18", weights=wrong)


def test_a_date_in_the_name_is_no_digest(imagenet_like, tmp_path):
    torch.save(imagenet_like, tmp_path / "run-20261123.pth")
    build_model("resnet18", weights=tmp_path / "run-20261123.pth")


def test_weights_of_another_architecture_are_refused(imagenet_like, tmp_path):
    torch.save(imagenet_like, tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match=r"r18\.pth.*--arch"):
        build_model("resnet34", weights=tmp_path / "r18.pth")
    torch.save({**imagenet_like, "conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "shape.pth")
    with pytest.raises(CheckpointError, match=r"conv1\.weight has shape"):
        build_model("resnet18", weights=tmp_path / "shape.pth")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_corrupt_files_are_named(tmp_path, content, suffix):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\."):
        build_model("resnet18", weights=path)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    for name, write in (("zip.pth", lambda path: torch.save({"fc.weight": Attack()}, path)), ("raw.pth", None)):
        path = tmp_path / name
        if write is not None:
            write(path)
        else:
            path.write_bytes(pickle.dumps(Attack()))
        with pytest.raises(CheckpointError, match=name):
            build_model("resnet18", weights=path)
    assert not (tmp_path / "attacked").exists()


def test_a_missing_file_is_an_error_not_a_start_from_scratch(tmp_path):
    with pytest.raises(CheckpointError, match="no such weights file"):
        build_model("resnet18", weights=tmp_path / "absent.pth")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UsageError, match="IMAGENET1K_V1"):
        build_model("resnet18", weights="IMAGENET22K")
    with pytest.raises(UsageError, match="resnet152"):
        build_model("resnet19")


def test_weights_that_cannot_be_downloaded_say_where_to_put_the_file(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match="put it at") as raised:
        build_model("resnet18", weights="IMAGENET1K_V1")
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in str(raised.value)


def test_a_file_put_there_by_hand_is_checked_like_a_downloaded_one(imagenet_like, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(imagenet_like, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    with pytest.raises(CheckpointError, match="not f37072fd"):
        build_model("resnet18", weights="IMAGENET1K_V1")
