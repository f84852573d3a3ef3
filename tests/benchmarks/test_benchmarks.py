"""The benchmarks for a GPU on a CPU and tiny, so that they work on the day there is one. Their numbers mean nothing here."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import write_blocks

from fastretina.beton.reader import Beton

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def test_every_piece_of_the_engine_benchmark_runs(tmp_path):
    pieces = ("errors", "memory", "opening", "shards", "remote", "processes")
    data, out = write_blocks(tmp_path / "blocks.beton", 40, 64), tmp_path / "engine.json"
    small = ("--samples", 2000, "--rounds", 1, "--batches", 2, "--seconds", 0.05)
    run("engine.py", "--only", *pieces, *small, "--data", data, "--json", out)
    result = json.loads(out.read_text())
    assert result["errors"]["seconds_until_an_error_arrives"]["errors"] == 20
    assert set(result["memory"]["private_mb"]) == {"4000", "40000"}
    assert result["opening"]["samples"] == 2000
    assert set(result["shards"]["seconds_to_open"]) == {"warm", "cold"}
    assert result["remote"]["ratio"]["n"] == 1
    assert "together" in result["processes"]["decode"]["images_per_second"]


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


def test_a_device_benchmark_that_fails_leaves_what_it_had_measured(tmp_path):
    out, flags = tmp_path / "new" / "device.json", ("--device", "cpu", "--rounds", "1", "--only", "roof", "decode")
    command = [sys.executable, str(BENCHMARKS / "device.py"), *flags, "--data", str(tmp_path / "absent"), "--json", str(out)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    result = json.loads(out.read_text())
    assert result["roof"]["matmul_tflops"]["median"] > 0
    assert "absent" in result["decode"]["failed"]


def test_the_stages_of_an_image_and_the_loaders_share_of_the_limits_are_told(tmp_path):
    data, out = write_blocks(tmp_path / "blocks.beton", 12, 32), tmp_path / "stages.json"
    said = run("stages.py", "--data", data, "--json", out, "--rounds", 1, "--workers", 2)
    result = json.loads(out.read_text())
    assert {"read and checksum", "decode to RGB", "store a float32 row alone"} <= set(result["microseconds"])
    assert all(found["median"] > 0 for found in (*result["microseconds"].values(), *result["per_second"].values()))
    decoded, limit = (result["per_second"][name]["median"] for name in ("Loader, decode", "decoding alone"))
    assert result["shares"]["Loader, decode"]["decoding alone"]["median"] == pytest.approx(decoded / limit)
    assert "% of its stages alone" in said


def test_threads_that_sleep_instead_of_decoding_show_what_a_loader_and_a_step_take_from_each_other(tmp_path):
    data, out = write_blocks(tmp_path / "blocks.beton", 256, 16), tmp_path / "threads.json"
    run("many_threads.py", "--data", data, "--json", out, "--threads", 4, "--decode-us", 500, "--batches", 8, "--rounds", 1)
    result = json.loads(out.read_text())
    # Nobody is faster than four threads that sleep for 0.5 ms each, but for the 3 of 8 batches that were ready before the clock.
    assert all(0 < rates["median"] <= 4 / 0.5e-3 * 8 / 5 for rates in result["images_per_second"].values())
    loader, bare = (result["images_per_second"][name]["median"] for name in ("loader", "bare threads"))
    assert result["of_bare_threads"]["loader"]["median"] == pytest.approx(loader / bare)
    assert all(taken["median"] > 0 for taken in result["step_ms"].values())


def test_a_save_that_is_killed_leaves_the_result_before_it(tmp_path, monkeypatch):
    from measure import save

    path = tmp_path / "new" / "out.json"
    save(path, {"number": 1})
    assert json.loads(path.read_text())["hardware"]["cores"] >= 1

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(path, {"number": 2})
    assert json.loads(path.read_text())["number"] == 1


def test_utilisation_says_why_there_is_none():
    from measure import Utilisation

    with Utilisation("cpu") as busy:
        pass
    assert busy.mean is None
    assert busy.why == "cpu is no CUDA device"


def session(tmp_path: Path, *steps: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "absent" / "d.beton"), "PYTHON": sys.executable, "DEVICE": "cpu",
        "COUNT": "5", "SIZE": "16", "BATCH": "2", "ROUNDS": "1", "TRITON_INTERPRET": "1", "TMPDIR": str(tmp_path),
    }  # fmt: skip
    command = ["bash", str(BENCHMARKS / "gpu_session.sh"), *steps]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment | changes)


def exits(tmp_path: Path) -> dict[str, int | str]:
    return {name: step["exit"] for name, step in json.loads((tmp_path / "out" / "session.json").read_text()).items()}


def test_a_timeline_of_training_is_left_compressed_and_its_table_is_in_the_log(tmp_path):
    data = write_blocks(tmp_path / "blocks.beton", 32, 32)
    assert session(tmp_path, "timeline", DATA=str(data), SIZE="32").returncode == 0
    assert exits(tmp_path) == {"timeline-cpu": 0}
    trace = gzip.decompress((tmp_path / "out" / "timeline-cpu.json.gz").read_bytes())
    assert {event["name"] for event in json.loads(trace)["traceEvents"]} >= {"wait", "forward", "backward", "optimizer"}
    assert "5 steps; of each, on the host" in (tmp_path / "out" / "session.log").read_text()


def stand_in(tmp_path: Path, does: str) -> str:
    """A PYTHON that notes how it is called and what session.json says by then."""
    script = tmp_path / "python"
    trace = tmp_path / "trace"
    script.write_text(f'#!/bin/sh\necho "$1 $*" >>{trace}\ncat "$OUT/session.json" >>{trace}\n{does}\n')
    script.chmod(0o755)
    return str(script)


def test_the_gpu_session_goes_on_after_a_step_that_fails_and_says_how_each_ended(tmp_path):
    done = session(tmp_path, "device", "data", "check")
    assert done.returncode == 0, done.stderr
    assert exits(tmp_path) == {"device": 1, "data": 0, "check": 0}
    assert len(Beton(tmp_path / "absent" / "d.beton")) == 5
    log = (tmp_path / "out" / "session.log").read_text()
    assert '"versions"' in log
    assert [line for line in log.splitlines() if line.startswith("== ")] == ["== device", "== check", "== data"]
    assert session(tmp_path, "everything").returncode == 2


def test_a_gpu_session_says_how_a_step_ended_as_soon_as_it_has(tmp_path):
    python = stand_in(tmp_path, 'case "$*" in *timeline*) exit 3;; esac')
    assert session(tmp_path, "timeline", "run", PYTHON=python).returncode == 0
    _, first, second = (tmp_path / "trace").read_text().split("-m -m fastretina.train")
    assert '"timeline-cpu": {"exit": "under way"' in first
    assert '"timeline-cpu": {"exit": 3' in second
    assert '"run": {"exit": "under way"' in second
    assert exits(tmp_path) == {"timeline-cpu": 3, "run": 0}


def test_a_second_gpu_session_appends_to_the_log_of_the_first_and_names_what_it_had_no_time_for(tmp_path):
    for _ in range(2):
        session(tmp_path, "tests", "headline18", LIMIT="5")
    found = exits(tmp_path)
    assert {"test_device_stage", "headline18"} <= found.keys()
    assert set(found.values()) == {"no time left"}
    log = (tmp_path / "out" / "session.log").read_text()
    heads = [line for line in log.splitlines() if line.startswith("==== ")]
    assert len(heads) == 2
    assert heads[0].endswith("Z: tests headline18, at most 5 s")


def test_a_gpu_session_ends_where_its_check_fails(tmp_path):
    assert session(tmp_path, "1", PYTHON=stand_in(tmp_path, 'case "$1" in -) exit 1;; esac')).returncode == 1
    assert list(exits(tmp_path)) == ["data", "check"]
    assert exits(tmp_path)["check"] == 1


def test_a_gpu_session_starts_the_headline_again_at_most_twice_and_keeps_what_was_compiled(tmp_path):
    python = stand_in(tmp_path, 'echo compiled >"$TRITON_CACHE_DIR/kernel"; exit 4')
    session(tmp_path, "headline18", PYTHON=python)
    assert (tmp_path / "trace").read_text().count("headline.py --budget") == 3
    assert exits(tmp_path) == {"headline18": 4}
    (tmp_path / "fastretina-caches" / "triton" / "kernel").unlink()
    python = stand_in(tmp_path, 'cat "$TRITON_CACHE_DIR/kernel"')
    done = session(tmp_path, "run", PYTHON=python, CACHE=str(tmp_path / "out" / "caches.tar.xz"))
    assert "compiled\n" in done.stdout


def test_the_log_of_a_gpu_session_that_is_killed_holds_what_was_said(tmp_path):
    os.mkfifo(tmp_path / "never")
    environment = os.environ | {
        "OUT": str(tmp_path), "DEVICE": "cpu", "PYTHON": stand_in(tmp_path, f"echo begun; read _ <{tmp_path / 'never'}"),
    }  # fmt: skip
    command = ["bash", str(BENCHMARKS / "gpu_session.sh"), "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert "begun\n" in iter(process.stdout.readline, "")
        process.kill()
        (tmp_path / "never").write_text("")  # and what it had started ends, and with it the last that writes to the log
        process.stdout.read()
    assert "\n== run\nbegun\n" in (tmp_path / "session.log").read_text()
    assert json.loads((tmp_path / "session.json").read_text())["run"]["exit"] == "under way"
