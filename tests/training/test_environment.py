"""How exact a resume is: bit for bit where the same things compute it, and a line says what does not where others do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import rank_run
import torch
from test_train import config

from fastretina.report.run import RunPictures
from fastretina.train import main
from fastretina.training import build, environment
from fastretina.training.config import TrainConfig
from fastretina.training.distributed import World
from fastretina.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stopped(tiny_betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run that was stopped in its second epoch."""
    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: rank_run.Tiny(outputs))
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)
    settings = config(tiny_betons, tmp_path / "run", epochs=2)
    main(replace(settings, stop_after_steps=7))
    return settings


def test_state_and_metrics_hold_what_the_weights_depend_on(stopped):
    known = load_state(stopped.out / "last.pt")["environment"]
    assert known == environment.environment(World()) == json.loads((stopped.out / "metrics.json").read_text())["environment"]
    assert {"torch", "numba", "numpy", "simplejpeg", "opencv", "threads", "ranks", "device"} <= known.keys()
    assert known["threads"] == 1
    assert "thread" not in known["device"]


def test_a_resume_with_other_threads_says_in_one_line_that_its_weights_will_differ(stopped, capsys):
    torch.set_num_threads(2)
    main(stopped)
    lines = [line for line in capsys.readouterr().err.splitlines() if "threads" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{stopped.out / 'last.pt'}: goes on with the same samples in the same order, but")
    assert lines[0].endswith("(threads: was 1, now 2)")


def test_a_resume_where_the_same_things_compute_says_nothing_of_them(stopped, capsys):
    main(stopped)
    assert "goes on with the same" not in capsys.readouterr().err


def test_instructions_and_versions_are_named_where_they_differ(monkeypatch):
    before = environment.environment(World())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(environment, "get_host_cpu_features", lambda: "+avx2,-fma,-avx512f")
    monkeypatch.setattr(environment.numba, "__version__", "0.1")
    note = environment.resume_note(before, environment.environment(World(size=2)))
    assert note is not None
    for part in ("ranks: was 1, now 2", "torch's instructions: was ", "now DEFAULT", "now avx2", "numba: was ", "now 0.1"):
        assert part in note
    monkeypatch.setattr(environment.numba.config, "CPU_FEATURES", "+sse2")
    assert environment.environment(World())["the loader's instructions"] == "none of these"
    assert environment.resume_note(before, before) is None
    assert "threads: was unknown, now " in environment.resume_note({}, before)
