"""Commands that are told to end, and processes that are killed: prompt, in order, and nothing stays behind.

The converter has its own in test_converter_faults.py, a training run in test_training_faults.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from test_checkpoint import grader
from test_pack import jpeg, listing, picture

from fastretina.beton.writer import BetonWriter
from fastretina.models.checkpoint import save_checkpoint
from fastretina.models.resnet import build_model
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import load_state

TOOLS = Path(__file__).parents[2] / "tools"
PROMPT = 5  # seconds until an error must have reached the user
SIGNALS = [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow_faults)]


class Command(subprocess.Popen):
    """A command in a session of its own, by which its processes are known even after it has died."""

    def __init__(self, line: list[object], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            super().__init__([sys.executable, *map(str, line)], stdout=file, stderr=file, start_new_session=True)

    @property
    def said(self) -> str:
        """Everything that it has printed so far."""
        return self.log.read_text()

    def others(self) -> list[psutil.Process]:
        """The processes of its session but itself: workers, also when they are orphans."""
        found = []
        for pid in psutil.pids():
            try:
                if pid != self.pid and os.getsid(pid) == self.pid:
                    found.append(psutil.Process(pid))
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def ended(self) -> int:
        """Its exit code, once it is gone with all that belonged to it; within PROMPT seconds from now."""
        deadline = time.monotonic() + PROMPT
        code = self.wait(PROMPT)
        while others := self.others():
            assert time.monotonic() < deadline, others
            time.sleep(0.02)
        return code


Start = Callable[[list[object], Callable[[Command], bool], float], Command]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a command, waits until it is at work, and for some seconds more."""
    started: list[Command] = []
    logs = tmp_path_factory.mktemp("logs")

    def begin(line: list[object], at_work: Callable[[Command], bool], seconds: float) -> Command:
        process = Command(line, logs / str(len(started)))
        started.append(process)
        deadline = time.monotonic() + 60
        while not at_work(process):
            assert process.poll() is None, process.said
            assert time.monotonic() < deadline, process.said
            time.sleep(0.02)
        time.sleep(seconds)
        assert process.poll() is None, process.said
        return process

    yield begin
    for process in started:
        for other in [*process.others(), process]:
            other.kill()
        process.wait()


def moments(count: int) -> list[float]:
    """Seconds, the same in every run of the tests."""
    chosen = random.Random(count)
    return [chosen.uniform(0, 1) for _ in range(count)]


@pytest.fixture
def painting(start: Start, tmp_path: Path) -> Callable[[float], Command]:
    """make_sample, with both workers painting."""
    line = [TOOLS / "make_sample.py", "--out", tmp_path / "sample", "--train", 900, "--test", 100, "--workers", 2]
    return lambda seconds: start(line, lambda _: any((tmp_path / "sample").glob("data/*.jpeg")), seconds)


def workers_of(process: Command) -> list[psutil.Process]:
    return [other for other in process.others() if "spawn_main" in " ".join(other.cmdline())]


def assert_unfinished(sample: Path) -> None:
    """No CSV file, by which a complete data set is known."""
    assert listing(sample) == ["data", "sample.json"]
    for entry in (sample / "data").iterdir():
        entry.unlink()


@pytest.mark.tries(1, 5)
def test_a_killed_painter_ends_make_sample_with_an_error(painting, tmp_path: Path, tries: int, tried) -> None:
    for number, seconds in enumerate(moments(tries)):
        process = painting(seconds)
        workers_of(process)[number % 2].kill()
        assert process.ended() == 1
        assert f"error: a worker process died while making {tmp_path / 'sample'}; call it again" in process.said
        assert_unfinished(tmp_path / "sample")
        tried("make_sample: kill -9 of a worker")


@pytest.mark.tries(1, 5)
def test_a_killed_make_sample_leaves_no_process(painting, tmp_path: Path, tries: int, tried) -> None:
    for seconds in moments(tries):
        process = painting(seconds)
        assert len(workers_of(process)) == 2
        process.kill()
        process.ended()
        assert_unfinished(tmp_path / "sample")
        tried("make_sample: kill -9 of the parent")


@pytest.mark.tries(1, 3)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_end_make_sample(number: signal.Signals, code: int, painting, tmp_path: Path, tries: int, tried) -> None:
    for seconds in moments(tries):
        process = painting(seconds)
        process.send_signal(number)
        assert process.ended() == code, process.said
        assert "Traceback" not in process.said
        assert_unfinished(tmp_path / "sample")
        tried("make_sample: SIGINT or SIGTERM")


@pytest.mark.tries(1, 4)
def test_ctrl_c_while_painters_start_ends_make_sample_without_a_word_of_theirs(start: Start, tmp_path: Path, tries, tried) -> None:
    """A terminal sends it to all of the group, and a worker that is only just importing its libraries cannot handle it yet."""
    line = [TOOLS / "make_sample.py", "--out", tmp_path / "sample", "--train", 900, "--test", 100, "--workers", 2]
    for seconds in moments(tries):
        process = start(line, lambda process: len(workers_of(process)) == 2, seconds / 2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.ended() == 130, process.said
        assert process.said in ("interrupted\n", "interrupted"), process.said
        assert_unfinished(tmp_path / "sample")
        tried("make_sample: SIGINT to the whole group as it starts")


def is_open(path: Path, process: Command) -> bool:
    return any(file.path == str(path) for file in psutil.Process(process.pid).open_files())


@pytest.mark.tries(1, 3)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_end_verify_beton(number: signal.Signals, code: int, start: Start, tmp_path: Path, tries: int, tried) -> None:
    """Large photographs: a thread's whole share of them would take longer than anybody waits."""
    data, large = jpeg(picture(4_000, 3_000), progressive=True), tmp_path / "large.beton"
    with BetonWriter(large, 400) as writer:
        for i in range(400):
            writer.add(data, zlib.crc32(data), name=str(i), label=0, id=i, width=4_000, height=3_000)
        writer.finish({})
    for seconds in moments(tries):
        line = [TOOLS / "verify_beton.py", large, "--workers", 2]
        process = start(line, lambda process: is_open(large, process), seconds)
        process.send_signal(number)
        assert process.ended() == code, process.said
        assert "Traceback" not in process.said
        tried("verify_beton: SIGINT or SIGTERM")


@pytest.mark.tries(1, 3)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_end_predict_without_half_a_table(
    number: signal.Signals, code: int, start: Start, tmp_path: Path, tries: int, tried
) -> None:
    (tmp_path / "photos").mkdir()
    data = jpeg(picture(4_000, 3_000), progressive=True)
    for i in range(400):
        (tmp_path / "photos" / f"{i}.jpeg").write_bytes(data)
    checkpoint, out = tmp_path / "best.safetensors", tmp_path / "out"
    save_checkpoint(checkpoint, build_model("resnet18", 5), grader(1))
    out.mkdir()
    for seconds in moments(tries):
        line = ["-m", "fastretina.predict", "--checkpoint", checkpoint, tmp_path / "photos", "--csv", out / "grades.csv"]
        process = start([*line, "--workers", 2, "--batch-size", 4], lambda _: bool(listing(out)), seconds)
        process.send_signal(number)
        assert process.ended() == code, process.said
        assert "Traceback" not in process.said
        assert listing(out) == []
        tried("predict: SIGINT or SIGTERM")


def tiny_run(command: str, tiny_betons, out: Path) -> list[object]:
    """`train` or `compare`, with a network that costs no time, for more epochs than anybody waits for."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from fork_runs import Tiny\n"
        f"from fastretina import {command}\nfrom fastretina.training import build\nbuild.build_model = lambda *_, **__: Tiny()\n"
        f"{command}.run_command(sys.argv[1:])"
    )
    line: list[object] = ["-c", code, "--train", tiny_betons.train, "--test", tiny_betons.test, "--out", out, "--resolution", 32]
    return [*line, "--batch-size", 8, "--workers", 2, "--epochs", 100_000]


@pytest.mark.tries(1, 5)
def test_a_killed_training_run_leaves_no_process_and_no_shared_memory(
    start: Start, tiny_betons, tmp_path: Path, tries: int, tried
) -> None:
    for number, seconds in enumerate(moments(tries)):
        run = tmp_path / str(number)
        process = start(tiny_run("train", tiny_betons, run), lambda _, run=run: (run / "last.pt").exists(), seconds)
        assert process.others() == []
        # tqdm maps a semaphore that has no name any more.
        shared = [Path(place.path) for place in psutil.Process(process.pid).memory_maps() if place.path.startswith("/dev/shm/")]
        assert not [path for path in shared if path.exists()]
        process.kill()
        assert process.ended() == -signal.SIGKILL
        with RunFolder(run).locked():  # free for the next run
            pass
        tried("training: the consumer of the loader's batches killed by kill -9")


@pytest.mark.tries(1, 3)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_end_compare_which_then_goes_on(
    number: signal.Signals, code: int, start: Start, tiny_betons, tmp_path: Path, tries: int, tried
) -> None:
    line = [*tiny_run("compare", tiny_betons, tmp_path / "out"), "--archs", "resnet18"]
    last = tmp_path / "out" / "resnet18-scratch" / "last.pt"
    steps = 0
    for seconds in moments(tries):
        before = last.stat().st_mtime_ns if steps else 0
        # This call has saved: signalled before its first step it would not have gone further.
        process = start(line, lambda _, before=before: last.exists() and last.stat().st_mtime_ns > before, seconds)
        process.send_signal(number)
        assert process.ended() == code, process.said
        assert "Traceback" not in process.said
        assert ("resuming" in process.said) == (steps > 0)
        done, steps = steps, load_state(last)["progress"]["step"]
        assert steps > done
        tried("compare: SIGINT or SIGTERM, goes on")
