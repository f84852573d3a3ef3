"""benchmarks/throughput.py tiny, in which each side is a process of its own. Its numbers mean nothing here."""

from __future__ import annotations

from functools import partial

import pytest
from devices import write_blocks


def test_training_sides_are_compared_one_after_the_other_and_kept_after_every_epoch(tmp_path):
    from throughput import Comparison, ThroughputBenchmark, compare, table

    data = write_blocks(tmp_path / "blocks.beton", 12, 32)
    comparison = Comparison("tiny", "train", "train", 32, ("train_synthetic", "train_fastretina"), batch_size=4)
    kept: list[dict[str, int]] = []

    def keep(found: dict) -> None:
        kept.append({name: side["per_second"]["n"] for name, side in found["sides"].items()})

    found = compare(comparison, ThroughputBenchmark(data, rounds=1), 1, str(tmp_path), alone=True, keep=keep)
    assert found["failed"] == {}
    first = {"train_synthetic": 1}
    assert kept == [{}, first, first, first | {"train_fastretina": 1}]  # of each, the first epoch is not counted
    side = found["sides"]["train_fastretina"]
    assert side["tflops"]["median"] == pytest.approx(side["per_second"]["median"] * side["gflop_per_image"] / 1000)
    assert 0 <= side["wait_share"]["median"] <= 1
    assert "train_synthetic / train_fastretina" in found["ratios"]
    text = table(found)
    assert "TFLOP/s" in text
    assert "CPU cores" in text


def test_a_side_that_fails_is_reported_and_the_others_go_on(tmp_path):
    from throughput import Comparison, ThroughputBenchmark, compare, table

    data = write_blocks(tmp_path / "blocks.beton", 4, 32)
    comparison = Comparison("tiny", "loader", "augment", 32, ("fastretina_gpu_decode", "fastretina_cpu_decode"), batch_size=4)
    found = compare(comparison, ThroughputBenchmark(data, rounds=1), 1, str(tmp_path), alone=True)
    assert list(found["sides"]) == ["fastretina_cpu_decode"]
    assert "decode='gpu' needs device='cuda'" in found["failed"]["fastretina_gpu_decode"]
    assert "failed: " in table(found)


# Stands in for side_process.py: writes far more than a pipe holds, then answers, but for one side never, for another not again.
STAND_IN = """
import json, sys, threading
side = sys.argv[1]
sys.stderr.write("x" * 1_000_000)
for number, answer in enumerate([{"cold_first_batch": 0.5}] + 3 * [{"images": 4, "wall": 2.0, "cpu": 1.0, "private_mb": 1.0}]):
    if number and not sys.stdin.readline():
        break
    if (side, number) in (("pillow", 0), ("torchvision", 2)):
        threading.Event().wait()
    print("\\x1e" + json.dumps(answer), flush=True)
"""


def test_a_side_that_says_a_lot_is_heard_and_one_that_does_not_answer_is_dropped_and_named(tmp_path, monkeypatch):
    import throughput
    from side_process import SideProcess

    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(throughput, "SideProcess", partial(SideProcess, script=str(tmp_path / "stand_in.py")))
    comparison = throughput.Comparison("tiny", "loader", "decode", 32, ("fastretina", "pillow", "torchvision"))
    config = throughput.ThroughputBenchmark(tmp_path / "absent", rounds=2, patience=6)
    found = throughput.compare(comparison, config, 1, str(tmp_path))
    assert {side: result["per_second"]["rounds"] for side, result in found["sides"].items()} == {"fastretina": [2.0, 2.0]}
    for side in ("pillow", "torchvision"):
        assert found["failed"][side].endswith(f"xxx\n{side} gave no answer in 6 s")
        assert f"{side} gave no answer" in throughput.table(found)


def test_training_on_a_gpu_is_the_headline(tmp_path):
    from throughput import ThroughputBenchmark, headline

    config = ThroughputBenchmark(tmp_path / "absent", device="cpu")
    small = ("--resolution", 16, "--steps", 1, "--rounds", 1, "--modes", "off", "--sides", "clone", "--wait-for-data", 0)
    result = headline(config, "resnet18", *small, "--batch-size", 2)
    assert result["ended"] == "complete"
    assert result["settings"]["arch"] == "resnet18"
    assert result["cases"]["batch 2, off, channels_last"]["per_second"]["clone"]["n"] == 1
