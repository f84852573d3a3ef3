"""Several ranks, started by torchrun on CPUs (gloo): they train what one rank trains, and end together."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_run
import torch
from forked_torchrun import ForkedTorchrun

from fastretina import Loader, train
from fastretina.errors import UsageError
from fastretina.report.run import RunPictures
from fastretina.training import build, loop
from fastretina.training.config import TrainConfig, as_settings
from fastretina.training.distributed import World
from fastretina.training.state import load_state
from fastretina.training.sync_batchnorm import CpuSyncBatchNorm, synchronise_batchnorm

EPOCHS = 13
BATCH = 13  # 40 images: three batches of 13 and one of 1, of which most ranks have nothing
STEPS = 4 * EPOCHS
TIMINGS = {"images_per_second", "data_wait_seconds", "train_seconds", "epoch_seconds"}


def config(tiny_betons, out: Path, **changes) -> TrainConfig:
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "resolution": 32, "lr": 1e-2, "seed": 7, "workers": 1, "val_fraction": 0}
    settings |= {"class_weights": "sqrt", "ema": 0.9, "sync_batchnorm": True, "schedule": "two-phase"}
    settings |= {
        "freeze_epochs": 1,
        "weights": "given.pth",
        "val": tiny_betons.train,
    }  # the stand-in for build_model reads no weights
    return TrainConfig(train=tiny_betons.train, test=tiny_betons.test, out=out, **settings | changes)


class Ranks:
    """torchrun at work on a training run, and what its ranks noted. forked: where it is not the program itself."""

    def __init__(self, settings: TrainConfig, forked: ForkedTorchrun | None = None, ranks: int = 2, **options: Any) -> None:
        assert settings.out is not None
        self.out, self._steps = settings.out, settings.out.with_suffix(".steps")
        self._steps.mkdir()
        flags: list[str] = []
        for name, value in as_settings(settings).items():
            if value is not None:
                flag = f"--{name.replace('_', '-')}"
                flags += [flag if value else f"--no-{name.replace('_', '-')}"] if isinstance(value, bool) else [flag, str(value)]
        if forked is not None:
            self.process = forked(rank_run.__file__, flags, self._steps, ranks, **options)
            return
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", rank_run.__file__, *flags],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FASTRETINA_STEPS": str(self._steps)},
        )  # fmt: skip

    def wait(self) -> Ranks:
        self.output, self.errors = self.process.communicate(timeout=240)
        return self

    @property
    def notes(self) -> list[list[dict]]:
        """What each rank noted, by rank."""
        return [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(self._steps.iterdir(), key=lambda path: int(path.name))
        ]

    @property
    def steps(self) -> tuple[list[list[int]], list[float]]:
        """Sample ids of each global batch, in its order, and its loss."""
        ids, losses = [], []
        for parts in zip(*self.notes, strict=True):
            batch = [0] * sum(len(part["ids"]) for part in parts)
            for rank, part in enumerate(parts):
                batch[rank :: len(parts)] = part["ids"]
            ids.append(batch)
            losses.append(sum(part["loss"] for part in parts) / len(parts))
        return ids, losses

    @property
    def errors_shown(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


@contextmanager
def small_network() -> Iterator[pytest.MonkeyPatch]:
    """The same small network for runs in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_model", lambda arch, outputs, **_: rank_run.Tiny(outputs))
        patch.setattr(build, "load_initial", lambda *_: "given")
        patch.setattr(RunPictures, "finish", lambda pictures: None)
        yield patch
    torch.set_num_threads(before)


@pytest.fixture
def small():
    with small_network():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(tiny_betons, root) -> Ranks:
    """An undisturbed run of two ranks, as a user starts it."""
    return Ranks(config(tiny_betons, root / "two")).wait()


@pytest.fixture(scope="module")
def four(tiny_betons, root, torchrun) -> Ranks:
    """An undisturbed run of four ranks."""
    return Ranks(config(tiny_betons, root / "four"), torchrun, 4).wait()


@pytest.fixture(scope="module")
def alone(tiny_betons, root) -> tuple[list[list[int]], list[float], Path]:
    """Sample ids and loss of each step of the run of one rank, without torchrun; its folder."""
    with small_network() as patch:
        ids, losses = noted_steps(patch)
        train.main(config(tiny_betons, root / "alone"))
    return ids, losses, root / "alone"


def noted_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[float]]:
    ids: list[list[int]] = []
    losses: list[float] = []
    add = loop.Tally.add

    def noting(tally, step, loss, *rest):
        ids.append(rest[-1].tolist())
        losses.append(float(loss))
        add(tally, step, loss, *rest)

    monkeypatch.setattr(loop.Tally, "add", noting)
    return ids, losses


def table(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMINGS} for row in csv.DictReader(file)]


def test_any_number_of_ranks_takes_the_same_batches_and_has_the_same_losses(alone, two, four):
    """52 steps, BatchNorm synchronised, class weights, a last batch of one image."""
    ids, losses, folder = alone
    assert len(losses) == STEPS
    for run in (two, four):
        assert run.process.returncode == 0, run.errors
        assert run.steps[0] == ids
        assert run.steps[1] == pytest.approx(losses, rel=0, abs=1e-5)
        for mine, theirs in zip(table(folder), table(run.out), strict=True):
            for key, value in mine.items():
                assert float(theirs[key]) == pytest.approx(float(value), abs=1e-4), key
    assert any(not part["ids"] for part in four.notes[3])


def test_every_sample_comes_exactly_once_an_epoch_over_all_ranks(two, four):
    for run in (two, four):
        ids = run.steps[0]
        for epoch in range(EPOCHS):
            assert sorted(number for batch in ids[4 * epoch : 4 * epoch + 4] for number in batch) == list(range(40))
        metrics = json.loads((run.out / "metrics.json").read_text())
        assert sum(map(sum, metrics["train"]["last"]["confusion"])) == 40


def test_the_test_set_is_divided_over_the_ranks_and_comes_together_in_the_order_of_the_file(alone, two, four):
    with (alone[2] / "predictions.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    for run in (two, four):
        with (run.out / "predictions.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        assert [(row["id"], row["name"], row["grade"]) for row in found] == [
            (row["id"], row["name"], row["grade"]) for row in expected
        ]
        for row, other in zip(found, expected, strict=True):
            assert float(row["p0"]) == pytest.approx(float(other["p0"]), abs=1e-3)


def test_rank_0_alone_speaks_and_says_how_the_batch_is_divided(two):
    assert two.output.count("fastretina 0") == 1
    assert two.output.count(f"epoch {EPOCHS}/{EPOCHS}") == 1
    assert "step       13 images: 2 ranks of 7 images, BatchNorm over all ranks" in two.output
    assert two.errors_shown == []


def test_a_killed_rank_ends_all_within_60_s_and_the_restart_comes_to_the_weights_of_the_undisturbed_run(
    tiny_betons, root, torchrun, two
):
    killed = Ranks(config(tiny_betons, root / "killed"), torchrun, fault="kill", restarts=1).wait()
    assert killed.process.returncode == 0, killed.errors
    survivor, victim = killed.notes
    before, after = ([note for note in survivor if (note["pid"] == survivor[0]["pid"]) == first] for first in (True, False))
    assert [note["step"] for note in victim if note["pid"] == victim[0]["pid"]] == list(range(1, 9))
    assert [note["step"] for note in after] == list(range(9, STEPS + 1))
    # torchrun starts again when all are gone: this is the time until then, and that of importing torch and of a first step.
    assert after[0]["time"] - before[-1]["time"] < 60
    assert len(killed.errors_shown) == 1
    assert killed.errors_shown[0].startswith("error: rank 0: another rank is gone")
    assert "resuming   epoch 3, after step 8" in killed.output
    first, second = (load_state(run.out / "last.pt") for run in (two, killed))
    for part in ("model", "average"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())
    assert table(two.out) == table(killed.out)


def test_sigterm_to_torchrun_saves_one_state_of_all_ranks_from_which_one_rank_goes_on(
    tiny_betons, root, torchrun, small, monkeypatch, alone
):
    settings = config(tiny_betons, root / "stopped")
    stopped = Ranks(settings, torchrun, fault="slow")
    until = time.monotonic() + 120
    while not any(stopped.out.with_suffix(".steps").iterdir()) and time.monotonic() < until:
        time.sleep(0.1)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.wait()
    assert stopped.errors_shown == []
    state = load_state(settings.out / "last.pt")
    done = state["progress"]["step"]
    assert 0 < done < STEPS
    assert [notes[-1]["step"] for notes in stopped.notes] == [done, done]
    assert len(state["progress"]["tally"]["labels"]) == sum(map(len, stopped.steps[0][done - state["progress"]["batch"] :]))
    ids, losses = noted_steps(monkeypatch)
    train.main(settings)
    assert stopped.steps[0] + ids == alone[0][:STEPS]
    assert stopped.steps[1] + losses == pytest.approx(alone[1][:STEPS], rel=0, abs=1e-5)
    assert sum(map(sum, json.loads((settings.out / "metrics.json").read_text())["train"]["last"]["confusion"])) == 40


def test_a_loss_that_one_rank_alone_finds_not_finite_ends_all_with_one_error_that_names_the_whole_batch(
    tiny_betons, root, torchrun
):
    broken = Ranks(config(tiny_betons, root / "broken"), torchrun, fault="nan").wait()
    assert broken.process.returncode == 1
    assert len(broken.errors_shown) == 1
    assert "the loss is nan in epoch 3 at step 9, sample ids" in broken.errors_shown[0]
    assert broken.errors_shown[0].count(", ") >= BATCH
    assert load_state(broken.out / "last.pt")["progress"]["epoch"] == 2


def test_a_usage_error_is_shown_once_and_every_rank_exits_with_2(tiny_betons, root, torchrun):
    wrong = Ranks(config(tiny_betons, root / "wrong", epochs=0), torchrun).wait()
    assert wrong.errors_shown in (
        [f"error: rank {rank}: --epochs must be 1 or more, got 0"] for rank in (0, 1)
    )  # fmt: skip
    # torchrun's own exit code is 1 whatever its processes' are; those it lists.
    assert wrong.process.returncode == 1
    assert wrong.errors.count("exitcode  : 2") == 2
    assert not wrong.out.exists()


@pytest.mark.parametrize("head", ["softmax", "regression", "ordinal"])
def test_accumulation_gives_the_losses_of_whole_batches(tiny_betons, tmp_path, small, monkeypatch, head):
    """Of a network without BatchNorm, which normalises each micro-batch by itself."""

    class Plain(torch.nn.Sequential):
        def __init__(self, outputs: int) -> None:
            super().__init__(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, outputs))

    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: Plain(outputs))
    whole = config(tiny_betons, tmp_path / "whole", epochs=3, head=head, class_weights="balanced", sync_batchnorm=False)
    ids, losses = noted_steps(monkeypatch)
    train.main(whole)
    right = list(ids), list(losses)
    assert losses[0] != losses[1]
    for accumulate in (2, 5):
        ids.clear()
        losses.clear()
        train.main(replace(whole, out=tmp_path / f"in-{accumulate}", accumulate=accumulate))
        assert ids == right[0]
        assert losses == pytest.approx(right[1], rel=0, abs=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("sampling", ["shuffle", "sequential", "balanced"])
def test_the_parts_of_all_ranks_are_the_batches_of_one(tiny_betons, world_size, sampling):
    settings = {"batch_size": 9, "resolution": 16, "workers": 1, "sampling": sampling, "seed": 3}
    with Loader(tiny_betons.train, **settings) as whole:
        expected = list(whole)
    parts = []
    for rank in range(world_size):
        with Loader(tiny_betons.train, **settings, rank=rank, world_size=world_size) as loader:
            parts.append(list(loader))
            assert len(loader) == len(expected) == len(parts[-1])
            assert len(loader.positions) == sum(len(batch.ids) for batch in parts[-1])
    for number, batch in enumerate(expected):
        for rank in range(world_size):
            part = parts[rank][number]
            assert torch.equal(part.ids, batch.ids[rank::world_size])
            assert torch.equal(part.images, batch.images[rank::world_size])


def test_a_loader_goes_on_with_another_number_of_ranks(tiny_betons):
    settings = {"batch_size": 9, "resolution": 16, "workers": 1}
    with Loader(tiny_betons.train, **settings) as whole:
        expected = [batch.ids.tolist() for batch in whole]
    with Loader(tiny_betons.train, **settings, rank=1, world_size=2) as loader:
        iterator = iter(loader)
        next(iterator), next(iterator)
        state = loader.state_dict()
    with Loader(tiny_betons.train, **settings, rank=2, world_size=3) as loader:
        loader.load_state_dict(state)
        assert [batch.ids.tolist() for batch in loader] == [ids[2::3] for ids in expected[2:]]


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (0, 10)])
def test_ranks_that_cannot_be_are_refused(tiny_betons, rank, world_size):
    with pytest.raises(UsageError, match="rank"):
        Loader(tiny_betons.train, batch_size=9, rank=rank, world_size=world_size)


def test_every_batchnorm_is_replaced_and_keeps_weights_and_statistics():
    model = torch.nn.Sequential(rank_run.Tiny(5), torch.nn.BatchNorm2d(3))
    torch.nn.init.normal_(model[1].running_mean)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model = synchronise_batchnorm(model, torch.device("cpu")).eval()
    assert sum(isinstance(module, CpuSyncBatchNorm) for module in model.modules()) == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_without_torchrun_there_is_no_process_group(tiny_betons, tmp_path, small):
    train.main(config(tiny_betons, tmp_path / "run", epochs=1))
    assert not torch.distributed.is_initialized()
    model = rank_run.Tiny(5)
    assert World().wrap(model) is model
    assert World().gather(3) == [3]
    assert World().decided(lambda: 4) == World().largest(4) == 4


def test_the_learning_rate_is_scaled_by_the_global_batch_and_printed(tiny_betons, tmp_path, small, capsys):
    settings = config(tiny_betons, tmp_path / "run", epochs=1, scale_lr=True, accumulate=3, schedule="constant")
    train.main(settings)
    output = capsys.readouterr().out
    assert "rate       0.000507813 = --lr 0.01 x 13 / 256" in output
    assert "step       13 images: 1 rank, in 3 micro-batches of 5" in output
    assert float(table(settings.out)[0]["lr"]) == pytest.approx(0.01 * 13 / 256, rel=1e-5)
