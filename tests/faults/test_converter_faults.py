"""The packing commands as processes: what they print, their exit codes, and what is left when they are stopped or killed."""

from __future__ import annotations

import csv
import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_disk import on_small_disk
from test_pack import SIZE, folder, jpeg, listing, picture, plain

from fastretina.beton.reader import Beton
from fastretina.packing.pack import write_beton

TOOLS = Path(__file__).parents[2] / "tools"
PROMPT = 5  # seconds until an error must have reached the user


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


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that takes some seconds: every image is large and must be re-encoded."""
    data = jpeg(picture(2000, 1500), progressive=True)
    return folder(tmp_path_factory.mktemp("slow") / "in", {f"{i}_left.jpeg": data for i in range(150)})


Packing = Callable[[float], subprocess.Popen[str]]


@pytest.fixture
def packing(slow: Path, tmp_path: Path) -> Iterator[Packing]:
    """Starts write_beton on the slow data set, waits until its workers are there, and for some seconds more."""
    started: list[subprocess.Popen[str]] = []

    def start(seconds: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command("--root", slow, "--split", "train", "--out", tmp_path / "o.beton", "--workers", 2),
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        deadline = time.monotonic() + 30
        while len(workers_of(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
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


def gone(pids: list[int], seconds: float = PROMPT) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def moments(count: int, longest: float) -> list[float]:
    """Seconds, the same in every run of the tests."""
    chosen = random.Random(count)
    return [chosen.uniform(0, longest) for _ in range(count)]


@pytest.mark.tries(1, 20)
def test_a_killed_worker_is_an_error_that_names_a_row_and_leaves_nothing(packing: Packing, tmp_path: Path, tries, tried) -> None:
    for number, seconds in enumerate(moments(tries, 1.2)):
        process = packing(seconds)
        workers = workers_of(process.pid)
        os.kill(workers[number % 2], signal.SIGKILL)
        _, error = process.communicate(timeout=PROMPT)
        assert process.returncode == 1
        assert "killed by signal 9" in error
        assert "train_img.csv, line " in error
        assert gone(workers)
        assert listing(tmp_path) == []
        tried("converter: kill -9 of a worker")


@pytest.mark.parametrize("place", [0, 30, 59], ids=["first", "middle", "last"])
def test_a_worker_that_raises_is_an_error_that_names_the_row(place: int, tmp_path: Path, tried) -> None:
    """An error that nobody foresaw, in a worker process, at one image."""
    files = {f"{i}_left.png": jpeg(picture(seed=i), progressive=True) for i in range(60)}
    name = f"{place}_left.png"
    files[name] += b"struck"
    root = folder(tmp_path / "in", files)
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[0] == '-c':\n"  # a worker
        "    from fastretina.packing import reencode\n"
        "    real = reencode.reencode\n"
        "    def striking(data, *how):\n"
        "        if data.endswith(b'struck'): raise RuntimeError('unforeseen')\n"
        "        return real(data, *how)\n"
        "    reencode.reencode = striking\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        command("--root", root, "--split", "train", "--out", tmp_path / "o.beton", "--size", SIZE, "--workers", 2),
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(patch)},
    )  # fmt: skip
    assert time.monotonic() - started < 3 * PROMPT  # with the start of the command
    assert done.returncode == 1
    assert f"train_img.csv, line {place + 1}: {root / 'data' / name}: a worker process ended" in done.stderr
    assert listing(tmp_path) == ["in", "patch"]
    tried("converter: a worker raises")


@pytest.mark.tries(1, 5)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGXCPU, 152)]
)
def test_signals_end_it_in_order(number: signal.Signals, code: int, packing: Packing, tmp_path: Path, tries, tried) -> None:
    for seconds in moments(tries, 1.2):
        process = packing(seconds)
        workers = workers_of(process.pid)
        process.send_signal(number)
        _, error = process.communicate(timeout=PROMPT)
        assert process.returncode == code, error
        assert "Traceback" not in error
        assert gone(workers)
        assert listing(tmp_path) == []
        tried("converter: SIGINT, SIGTERM, SIGHUP or SIGXCPU")


def test_a_closed_terminal_ends_it_in_order_but_not_under_nohup(slow: Path, tmp_path: Path, tried) -> None:
    def lose_terminal(start: Callable[[], None]) -> subprocess.Popen[bytes]:
        ours, theirs = os.openpty()
        line = command("--root", slow, "--split", "train", "--out", tmp_path / "o.beton", "--workers", 2)
        with subprocess.Popen(
            line, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=start, start_new_session=True
        ) as process:
            os.close(theirs)
            while len(workers := workers_of(process.pid)) < 2:
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(0.3)
            os.close(ours)
            if start is nohup:
                time.sleep(0.5)
                assert process.poll() is None
                process.terminate()
            process.wait(PROMPT)
        assert gone(workers)
        assert listing(tmp_path) == []
        return process

    def terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def nohup() -> None:
        terminal()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert lose_terminal(terminal).returncode == 129
    assert lose_terminal(nohup).returncode == 143
    tried("converter: SIGINT, SIGTERM, SIGHUP or SIGXCPU")


@pytest.mark.tries(3, 50)
def test_a_killed_parent_leaves_nothing_at_the_final_name_and_a_rerun_gives_the_same_bytes(tmp_path: Path, tries, tried) -> None:
    """Killed at any moment of its life: while it starts, packs, writes its tables, renames."""
    large = {f"{i}_left.jpeg": jpeg(picture(500, 400, seed=i), progressive=True) for i in range(120)}
    root = folder(tmp_path / "in", large | plain(60))
    arguments = {"root": root, "split": "train", "size": SIZE, "workers": 2}
    write_beton(tmp_path / "whole.beton", **arguments)
    whole = (tmp_path / "whole.beton").read_bytes()
    out = tmp_path / "out" / "o.beton"
    line = command("--root", root, "--split", "train", "--out", out, "--size", SIZE, "--workers", 2)
    lifetimes = []
    for _ in range(3):
        started = time.monotonic()
        assert subprocess.run(line, capture_output=True, timeout=60).returncode == 0
        lifetimes.append(time.monotonic() - started)
        out.unlink()
    struck = 0
    for seconds in moments(3 * tries, min(lifetimes)):
        if struck == tries:
            break
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        workers = workers_of(process.pid)
        process.kill()
        process.wait()
        assert gone(workers)
        if out.exists():  # it was quicker this time
            assert out.read_bytes() == whole
            tried("converter: kill -9 of the parent, too late: the file is complete")
        else:
            struck += 1
            tried("converter: kill -9 of the parent, nothing at the final name, the rerun gives the same bytes")
        write_beton(out, **arguments)
        assert out.read_bytes() == whole
        assert listing(out.parent) == ["o.beton"]
        out.unlink()
    assert struck == tries


FULL = [0, 10_000, 8_500_000, 8_600_000]
ALSO_FULL = [1, 4_100, 1 << 20, (8 << 20) + 1, 8_550_000, 8_624_000]


@pytest.mark.parametrize("limit", [*FULL, *(pytest.param(limit, marks=pytest.mark.slow_faults) for limit in ALSO_FULL)])
def test_a_full_disk_gives_the_systems_reason(limit: int, tmp_path: Path, tried) -> None:
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
    tried("converter: disk full (RLIMIT_FSIZE)")


def test_a_full_disk_leaves_no_list_of_skipped_rows_either(tmp_path: Path, tried) -> None:
    files = plain(200)
    files["7_left.jpeg"] = b"no image"
    root = folder(tmp_path / "in", files)
    line = command("--root", root, "--split", "train", "--out", tmp_path / "o.beton", "--size", SIZE, "--on-bad", "skip")
    limit = 8_600_000
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert listing(tmp_path) == ["in"]
    tried("converter: disk full (RLIMIT_FSIZE)")


def test_a_full_file_system_gives_the_systems_reason(tmp_path: Path, tried) -> None:
    """A tmpfs of 128 KiB, in a mount name space of its own."""
    inside = tmp_path / "small"
    inside.mkdir()
    root = folder(tmp_path / "in", plain(200))
    pack = command("--root", root, "--split", "train", "--out", inside / "o.beton", "--size", SIZE)
    packing = on_small_disk(inside, "128k", *pack, then=f'ls -A "{inside}"')
    done = subprocess.run(packing, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert done.stdout == ""
    tried("converter: disk full (tmpfs)")


@pytest.mark.tries(1_000, 10_000)
def test_one_percent_of_bad_images_stops_or_is_listed_exactly(tmp_path: Path, tries: int, tried) -> None:
    data, cut = jpeg(picture()), jpeg(picture())[:-40]
    bad = sorted(random.Random(0).sample(range(tries), tries // 100))
    files = {f"{i}_left.jpeg": cut if i in set(bad) else data for i in range(tries)}
    root = folder(tmp_path / "in", files)
    arguments = ["--root", root, "--split", "train", "--out", tmp_path / "o.beton", "--size", SIZE, "--on-bad", "skip"]
    stopped = subprocess.run(command(*arguments, "--max-bad", "0.5%"), capture_output=True, text=True, timeout=120)
    assert stopped.returncode == 1
    assert "more than --max-bad 0.5%" in stopped.stderr
    assert listing(tmp_path) == ["in"]
    done = subprocess.run(command(*arguments, "--max-bad", "2%"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "o.beton.skipped.csv").open(newline="") as file:
        assert [int(row["row"]) for row in csv.DictReader(file)] == [place + 1 for place in bad]
    with Beton(tmp_path / "o.beton") as beton:
        assert beton.ids.tolist() == [i for i in range(tries) if i not in set(bad)]
    tried(f"converter: 1 % bad of {tries:,}, --max-bad 0.5% and 2%", 2)


def test_packing_imports_no_torch() -> None:
    packing = "fastretina.packing.pack, fastretina.packing.reencode, fastretina.beton.verify"
    code = f"import sys, {packing}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
