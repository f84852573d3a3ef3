"""The packing commands as processes: what they print, their exit codes, and what is left when they are stopped."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_convert import SIZE, folder, jpeg, listing, picture, plain

from fastretina.beton import Beton
from fastretina.convert import write_beton

TOOLS = Path(__file__).parent.parent / "tools"


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(TOOLS / "write_beton.py"), *map(str, arguments)]


def test_commands_print_and_exit_as_documented(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", plain(5))
    out = tmp_path / "o.beton"
    done = subprocess.run(
        command("--root", root, "--split", "train", "--out", out, "--size", SIZE), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "passed through byte for byte: 5" in done.stdout
    assert "images/s" in done.stderr
    check = [sys.executable, str(TOOLS / "verify_beton.py"), str(out)]
    assert subprocess.run(check, capture_output=True, timeout=60).returncode == 0
    data = bytearray(out.read_bytes())
    with Beton(out) as beton:
        data[data.index(bytes(beton.jpeg(2))) + 300] ^= 4
    out.write_bytes(data)
    found = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert found.stdout.splitlines()[0].startswith("2\t1_right\tits bytes do not match their checksum")
    assert subprocess.run(command("--out", out), capture_output=True, timeout=60).returncode == 2
    missing = subprocess.run(
        command("--root", tmp_path, "--split", "train", "--out", out), capture_output=True, text=True, timeout=60
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "train_img.csv" in missing.stderr


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A data set that takes some seconds: every image is large and must be re-encoded."""
    data = jpeg(picture(2000, 1500), progressive=True)
    return folder(tmp_path / "in", {f"{i}_left.jpeg": data for i in range(150)})


@pytest.fixture
def packing(slow: Path, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts write_beton on the slow data set and waits until its workers are at work."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command("--root", slow, "--split", "train", "--out", tmp_path / "o.beton", "--workers", 2),
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        deadline = time.monotonic() + 30
        while len(workers_of(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.Random(len(started)).uniform(0.2, 0.6))
        assert process.poll() is None, process.communicate()[1]
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def workers_of(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in children]


def gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_worker_is_an_error_that_names_a_row_and_leaves_nothing(
    packing: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = packing()
    workers = workers_of(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "killed by signal 9" in error
    assert "train_img.csv, line " in error
    assert gone(workers)
    assert listing(tmp_path) == ["in"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_in_order(
    number: signal.Signals, code: int, packing: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = packing()
    workers = workers_of(process.pid)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert gone(workers)
    assert listing(tmp_path) == ["in"]


def test_a_killed_parent_leaves_nothing_at_the_final_name_and_no_process(
    packing: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = packing()
    workers = workers_of(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert gone(workers)
    assert not (tmp_path / "o.beton").exists()
    folder(tmp_path / "small", plain(3))
    write_beton(tmp_path / "o.beton", root=tmp_path / "small", split="train", size=SIZE)
    assert listing(tmp_path) == ["in", "o.beton", "small"]


@pytest.mark.parametrize("limit", [0, 10_000, 8_500_000, 8_600_000])
def test_a_full_disk_gives_the_systems_reason(limit: int, tmp_path: Path) -> None:
    root = folder(tmp_path / "in", plain(200))
    done = subprocess.run(
        command("--root", root, "--split", "train", "--out", tmp_path / "o.beton", "--size", SIZE, "--workers", 2),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert listing(tmp_path) == ["in"]


def test_packing_imports_no_torch() -> None:
    code = "import sys, fastretina.convert, fastretina.reencode, fastretina.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
