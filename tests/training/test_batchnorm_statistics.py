"""BatchNorm's statistics are those of the weights that are evaluated: their value, where they are kept, and what they cost."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import rank_run
import rank_statistics
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastretina import Loader, write_beton
from fastretina.errors import RunError, Terminated, UsageError
from fastretina.models.checkpoint import read_info
from fastretina.report.run import RunPictures
from fastretina.train import main
from fastretina.training import batchnorm_statistics, build
from fastretina.training.batchnorm_statistics import batches_of
from fastretina.training.config import TrainConfig, check
from fastretina.training.state import load_state, save_state
from tests.conftest import write_tiny_folder

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 5  # an epoch: 40 images, 8 at a time
STATISTICS = ("1.running_mean", "1.running_var")


class Noted:
    """What the network of a run was given: (images, whether it learns from them) of each forward pass in training mode; and the
    inputs of its BatchNorm then."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, bool]] = []
        self.inputs: list[Tensor] = []

    def network(self, outputs: int) -> nn.Module:
        model = rank_run.Tiny(outputs)
        nn.init.constant_(model[1].running_mean, 0.25)  # as pretrained ones would be

        def look(module: nn.Module, given: tuple[Tensor]) -> None:
            if module.training:
                self.passes.append((len(given[0]), torch.is_grad_enabled()))
                self.inputs.append(given[0].detach().clone())

        model[1].register_forward_pre_hook(look)
        return model

    @property
    def estimated(self) -> list[int]:
        """Images of each pass that nothing is learnt from."""
        return [images for images, learnt in self.passes if not learnt]


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """A small network, no pictures at the end, and batches of 8 where they would be of 32: several of them in an epoch."""
    found = Noted()
    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: found.network(outputs))
    monkeypatch.setattr(build, "load_initial", lambda *_: "given")
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)
    monkeypatch.setattr(batchnorm_statistics, "BATCH", 8)
    return found


def config(tiny_betons, out: Path, **changes) -> TrainConfig:
    settings = {
        "epochs": 1,
        "batch_size": 8,
        "resolution": 32,
        "lr": 1e-2,
        "seed": 7,
        "workers": 1,
        "val": tiny_betons.train,
    } | changes
    return TrainConfig(train=tiny_betons.train, test=tiny_betons.test, out=out, **settings)


def expected(stem: Tensor, data: Path, epoch: int, batch_size: int, batches: int) -> list[Tensor]:
    """(C,) mean and variance of the stem's outputs, as the mean over the first batches of an epoch."""
    found = []
    with Loader(data, batch_size, resolution=32, seed=7, workers=1, drop_last=True) as loader:
        loader.set_epoch(epoch)
        for batch, _ in zip(loader, range(batches), strict=False):
            outputs = nn.functional.conv2d(batch.images, stem, stride=4).double()
            values = outputs.movedim(1, 0).flatten(1)
            found.append((values.mean(dim=1), values.var(dim=1)))
    assert len(found) == batches
    return [torch.stack(part).mean(dim=0) for part in zip(*found, strict=True)]


def assert_close(state: dict[str, Tensor], right: list[Tensor]) -> None:
    for key, value in zip(STATISTICS, right, strict=True):
        torch.testing.assert_close(state[key].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_they_are_of_the_weights_that_are_evaluated_over_as_many_images_as_asked_for(tiny_betons, tmp_path, noted, ema):
    settings = config(tiny_betons, tmp_path / "run", epochs=2, batchnorm_images=24, ema=ema)
    main(settings)
    state = load_state(settings.out / "last.pt")
    last = state["model"]
    if ema:
        last = {key.removeprefix("module."): value for key, value in state["average"].items() if key.startswith("module.")}
    best = load_file(settings.out / "best.safetensors")
    assert_close(last, expected(last["0.weight"], tiny_betons.train, 2, 8, 3))
    assert_close(best, expected(best["0.weight"], tiny_betons.train, read_info(settings.out / "best.safetensors").epoch, 8, 3))
    assert noted.estimated == 2 * [8, 8, 8]
    assert [images for images, learnt in noted.passes if learnt] == 2 * STEPS * [8]


@pytest.mark.parametrize(("asked", "batches"), [(1, 1), (16, 2), (17, 3), (256, 5)])
def test_whole_batches_are_asked_of_the_loader_and_no_more_than_an_epoch_has(tiny_betons, tmp_path, noted, asked, batches):
    main(config(tiny_betons, tmp_path / "run", batchnorm_images=asked))
    assert noted.estimated == batches * [8]


@pytest.mark.parametrize(
    ("images", "ranks", "batch", "drops"),
    [(40, 1, 8, True), (8, 1, 8, True), (7, 1, 7, True), (1, 1, 1, True), (40, 20, 20, True), (5, 9, 9, False)],
)
def test_a_batch_is_no_larger_than_the_training_set_and_has_an_image_for_each_rank(images, ranks, batch, drops):
    assert batches_of(images, ranks) == {"batch_size": batch, "drop_last": drops}


def test_a_training_set_smaller_than_a_batch_is_one(tiny_betons, tmp_path, noted):
    folder = write_tiny_folder(tmp_path / "few", 5, 0, seed=1)
    data = tmp_path / "few.beton"
    write_beton(data, images=folder, labels=folder / "labels.csv", size=64, workers=1)
    settings = replace(config(tiny_betons, tmp_path / "run"), train=data)
    main(settings)
    state = load_state(settings.out / "last.pt")["model"]
    assert noted.estimated == [5]
    assert_close(state, expected(state["0.weight"], data, 1, 5, 1))


def test_none_asked_for_leaves_the_running_averages_of_the_steps(tiny_betons, tmp_path, noted):
    settings = config(tiny_betons, tmp_path / "run", batchnorm_images=0)
    main(settings)
    assert noted.estimated == []
    right = [torch.full((8,), 0.25).double(), torch.ones(8).double()]
    for values in noted.inputs:
        each = values.double().movedim(1, 0).flatten(1)
        right = [0.9 * old + 0.1 * new for old, new in zip(right, (each.mean(dim=1), each.var(dim=1)), strict=True)]
    state = load_state(settings.out / "last.pt")["model"]
    assert len(noted.inputs) == int(state["1.num_batches_tracked"]) == STEPS
    assert_close(state, right)


def test_those_of_a_frozen_backbone_are_left_as_they_came(tiny_betons, tmp_path, noted):
    settings = config(tiny_betons, tmp_path / "run", freeze_epochs=1, weights="given.pth")
    main(settings)
    assert noted.passes == []
    assert_close(load_state(settings.out / "last.pt")["model"], [torch.full((8,), 0.25).double(), torch.ones(8).double()])
    main(replace(settings, out=tmp_path / "two", epochs=2, batchnorm_images=8))
    assert noted.passes == [*STEPS * [(8, True)], (8, False)]


def test_a_network_without_batchnorm_makes_no_loader_for_them(tiny_betons, tmp_path, monkeypatch):
    made, real = [], build.make_loader

    def noting(config, name, *rest, **options):
        made.append(name)
        return real(config, name, *rest, **options)

    monkeypatch.setattr(build, "make_loader", noting)
    main(config(tiny_betons, tmp_path / "with"))
    assert made.count("train") == 2
    made.clear()
    parts = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 5)
    monkeypatch.setattr(build, "build_model", lambda *_, **__: nn.Sequential(*parts))
    main(config(tiny_betons, tmp_path / "without"))
    assert made.count("train") == 1


def assert_same(one: TrainConfig, other: TrainConfig) -> None:
    first, second = (load_state(run.out / "last.pt") for run in (one, other))
    for part in ("model", "average"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())
    best = [run.out / "best.safetensors" for run in (one, other)]
    assert read_info(best[0]) == read_info(best[1])
    assert all(torch.equal(value, load_file(best[1])[key]) for key, value in load_file(best[0]).items())


@pytest.mark.parametrize("steps", [STEPS + 2, STEPS], ids=["in mid-epoch", "before an evaluation"])
def test_a_stopped_run_resumes_to_the_same_ones_bit_for_bit(tiny_betons, tmp_path, steps):
    whole = config(tiny_betons, tmp_path / "whole", epochs=2, ema=0.9)
    parts = replace(whole, out=tmp_path / "parts")
    main(whole)
    main(replace(parts, stop_after_steps=steps))
    main(parts)
    assert_same(whole, parts)


def test_a_signal_in_their_midst_stops_between_two_batches_and_the_resumed_run_estimates_them_anew(
    tiny_betons, tmp_path, noted, monkeypatch
):
    whole = config(tiny_betons, tmp_path / "whole", epochs=2, ema=0.9)
    parts = replace(whole, out=tmp_path / "parts")
    main(whole)
    noted.passes.clear()
    real = build.estimate_statistics

    def signalled(*given):
        *rest, stop = given

        def signalling() -> None:
            if len(noted.estimated) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            stop()

        real(*rest, signalling)

    with monkeypatch.context() as patch:
        patch.setattr(build, "estimate_statistics", signalled)
        with pytest.raises(Terminated):
            main(parts)
    assert noted.estimated == [8, 8]
    at = load_state(parts.out / "last.pt")["progress"]
    assert (at["epoch"], at["batch"]) == (0, STEPS)
    main(parts)
    assert_same(whole, parts)


@pytest.mark.parametrize("synchronised", [False, True])
def test_all_ranks_find_what_one_would(tiny_betons, torchrun, tmp_path, synchronised):
    """Two ranks. Synchronised, each sees a half of the batch of 32; otherwise all of it."""
    (tmp_path / "notes").mkdir()
    settings = ["--train", tiny_betons.train, "--test", tiny_betons.test, "--val", tiny_betons.train, "--out", tmp_path / "run"]
    settings += ["--epochs", 1, "--batch-size", 8, "--resolution", 32, "--seed", 7, "--workers", 1]
    settings += ["--sync-batchnorm"] if synchronised else []
    run = torchrun(rank_statistics.__file__, list(map(str, settings)), tmp_path / "notes")
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    first, second = (torch.load(tmp_path / "notes" / f"estimated-{rank}.pt") for rank in range(2))
    state = load_state(tmp_path / "run" / "last.pt")["model"]
    for key in STATISTICS:
        assert torch.equal(first[key], second[key])
        assert torch.equal(first[key], state[key])
    assert_close(state, expected(state["0.weight"], tiny_betons.train, 1, 32, 1))


def test_fewer_than_no_images_are_wrong_usage(tiny_betons, tmp_path):
    with pytest.raises(UsageError, match="--batchnorm-images must be 0 or more, got -1"):
        check(config(tiny_betons, tmp_path / "run", batchnorm_images=-1))


def test_a_run_that_was_begun_without_them_goes_on_without_and_never_with_them_unasked(tiny_betons, tmp_path, noted):
    settings = config(tiny_betons, tmp_path / "run", batchnorm_images=0)
    main(replace(settings, stop_after_steps=2))
    state = load_state(settings.out / "last.pt")
    del state["settings"]["batchnorm_images"]  # as an older fastretina left it
    save_state(settings.out / "last.pt", state)
    with pytest.raises(RunError, match="batchnorm_images was 0, now 256"):
        main(replace(settings, batchnorm_images=256))
    main(settings)
    assert load_state(settings.out / "last.pt")["progress"]["epoch"] == 1
    assert noted.estimated == []
