"""The step profiler on a CPU."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from fastretina.system.tracing import span
from fastretina.training import profiler as profiler_module
from fastretina.training.profiler import StepProfiler
from fastretina.training.run_folder import RunFolder


def train_steps(profiler: StepProfiler, steps: int) -> None:
    model = torch.nn.Linear(16, 4)
    for _ in range(steps):
        with span("forward"):
            loss = model(torch.ones(8, 16)).sum()
        with span("backward"):
            loss.backward()
        profiler.step()


def test_the_steps_after_the_warm_up_are_recorded_with_their_spans(tmp_path):
    with StepProfiler(RunFolder(tmp_path), steps=3, warm_up=2) as profiler:
        train_steps(profiler, 8)
    events = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))["traceEvents"]
    marked = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert marked.count("forward") == marked.count("backward") == 3
    assert "aten::addmm" in profiler.table
    assert profiler.table.startswith("3 steps; ")
    assert " ms  forward\n" in profiler.table
    assert (tmp_path / "profile.txt").read_text() == profiler.table + "\n"
    assert not (tmp_path / ".profile.json").exists()


def test_a_profiler_that_is_off_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(profiler_module, "profile", lambda **_: pytest.fail("started"))
    with StepProfiler(RunFolder(tmp_path), steps=0) as profiler:
        train_steps(profiler, 20)
        assert span("x") is span("y")
    assert list(tmp_path.iterdir()) == []
    assert profiler.table == ""


def test_a_loop_that_ends_early_keeps_what_was_recorded_and_an_error_leaves_nothing(tmp_path):
    for name, error in (("short", None), ("failed", ValueError)):
        folder = tmp_path / name
        folder.mkdir()
        try:
            with StepProfiler(RunFolder(folder), steps=5, warm_up=0) as profiler:
                train_steps(profiler, 2)
                if error is not None:
                    raise error
        except ValueError:
            pass
        assert (folder / "profile.json.gz").exists() is (error is None)
        assert profiler.table.startswith("2 steps; ") is (error is None)
        assert span("after") is span("it")
