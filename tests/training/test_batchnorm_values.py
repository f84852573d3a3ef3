"""A forward pass that BatchNorm cannot train on is refused before the first step, and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastretina import compare, train, write_beton
from fastretina.errors import UsageError
from fastretina.models.resnet import build_model, freeze_backbone
from fastretina.training import loop
from fastretina.training.batchnorm_values import refuse_single_values
from fastretina.training.config import TrainConfig
from tests.conftest import write_tiny_folder

pytestmark = pytest.mark.usefixtures("one_thread")
EDGE = TrainConfig(batch_size=32, resolution=32, epochs=1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("resnet18")


def is_refused(model: nn.Module, images: int, ranks: int = 1, begun: int = 0, **changes) -> bool:
    try:
        refuse_single_values(replace(EDGE, **changes), model, images, ranks, begun)
    except UsageError:
        return True
    return False


def trains(model: nn.Module, batch: int, side: int) -> bool:
    """What torch itself says of a forward pass."""
    try:
        model.train()(torch.zeros(batch, 3, side, side))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("side", [1, 16, 32, 33, 64])
def test_what_is_refused_is_what_torch_would_refuse(arch, side):
    network = build_model(arch)
    assert is_refused(network, 33, resolution=side) == (not trains(network, 1, side))
    assert not is_refused(network, 34, resolution=side)


def test_a_frozen_backbone_trains_on_one_image(model):
    freeze_backbone(model.train(), True)
    model(torch.zeros(1, 3, 32, 32))
    freeze_backbone(model, False)
    assert not is_refused(model, 33, freeze_epochs=1)
    assert is_refused(model, 33, freeze_epochs=1, epochs=2)


@pytest.mark.parametrize(
    ("images", "ranks", "changes", "refused"),
    [
        (33, 1, {}, True),
        (34, 1, {}, False),
        (32, 1, {}, False),
        (1, 1, {}, True),
        (8, 1, {"batch_size": 1}, True),
        (34, 2, {}, True),  # a rank takes one of the last two
        (36, 2, {}, False),
        (34, 2, {"sync_batchnorm": True}, False),
        (33, 2, {"sync_batchnorm": True}, True),
        (32, 1, {"accumulate": 16}, False),
        (32, 1, {"accumulate": 31}, True),  # 2 and 30 times 1
        (34, 1, {"accumulate": 2}, True),
        (66, 2, {"accumulate": 2, "sync_batchnorm": True}, False),  # 2 ranks of 1 image, which is in the first micro-batch
        (33, 1, {"resolution": 64}, False),
        (33, 1, {"resolution": 64, "grow_from": 32, "epochs": 2}, True),
        (33, 1, {"resolution": 64, "grow_from": 32, "epochs": 1}, False),  # the first half of one epoch is none
        (33, 1, {"resolution": 64, "grow_from": 40, "epochs": 2}, False),
    ],
)
def test_every_way_to_divide_a_batch_counts(model, images, ranks, changes, refused):
    assert is_refused(model, images, ranks, **changes) == refused


def test_epochs_that_are_over_do_not_count(model):
    growing = {"resolution": 64, "grow_from": 32, "epochs": 4}
    assert is_refused(model, 33, begun=1, **growing)
    assert not is_refused(model, 33, begun=2, **growing)


def test_the_error_names_the_numbers_and_flags_that_help(model):
    with pytest.raises(UsageError) as raised:
        refuse_single_values(replace(EDGE, accumulate=3), model, 66, ranks=2)
    assert str(raised.value) == (
        "66 images in batches of 32 (--batch-size) over 2 ranks and 3 micro-batches (--accumulate) leave one image for a forward "
        "pass, of which layer4.0.bn1 sees a single pixel at 32 px (--resolution): BatchNorm cannot train on one value. "
        "Give --batch-size 33, or --sync-batchnorm, or a larger --resolution"
    )
    for changes in ({"batch_size": 33}, {"sync_batchnorm": True}, {"resolution": 33}):
        assert not is_refused(model, 66, 2, **{"accumulate": 3} | changes)
    with pytest.raises(UsageError, match=r"Give --batch-size 31, or a larger --grow-from$"):
        refuse_single_values(replace(EDGE, resolution=64, grow_from=32, epochs=2), model, 33)
    with pytest.raises(UsageError, match=r"Give --batch-size 61, or --accumulate 1, or a larger --resolution$"):
        refuse_single_values(replace(EDGE, batch_size=62, accumulate=2), model, 65)
    with pytest.raises(UsageError, match=r"value\. Give a larger --resolution$"):
        refuse_single_values(EDGE, model, 1)


@pytest.fixture(scope="module")
def betons(tmp_path_factory) -> dict[int, Path]:
    """Files of 33 and of 34 images."""
    root = tmp_path_factory.mktemp("edge")
    for count in (33, 34):
        folder = write_tiny_folder(root / str(count), count, 0, seed=1)
        write_beton(folder.with_suffix(".beton"), images=folder, labels=folder / "labels.csv", size=64, workers=1)
    return {count: root / f"{count}.beton" for count in (33, 34)}


def recipe(tiny_betons, train_set: Path, out: Path, resolution: int) -> dict[str, Any]:
    sizes = {"epochs": 1, "batch_size": 32, "resolution": resolution}
    return {"train": train_set, "test": tiny_betons.test, "out": out, "workers": 1, "val_fraction": 0, **sizes}


@pytest.mark.parametrize(("images", "resolution"), [(34, 32), (33, 33)])
def test_runs_on_this_side_of_the_edge_train(tiny_betons, betons, tmp_path, images, resolution):
    assert train.main(TrainConfig(**recipe(tiny_betons, betons[images], tmp_path / "run", resolution))) == 0
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_a_run_beyond_the_edge_is_refused_before_its_first_step(tiny_betons, betons, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_backward", None)  # no step can be made
    with pytest.raises(UsageError, match="33 images in batches of 32"):
        train.main(TrainConfig(**recipe(tiny_betons, betons[33], tmp_path / "run", 32)))
    with pytest.raises(UsageError, match="33 images in batches of 32"):
        compare.main(compare.CompareConfig(**recipe(tiny_betons, betons[33], tmp_path / "runs", 32), archs="resnet18,resnet34"))
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob("metrics.json"))
