"""Training runs that are killed at any moment: always resumed, to the same samples in the same order and the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fork_runs import Tiny
from test_train import config, rows

from fastretina import train
from fastretina.beton.reader import Beton
from fastretina.models.checkpoint import read_tensors
from fastretina.report.run import RunPictures
from fastretina.training import build
from fastretina.training.recorder import Recorder
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import is_reported, load_state

HANG = 60  # seconds; only reached when something hangs
PROMPT = 5  # seconds until an error must have reached the user


@dataclass
class Ended:
    code: int
    output: str
    operations: int | None
    seconds: float


class Runs:
    """Starts runs in the process of fork_runs.py."""

    def __init__(self, train: Path, test: Path) -> None:
        self.data = [f"--train={train}", f"--test={test}", "--val-fraction=0"]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_runs.py"), str(train)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __call__(self, out: Path, **job: Any) -> Ended:
        """A run of three epochs of five steps in `out`, until it ends or is killed."""
        usual = [f"--out={out}", "--epochs=3", "--batch-size=8", "--resolution=32", "--seed=7", "--workers=1"]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        started = time.monotonic()
        self.process.stdin.write(json.dumps({"flags": [*self.data, *usual], **job}) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        return Ended(**found, seconds=time.monotonic() - started)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(HANG)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def runs(tiny_betons) -> Iterator[Runs]:
    server = Runs(tiny_betons.train, tiny_betons.test)
    yield server
    server.close()


def sample_ids(log: Path) -> dict[int, str]:
    """The ids of each step; a step that was done again, after a kill, must have had the same, and none may be left out."""
    seen: dict[int, str] = {}
    for line in log.read_text().splitlines():
        number, _, ids = line.partition(" ")
        assert int(number) <= len(seen) + 1
        assert seen.setdefault(int(number), ids) == ids
    return seen


def assert_same(one: Path, other: Path) -> None:
    """Weights, moments, schedule, figures, predictions and best weights of two runs, bit for bit."""
    first, second = (load_state(path / "last.pt") for path in (one, other))
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    for number, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][number][name]) for name, value in moments.items())
    for key in ("epoch", "batch", "step", "best_epoch"):
        assert first["progress"][key] == second["progress"][key]
    assert rows(one) == rows(other)
    assert (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()
    weights = [read_tensors(path / "best.safetensors") for path in (one, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory) -> tuple[Path, dict[int, str], int]:
    """An undisturbed run of the tiny network: its folder, the ids of its steps, how often it touched the disk."""
    place = tmp_path_factory.mktemp("whole")
    ended = runs(place / "run", ids=str(place / "ids"), tiny=True)
    assert ended.code == 0, ended.output
    assert ended.operations is not None
    return place / "run", sample_ids(place / "ids"), ended.operations


@pytest.mark.tries(8, 1_000)
def test_a_run_killed_before_any_operation_on_its_files_resumes_bit_for_bit(
    runs: Runs, whole: tuple[Path, dict[int, str], int], tmp_path: Path, tries: int, tried
) -> None:
    """Inside each save: between every two of its system calls, and with the file that is being written cut in half."""
    reference, ids, operations = whole
    assert operations > 40
    # A few tries are best spent on the last save: nothing that comes after it could mend what is lost there.
    places = range(operations if tries >= operations else 20)
    for number in (operations - 1 - place for place in random.Random(tries).sample(places, min(tries, len(places)))):
        out, log = tmp_path / f"run{number}", tmp_path / f"ids{number}"
        killed = runs(out, ids=str(log), die_before=number, tiny=True)
        assert killed.code == -signal.SIGKILL
        again = runs(out, ids=str(log), tiny=True)
        assert again.code == 0, f"killed before operation {number}: {again.output}"
        assert_same(reference, out)
        assert sample_ids(log) == ids
        leftover = {entry.name for entry in out.iterdir() if entry.name.startswith(".")}
        assert leftover <= {".lock"} | {f".{name}.tmp" for name in ("batch.png", "predictions.csv", "results.csv", "metrics.json")}
        tried("training: kill -9 inside a save, between any two operations on files")


@pytest.mark.tries(1, 30)
def test_a_run_killed_at_a_random_moment_resumes_bit_for_bit(runs: Runs, tmp_path: Path, tries: int, tried) -> None:
    """ResNet18, whose states of 134 MB take time to write: some of the moments lie inside a save."""
    ended = runs(tmp_path / "whole", ids=str(tmp_path / "ids"))
    assert ended.code == 0, ended.output
    chosen, struck, within = random.Random(tries), 0, 0
    for number in range(3 * tries):
        if struck == tries:
            break
        out, log = tmp_path / "run", tmp_path / f"ids{number}"
        killed = runs(out, ids=str(log), kill_after=chosen.uniform(0.05, 0.95) * ended.seconds)
        within += any(entry.name.endswith((".tmp", ".next.best.safetensors")) for entry in out.iterdir()) if out.exists() else 0
        again = runs(out, ids=str(log))
        assert again.code == 0, again.output
        assert_same(tmp_path / "whole", out)
        assert sample_ids(log) == sample_ids(tmp_path / "ids")
        if killed.code == -signal.SIGKILL:  # else it was quicker this time
            struck += 1
            tried("training: kill -9 at a random moment")
        for entry in out.iterdir():
            entry.unlink()
        out.rmdir()
    assert struck == tries
    if within:
        tried("training: kill -9 at a random moment, of those with a file half-written", within)


@pytest.mark.tries(2, 14)
def test_a_run_that_is_told_to_end_saves_and_a_resume_goes_on_bit_for_bit(
    runs: Runs, whole: tuple[Path, dict[int, str], int], tmp_path: Path, tries: int, tried
) -> None:
    """SIGTERM at each of its steps but the last."""
    reference, ids, _ = whole
    for step in random.Random(0).sample(range(1, 15), tries):
        out, log = tmp_path / f"run{step}", tmp_path / f"ids{step}"
        ended = runs(out, ids=str(log), tiny=True, end_at=step)
        assert ended.code == 143, ended.output
        assert "Traceback" not in ended.output
        assert load_state(out / "last.pt")["progress"]["step"] == step
        assert runs(out, ids=str(log), tiny=True).code == 0
        assert_same(reference, out)
        assert sample_ids(log) == ids
        tried("training: SIGTERM at a step, saved and gone on")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99, 1.2])
def test_a_full_disk_while_saving_leaves_the_old_state_and_says_why(
    runs: Runs, whole: tuple[Path, dict[int, str], int], tmp_path: Path, share: float, tried
) -> None:
    """From the second epoch on no file may be larger than this share of last.pt."""
    reference, _, _ = whole
    limit = int(share * (reference / "last.pt").stat().st_size)
    ended = runs(tmp_path / "run", limit=limit, tiny=True)
    run = RunFolder(tmp_path / "run")
    if share < 1:
        assert ended.code == 1, ended.output
        assert "File too large" in ended.output
        assert "Traceback" not in ended.output
        assert ended.seconds < 2 * PROMPT
        # A later state is larger, by its history: the largest limit is met one epoch later.
        assert load_state(run.last)["progress"]["epoch"] == (1 if share < 0.9 else 2)
        assert not [entry for entry in run.path.iterdir() if entry.name.endswith(".tmp")]
    assert runs(run.path, tiny=True).code == 0
    assert_same(reference, run.path)
    tried("training: disk full while saving")


@pytest.mark.tries(1, 2)
def test_a_full_disk_in_the_last_tables_or_in_the_report_costs_nothing_that_was_trained(
    runs: Runs, whole: tuple[Path, dict[int, str], int], tmp_path: Path, tries: int, tried
) -> None:
    reference, ids, _ = whole
    for place in ("tables", "report")[:tries]:
        run, log = RunFolder(tmp_path / place), tmp_path / f"{place}.ids"
        ended = runs(run.path, limit=100, limit_in=place, tiny=True, report=True, ids=str(log))
        assert ended.code == 1, ended.output
        assert "File too large" in ended.output
        assert "Traceback" not in ended.output
        assert load_state(run.last)["progress"]["epoch"] == 3
        assert not is_reported(run)
        assert not [entry for entry in run.path.iterdir() if entry.name.endswith(".tmp")]
        again = runs(run.path, tiny=True, report=True, ids=str(log))
        assert again.code == 0, again.output
        assert is_reported(run)
        assert_same(reference, run.path)
        assert sample_ids(log) == ids  # nothing was trained again
        tried("training: disk full in the last tables, in the report")


def test_under_umask_077_all_that_a_run_leaves_is_its_owners_alone(runs: Runs, tmp_path: Path) -> None:
    assert runs(tmp_path / "run", tiny=True, umask=0o77).code == 0
    assert {entry.stat().st_mode & 0o77 for entry in [tmp_path / "run", *(tmp_path / "run").iterdir()]} == {0}


@pytest.mark.tries(40, 200)
def test_the_memory_of_a_run_of_many_epochs_stays_flat(tiny_betons, tmp_path: Path, tries: int, monkeypatch, tried) -> None:
    """After the first quarter of them a run may grow by its history alone: at most 20 kB an epoch, and 4 MB of noise."""
    monkeypatch.setattr(build, "build_model", lambda *_, **__: Tiny())
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)
    seen, process = [], psutil.Process()
    end_epoch = Recorder.end_epoch

    def noting(recorder: Recorder, improved: bool) -> None:
        end_epoch(recorder, improved)
        seen.append(process.memory_info().rss)

    monkeypatch.setattr(Recorder, "end_epoch", noting)
    train.main(config(tiny_betons, tmp_path / "run", epochs=tries))
    assert len(seen) == tries
    assert max(seen[tries // 4 :]) - seen[tries // 4] < 20e3 * tries + 4e6
    tried("training: epochs of a run whose memory stays flat", tries)


@pytest.mark.slow_faults
def test_a_run_under_OO_is_the_same_run(whole: tuple[Path, dict[int, str], int], tiny_betons, tmp_path: Path) -> None:
    """Python without assertions and docstrings."""
    flags = [f"--train={tiny_betons.train}", f"--test={tiny_betons.test}", f"--out={tmp_path / 'run'}", "--epochs=3"]
    flags += ["--batch-size=8", "--resolution=32", "--seed=7", "--workers=1", "--val-fraction=0"]
    script = "import sys, torch, fork_runs; fork_runs.run({'flags': sys.argv[1:], 'tiny': True}, [0])"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-OO", "-c", script, *flags], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(whole[0], tmp_path / "run")


def test_torchs_deterministic_mode_changes_nothing(
    whole: tuple[Path, dict[int, str], int], tiny_betons, tmp_path: Path, one_thread, monkeypatch
) -> None:
    monkeypatch.setattr(build, "build_model", lambda *_, **__: Tiny())
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)
    torch.use_deterministic_algorithms(True)
    try:
        train.main(config(tiny_betons, tmp_path / "run"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(whole[0], tmp_path / "run")


def test_a_damaged_sample_stops_a_run_that_names_it(tiny_betons, tmp_path: Path, tried) -> None:
    """A loader's thread meets it; the error must reach the user, and no thread may keep the process alive."""
    data = bytearray(tiny_betons.train.read_bytes())
    with Beton(tiny_betons.train) as beton:
        data[int(beton._pointers[17]) + 200] ^= 1
        name = beton.names[17]
    (tmp_path / "damaged.beton").write_bytes(data)
    server = Runs(tiny_betons.train, tiny_betons.test)
    server.data[0] = f"--train={tmp_path / 'damaged.beton'}"
    try:
        ended = server(tmp_path / "run", tiny=True)
    finally:
        server.close()
    assert ended.code == 1
    assert f"damaged.beton: sample 17 ({name}): its bytes do not match their checksum" in ended.output
    tried("training: a loader's thread raises")
