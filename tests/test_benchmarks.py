"""The benchmarks for a GPU on a CPU and tiny, so that they work on the day there is one. Their figures mean nothing here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import write_blocks

from fastretina.beton import Beton

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(script: str, *arguments: object) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_photographs_are_whole_files_of_which_no_two_are_alike(tmp_path):
    out = tmp_path / "photographs.beton"
    assert "130 images of 64 px" in run("photographs.py", "--out", out, "--count", 130, "--size", 64)
    beton = Beton(out)
    assert len(beton) == 130
    assert len({hashlib.sha256(beton.jpeg(n)).digest() for n in range(130)}) == 130
    for n in (0, 64, 129):
        beton.verify(n)
    assert beton.labels.min() >= 0
    assert beton.labels.max() <= 4


def test_every_piece_of_the_device_benchmark_runs(tmp_path):
    data = write_blocks(tmp_path / "blocks.beton", 5, 8)
    out = tmp_path / "device.json"
    run("device.py", "--device", "cpu", "--data", data, "--json", out, "--batch-size", 2, "--resolution", 8, "--rounds", 2)
    result = json.loads(out.read_text())
    assert result["roof"]["copy_gb_per_second"]["median"] > 0
    assert 0 < result["kernel"]["all"]["share_of_copy_bandwidth"]["median"] < 1
    assert result["decode"]["torchvision"]["decoded"] == 2
    assert result["decode"]["torchvision"]["within_3_levels"] > 0.99
    assert result["fill"]["cpu"]["samples"] == 5


@pytest.mark.usefixtures("benchmarks")
def test_training_sides_are_compared_one_after_the_other_with_their_share_of_the_roof(tmp_path):
    from throughput import Comparison, ThroughputBenchmark, compare, table

    data = write_blocks(tmp_path / "blocks.beton", 12, 32)
    comparison = Comparison("tiny", "train", "train", 32, ("train_synthetic", "train_cpu_decode"), batch_size=4)
    found = compare(comparison, ThroughputBenchmark(data, rounds=1), 1, str(tmp_path), limit=1.0, alone=True)
    assert found["failed"] == {}
    side = found["sides"]["train_cpu_decode"]
    assert side["share_of_matmul_roof"] == pytest.approx(side["per_second"]["median"] * side["gflop_per_image"] / 1000)
    assert 0 <= side["wait_share"]["median"] <= 1
    assert "train_synthetic / train_cpu_decode" in found["ratios"]
    text = table(found)
    assert "of a matrix product's" in text
    assert "CPU cores" in text


@pytest.mark.usefixtures("benchmarks")
def test_a_side_that_fails_is_reported_and_the_others_go_on(tmp_path):
    from throughput import Comparison, ThroughputBenchmark, compare, table

    data = write_blocks(tmp_path / "blocks.beton", 4, 32)
    comparison = Comparison("tiny", "loader", "augment", 32, ("fastretina_gpu_decode", "fastretina_cpu_decode"), batch_size=4)
    found = compare(comparison, ThroughputBenchmark(data, rounds=1), 1, str(tmp_path), alone=True)
    assert list(found["sides"]) == ["fastretina_cpu_decode"]
    assert "decode='gpu' needs device='cuda'" in found["failed"]["fastretina_gpu_decode"]
    assert "failed: " in table(found)


@pytest.mark.usefixtures("benchmarks")
def test_utilisation_says_why_there_is_none():
    from measure import Utilisation

    with Utilisation("cpu") as busy:
        pass
    assert busy.mean is None
    assert busy.why == "cpu is no CUDA device"


def test_a_timeline_of_training_steps_is_left_in_its_folder(tmp_path):
    data = write_blocks(tmp_path / "blocks.beton", 8, 32)
    sizes = ("--batch-size", 4, "--resolution", 32, "--steps", 2)
    text = run("timeline.py", "--device", "cpu", "--data", data, "--decode", "cpu", "--out", tmp_path / "t", *sizes)
    assert text.startswith("2 steps, ")
    for name in ("wait", "forward", "backward", "optimizer"):
        assert f"ms  {name}\n" in text
    assert (tmp_path / "t" / "profile.json.gz").stat().st_size > 1000


def test_the_gpu_session_goes_on_after_a_step_that_fails_and_says_how_each_ended(tmp_path):
    environment = os.environ | {
        "OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "absent" / "d.beton"), "PYTHON": sys.executable, "DEVICE": "cpu",
        "COUNT": "5", "SIZE": "16", "BATCH": "2", "ROUNDS": "1", "TRITON_INTERPRET": "1",
    }  # fmt: skip
    command = ["bash", str(BENCHMARKS / "gpu_session.sh"), "device", "data", "check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    ended = json.loads((tmp_path / "out" / "session.json").read_text())
    assert {name: step["exit"] for name, step in ended.items()} == {"device": 1, "data": 0, "check": 0}
    assert len(Beton(tmp_path / "absent" / "d.beton")) == 5
    log = (tmp_path / "out" / "session.log").read_text()
    assert '"versions"' in log
    assert [line for line in log.splitlines() if line.startswith("== ")] == ["== device", "== data", "== check"]
    refused = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_session.sh"), "everything"], env=environment, capture_output=True, check=False
    )
    assert refused.returncode == 2


def test_a_gpu_session_without_time_names_what_it_left_out(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "LIMIT": "5", "PYTHON": sys.executable}
    subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_session.sh"), "tests", "train18"], env=environment, check=True, capture_output=True
    )
    ended = json.loads((tmp_path / "session.json").read_text())
    assert {step["exit"] for step in ended.values()} == {"no time left"}
