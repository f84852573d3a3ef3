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
