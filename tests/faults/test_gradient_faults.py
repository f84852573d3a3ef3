"""Losses and gradients that are not finite: a scaler skips what will pass, the rest stops with step and samples, saving nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fork_runs import Tiny

from fastretina.errors import RunError
from fastretina.models import heads
from fastretina.models.precision import Precision
from fastretina.report.run import RunPictures
from fastretina.train import main
from fastretina.training import build
from fastretina.training.config import TrainConfig
from fastretina.training.state import load_state

FIRST = 8  # the step, from 1, from which on gradients or losses are spoilt: in the second epoch of five steps each


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_model", lambda *_, **__: Tiny())
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Multiply the loss (not finite) or its gradients alone (infinite) from step FIRST on, for so many steps."""

    def arrange(steps: int, factor: float) -> None:
        count = [0]
        real = heads.Loss.__call__

        def spoilt(self: heads.Loss, logits: torch.Tensor, labels: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            loss = real(self, logits, labels, total)
            count[0] += 1
            if not FIRST <= count[0] < FIRST + steps:
                return loss
            if factor != factor:
                return loss * factor
            logits.register_hook(lambda gradient: gradient * factor)
            return loss

        monkeypatch.setattr(heads.Loss, "__call__", spoilt)

    return arrange


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient scaler of float16, at work on the CPU."""
    monkeypatch.setattr(Precision, "scaler", lambda precision: torch.amp.GradScaler("cpu"))


def config(tiny_betons, out: Path, **changes: object) -> TrainConfig:
    settings = {"epochs": 8, "batch_size": 8, "resolution": 32, "seed": 7, "workers": 1, "val_fraction": 0} | changes
    return TrainConfig(train=tiny_betons.train, test=tiny_betons.test, out=out, **settings)


@pytest.mark.parametrize("steps", [1, 10])
def test_the_scaler_skips_infinite_gradients_and_the_run_goes_on(tiny_betons, tmp_path, scaled, spoil, steps, tried) -> None:
    spoil(steps, float("inf"))
    assert main(config(tiny_betons, tmp_path / "run")) == 0
    state = load_state(tmp_path / "run" / "last.pt")
    assert all(bool(torch.isfinite(value).all()) for value in state["model"].values())
    assert state["progress"]["step"] == 40
    assert state["optimizer"]["state"][0]["step"] == 40 - steps
    tried(f"training: infinite gradients for {steps} steps, skipped by the scaler")


def test_gradients_that_stay_infinite_stop_the_run_with_step_and_samples(tiny_betons, tmp_path, scaled, spoil, tried) -> None:
    spoil(100, float("inf"))
    with pytest.raises(RunError, match=r"gradients are infinite in epoch 5 up to step 24, sample ids \d+(, \d+){7},"):
        main(config(tiny_betons, tmp_path / "run"))
    assert load_state(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 4
    tried("training: infinite gradients for 100 steps, stopped with step and sample ids")


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_at_once(
    tiny_betons, tmp_path, monkeypatch, spoil, steps, with_scaler, tried
) -> None:
    if with_scaler:
        monkeypatch.setattr(Precision, "scaler", lambda precision: torch.amp.GradScaler("cpu"))
    spoil(steps, float("nan"))
    with pytest.raises(RunError, match=rf"loss is nan in epoch 2 at step {FIRST}, sample ids \d+(, \d+){{7}}\."):
        main(config(tiny_betons, tmp_path / "run"))
    assert load_state(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 1
    tried("training: loss not finite, stopped with step and sample ids")


def test_without_a_scaler_infinite_gradients_stop_the_run_at_the_next_step(tiny_betons, tmp_path, spoil, tried) -> None:
    spoil(1, float("inf"))
    with pytest.raises(RunError, match=rf"loss is nan in epoch 2 at step {FIRST + 1}, sample ids"):
        main(config(tiny_betons, tmp_path / "run"))
    assert load_state(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 1
    tried("training: infinite gradients without a scaler, stopped with step and sample ids")


def test_spoilt_weights_are_never_saved_over_good_ones(tiny_betons, tmp_path, spoil, tried) -> None:
    """Asked to stop right after the step that spoilt them, before any loss could show it."""
    spoil(1, float("inf"))
    with pytest.raises(RunError, match=rf"weights contain NaN or Inf after step {FIRST}: not saved"):
        main(config(tiny_betons, tmp_path / "run", stop_after_steps=FIRST))
    assert load_state(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 1
    tried("training: spoilt weights at a save, refused")
