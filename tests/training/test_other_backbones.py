"""Runs with a backbone of timm: they train, go on where they stopped, and say plainly what such a network cannot."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastretina import compare, predict, train
from fastretina.compare import CompareConfig
from fastretina.errors import RunError, UsageError
from fastretina.predict import PredictConfig
from fastretina.training.config import TrainConfig, as_settings, differing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(tiny_betons) -> TrainConfig:
    common = {"epochs": 2, "batch_size": 10, "resolution": 64, "lr": 2e-3, "schedule": "constant", "workers": 1}
    return TrainConfig(train=tiny_betons.train, test=tiny_betons.test, arch="timm:test_vit", layer_decay=0.75, ema=0.5, **common)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The folder of an undisturbed run, which it names itself."""
    folder = tmp_path_factory.mktemp("work")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(settings) == 0
    return folder / "runs" / "timm-test_vit-64px-seed0"


def test_a_transformer_learns_with_falling_rates_and_an_average(whole):
    with (whole / "results.csv").open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[1] < losses[0] - 0.1


def test_a_stopped_run_of_a_transformer_ends_in_the_same_weights(settings, whole, tmp_path):
    out = replace(settings, out=tmp_path / "cut")
    train.main(replace(out, stop_after_steps=5))
    with pytest.raises(RunError, match=r"layer_decay was 0\.75, now 0\.5"):
        train.main(replace(out, layer_decay=0.5))
    train.main(out)
    ours, expected = (safetensors.torch.load_file(folder / "best.safetensors") for folder in (tmp_path / "cut", whole))
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_runs_from_before_the_setting_had_no_layer_decay():
    now = as_settings(TrainConfig())
    older = {name: value for name, value in now.items() if name != "layer_decay"}
    assert differing(older, now, now) == {}
    assert differing(older, now | {"layer_decay": 0.75}, now) == {"layer_decay": (1.0, 0.75)}


def test_grades_come_without_an_explanation(whole, tiny_betons, tmp_path):
    given = PredictConfig(whole / "best.safetensors", (tiny_betons.test_images,), csv=tmp_path / "grades.csv")
    with pytest.raises(UsageError, match="timm:test_vit has none to look at"):
        predict.main(replace(given, explain=tmp_path / "overlays"))
    assert not (tmp_path / "overlays").exists()
    assert predict.main(given) == 0
    assert len((tmp_path / "grades.csv").read_text().splitlines()) == 21


@pytest.mark.parametrize(
    ("changes", "message"), [({"grow_from": 32}, "--grow-from 32: .*one resolution"), ({"resolution": 60}, "48, 64")]
)
def test_what_a_transformer_cannot_is_refused_before_anything_is_trained(settings, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train.main(replace(settings, out=tmp_path / "run", **changes))
    recipe = {name: getattr(settings, name) for name in ("train", "test", "epochs", "batch_size", "resolution", "workers")}
    with pytest.raises(UsageError, match=message):
        compare.main(CompareConfig(**recipe | changes, archs="resnet18,timm:test_vit", out=tmp_path / "compared"))
    assert not list(tmp_path.rglob("last.pt"))
