"""The step profiler on a CPU, and its reading of a timeline with streams."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from fastretina.system.tracing import span
from fastretina.training import profiler as profiler_module
from fastretina.training.profiler import StepProfiler, Timeline, common, union


def train_steps(profiler: StepProfiler, steps: int) -> None:
    model = torch.nn.Linear(16, 4)
    for _ in range(steps):
        with span("forward"):
            loss = model(torch.ones(8, 16)).sum()
        with span("backward"):
            loss.backward()
        profiler.step()


def test_the_steps_after_the_warm_up_are_recorded_with_their_spans(tmp_path):
    with StepProfiler(tmp_path, steps=3, warm_up=2) as profiler:
        train_steps(profiler, 8)
    events = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))["traceEvents"]
    marked = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert marked.count("forward") == marked.count("backward") == 3
    assert "aten::addmm" in profiler.table
    assert profiler.table.startswith("3 steps, ")
    assert (tmp_path / "profile.txt").read_text() == profiler.table + "\n"
    assert not (tmp_path / ".profile.json").exists()


def test_a_profiler_that_is_off_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(profiler_module, "profile", lambda **_: pytest.fail("started"))
    with StepProfiler(tmp_path, steps=0) as profiler:
        train_steps(profiler, 20)
        assert span("x") is span("y")
    assert list(tmp_path.iterdir()) == []
    assert profiler.table == ""


def test_a_loop_that_ends_early_keeps_what_was_recorded_and_an_error_leaves_nothing(tmp_path):
    for name, error in (("short", None), ("failed", ValueError)):
        folder = tmp_path / name
        folder.mkdir()
        try:
            with StepProfiler(folder, steps=5, warm_up=0) as profiler:
                train_steps(profiler, 2)
                if error is not None:
                    raise error
        except ValueError:
            pass
        assert (folder / "profile.json.gz").exists() is (error is None)
        assert span("after") is span("it")


def test_the_timeline_says_how_much_of_each_stream_ran_beside_the_busiest():
    def kernel(name: str, stream: int, start: float, duration: float) -> dict[str, object]:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}

    events = [
        kernel("conv", 7, 0, 60), kernel("conv", 7, 50, 50), kernel("bn", 7, 200, 100),
        kernel("warp", 13, 90, 20), kernel("warp", 13, 250, 20),
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 120, "dur": 40, "args": {"stream": 17}},
        {"ph": "X", "cat": "user_annotation", "name": "wait", "ts": 0, "dur": 30},
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    found = Timeline.of(events)
    assert found.streams == pytest.approx({"stream 7": 200e-6, "stream 13": 40e-6, "stream 17": 40e-6})
    assert found.overlaps == pytest.approx({"stream 13": 30 / 40, "stream 17": 0.0})
    assert found.kernels == pytest.approx({"conv": 110e-6, "bn": 100e-6, "warp": 40e-6, "copy": 40e-6})
    assert found.wall == pytest.approx(300e-6)
    text = found.table(steps=2)
    assert "stream 13: busy  13.3% of the time, 75.0% of it beside the busiest stream" in text
    assert "0.015 ms  wait" in text


def test_intervals_join_and_intersect():
    joined = union([(5, 6), (0, 2), (1, 3), (3, 4)])
    assert joined == [(0, 4), (5, 6)]
    assert common(joined, [(1, 2), (3, 5.5)]) == pytest.approx(1 + 1 + 0.5)
    assert union([]) == []
    assert common([], joined) == 0
