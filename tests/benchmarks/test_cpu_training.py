"""The benchmark of training on a CPU, in small: its numbers mean nothing here."""

from __future__ import annotations

import json
from contextlib import ExitStack

import cpu_training
import cpu_training_side
import pytest
import torch
from cpu_training import CpuTraining, compared, main
from cpu_training_side import EpochTask, InMemory, Photographs, side
from PIL import Image
from side_process import SideProcess

from fastretina.errors import UsageError
from fastretina.training import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(tiny_betons) -> EpochTask:
    return EpochTask(str(tiny_betons.train), str(tiny_betons.train_images), "resnet18", 32, 20)


def test_a_step_is_timed_in_every_form(tmp_path):
    out = tmp_path / "cpu.json"
    main(CpuTraining(out, parts=("step",), resolutions=(32,), batches=(2,), threads=(1,), modes=("eager",), rounds=1, seconds=0.0))
    (case,) = json.loads(out.read_text())["step"]
    assert (case["resolution"], case["batch"], case["threads"], case["failed"]) == (32, 2, 1, {})
    forms = {f"{layout}, {kind}, eager" for layout in ("channels_last", "contiguous") for kind in ("float32", "bfloat16")}
    assert case["images_per_second"].keys() == forms
    for told in case["images_per_second"].values():
        assert 0 < told["least"] <= told["median"] <= told["most"]


class Here:
    """Stands in for SideProcess: a side in this process, which need not import torch first."""

    def __init__(self, name: str, task: EpochTask, *_: object) -> None:
        if name.startswith("absent"):
            raise RuntimeError(f"{name} ended: it is none")
        self._stack = ExitStack()
        self._epoch, description = side(name, task, self._stack)
        self.ready = {"description": description}

    def ask(self, question: str) -> dict[str, float]:
        images, seconds = self._epoch()
        return {"images": images, "seconds": seconds}

    def close(self) -> None:
        self._stack.close()


def test_epochs_of_all_sides_are_compared_round_by_round_and_a_side_that_fails_is_named(tiny_betons, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_training, "SideProcess", Here)
    monkeypatch.setattr(build, "bf16_speedup", lambda *_: 0.5)  # which takes seconds to try
    out, sides = tmp_path / "cpu.json", ("fastretina-0-amp", "memory-0-bfloat16", "absent-0-float32")
    settings = {"parts": ("epoch",), "resolutions": (32,), "batch_size": 20, "rounds": 2, "sides": sides}
    main(CpuTraining(out, tiny_betons.train, tiny_betons.train_images, **settings))
    (case,) = json.loads(out.read_text())["epoch"]
    assert {name: len(rates) for name, rates in case["rates"].items()} == dict.fromkeys(sides[:2], 2)
    assert all(rate > 0 for rates in case["rates"].values() for rate in rates)
    assert case["fastest_plain"] == "memory-0-bfloat16"
    assert case["failed"] == {"absent-0-float32": "absent-0-float32 ended: it is none"}
    shown = capsys.readouterr().out
    assert "<- fastest plain loop" in shown
    assert "absent-0-float32: left out" in shown


def test_a_side_is_a_process_that_trains_for_an_epoch_when_asked(task):
    process = SideProcess("pillow-0-float32", task, script=cpu_training_side.__file__)
    try:
        assert process.ready["description"] == "torch's DataLoader, 0 workers, float32"
        assert process.ask("epoch")["images"] == 40
    finally:
        process.close()


def test_fastretina_is_compared_with_the_fastest_plain_loop_whose_rounds_are_over():
    found = compared({"fastretina-0-amp": [20.0, 30.0], "pillow-0-bfloat16": [10.0], "memory-0-bfloat16": [16.0, 15.0]})
    assert found["fastest_plain"] == "memory-0-bfloat16"
    assert found["times_the_fastest_plain"]["least"] == 20 / 16
    assert found["times_the_fastest_plain"]["most"] == 30 / 15
    assert found["times_plain"]["pillow-0-bfloat16"]["median"] == 2
    assert "fastest_plain" not in compared({"fastretina-0-amp": [20.0]})


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


def test_photographs_that_are_not_the_betons_are_refused(tiny_betons, task, tmp_path):
    with pytest.raises(UsageError, match="40 of 40 images"):
        Photographs(EpochTask(task.data, str(tmp_path), task.arch, 32, 20))
    with pytest.raises(UsageError, match="--images"):
        main(CpuTraining(data=tiny_betons.train))
