"""The benchmark of training on a CPU, in small: its numbers mean nothing here."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from cpu_training import CpuTraining, compared, main
from cpu_training_side import EpochTask, InMemory, Photographs, side
from PIL import Image

from fastretina.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_step_is_timed_in_every_form(tmp_path):
    out = tmp_path / "cpu.json"
    main(CpuTraining(out, parts=("step",), resolutions=(32,), batches=(2,), threads=(1,), modes=("eager",), rounds=2, seconds=0.0))
    (case,) = json.loads(out.read_text())["step"]
    assert (case["resolution"], case["batch"], case["threads"], case["failed"]) == (32, 2, 1, {})
    forms = {f"{layout}, {kind}, eager" for layout in ("channels_last", "contiguous") for kind in ("float32", "bfloat16")}
    assert case["images_per_second"].keys() == forms
    for told in case["images_per_second"].values():
        assert 0 < told["least"] <= told["median"] <= told["most"]


def test_epochs_are_compared_round_by_round_and_a_side_that_fails_is_named(tiny_betons, tmp_path, capsys):
    out, sides = tmp_path / "cpu.json", ("fastretina-0-amp", "pillow-1-float32", "unknown-0-float32")
    main(CpuTraining(
        out, tiny_betons.train, tiny_betons.train_images, parts=("epoch",), resolutions=(32,), batch_size=8, rounds=2, sides=sides
    ))  # fmt: skip
    (case,) = json.loads(out.read_text())["epoch"]
    assert {name: len(rates) for name, rates in case["rates"].items()} == dict.fromkeys(sides[:2], 2)
    assert case["fastest_plain"] == "pillow-1-float32"
    assert "KeyError" in case["failed"]["unknown-0-float32"]
    shown = capsys.readouterr().out
    assert "<- fastest plain loop" in shown
    assert "unknown-0-float32: left out" in shown


def test_fastretina_is_compared_with_the_fastest_plain_loop_whose_rounds_are_over():
    found = compared({"fastretina-0-amp": [20.0, 30.0], "pillow-0-bfloat16": [10.0], "memory-0-bfloat16": [16.0, 15.0]})
    assert found["fastest_plain"] == "memory-0-bfloat16"
    assert found["times_the_fastest_plain"]["least"] == 20 / 16
    assert found["times_the_fastest_plain"]["most"] == 30 / 15
    assert found["times_plain"]["pillow-0-bfloat16"]["median"] == 2
    assert "fastest_plain" not in compared({"fastretina-0-amp": [20.0]})


@pytest.fixture
def task(tiny_betons) -> EpochTask:
    return EpochTask(str(tiny_betons.train), str(tiny_betons.train_images), "resnet18", 32, 8)


def test_both_plain_data_sets_hold_the_photographs_of_the_beton_with_their_grades(tiny_betons, task):
    read, kept = Photographs(task), InMemory(task)
    assert read.labels == kept.labels == [n % 5 for n in range(40)]
    with Image.open(tiny_betons.train_images / "1_right.jpeg") as image:
        assert (
            abs(
                kept.images[3].float().mean(dim=(1, 2)) - torch.tensor(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
            ).max()
            < 3
        )
    for data in (read, kept):
        images, label = data[3]
        assert (images.shape, images.dtype, label) == ((3, 32, 32), torch.float32, 3)


@pytest.mark.parametrize("name", ["fastretina-0-float32", "memory-0-bfloat16"])
def test_each_call_trains_for_one_epoch(task, name):
    with ExitStack() as stack:
        epoch, _ = side(name, task, stack)
        for _ in range(2):
            images, seconds = epoch()
            assert images == 40
            assert seconds > 0


def test_photographs_that_are_not_the_betons_are_refused(tiny_betons, task, tmp_path):
    with pytest.raises(UsageError, match="40 of 40 images"):
        Photographs(EpochTask(task.data, str(tmp_path), task.arch, 32, 8))
    with pytest.raises(UsageError, match="--images"):
        main(CpuTraining(data=tiny_betons.train))
