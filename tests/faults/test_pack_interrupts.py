"""Ctrl-C in `write_beton`, called from Python: prompt, and nothing of it stays: no file, lock, descriptor, thread or process."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_pack import SIZE, folder, jpeg, listing, picture, plain

from fastretina.beton.verify import verify_beton
from fastretina.errors import ConvertError, LabelError
from fastretina.packing.pack import write_beton

PROGRAM = Path(__file__).parent / "interrupted_packs.py"
PROMPT = 5  # seconds until an error must have reached the user


@pytest.mark.tries(8, 200)
@pytest.mark.parametrize(("kind", "share"), [("passed through", 0.8), ("re-encoded", 0.2)])
def test_an_interrupted_call_leaves_nothing_and_the_next_one_works(kind: str, share: float, tmp_path, tries: int, tried) -> None:
    """Some of the moments in a call whose worker processes start, work and are ended; most in one that reads and publishes."""
    files, tries = plain(40) | {"77_left.jpeg": b"no image"}, round(share * tries)
    if kind == "re-encoded":
        files |= {f"{i + 100}_left.jpeg": jpeg(picture(400, 300, seed=i), progressive=True) for i in range(20)}
    root, out = folder(tmp_path / "in", files), tmp_path / "out"
    job = {"root": str(root), "out": str(out), "size": SIZE, "strikes": tries, "seed": tries}
    done = subprocess.run([sys.executable, PROGRAM, json.dumps(job)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["struck"] == tries
    assert found["longest"] < PROMPT
    assert listing(out) == ["o.beton", "o.beton.skipped.csv"]
    tried("converter: SIGINT in write_beton() at a random moment", tries)


# As in a notebook or a script of a few lines: nothing keeps a process that imports it from packing too.
SCRIPT = """
import os, sys, time
from fastretina import write_beton
print(write_beton("o.beton", root="in", split="train", size=64, workers=2).images, flush=True)
"""


@pytest.mark.parametrize("how", ["a script", "standard input", "optimised, for the owner alone"])
def test_a_script_that_guards_nothing_packs_once(how: str, tmp_path: Path, tried) -> None:
    folder(tmp_path / "in", {f"{i}_left.jpeg": jpeg(picture(100, 80, seed=i), progressive=True) for i in range(3)})
    (tmp_path / "script.py").write_text(SCRIPT)
    line = {"a script": ["script.py"], "standard input": ["-"], "optimised, for the owner alone": ["-OO", "script.py"]}[how]
    umask = 0o077 if "owner" in how else -1
    done = subprocess.run(
        [sys.executable, *line], input=SCRIPT, capture_output=True, text=True, timeout=60, cwd=tmp_path, umask=umask, env=paths()
    )
    assert (done.stdout, done.stderr, done.returncode) == ("3\n", "", 0)
    assert listing(tmp_path) == ["in", "o.beton", "script.py"]
    assert ((tmp_path / "o.beton").stat().st_mode & 0o077 == 0) == (umask == 0o077)
    tried("converter: called from a script that guards nothing, with -OO and umask 077")


def paths() -> dict[str, str]:
    """The environment, with this package where it is imported from here."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


# A process that somebody forks meanwhile holds the pipes of the workers open.
FORKING = """
import os, sys, threading, time
from pathlib import Path
from fastretina import write_beton

def fork() -> None:
    while len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()) < 2:
        time.sleep(0.01)
    time.sleep(0.5)
    workers = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    if (pid := os.fork()) == 0:
        time.sleep(30)
        os._exit(0)
    print(workers, pid, flush=True)

threading.Thread(target=fork, daemon=True).start()
write_beton("o.beton", root="in", split="train", size=64, workers=2)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # dead, if nobody has asked how it ended
    except FileNotFoundError:
        return False


def test_workers_end_with_their_parent_though_a_fork_of_it_lives_on(tmp_path: Path, tried) -> None:
    data = jpeg(picture(2_000, 1_500), progressive=True)
    folder(tmp_path / "in", {f"{i}_left.jpeg": data for i in range(150)})
    with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=paths()) as process:
        assert process.stdout is not None
        *workers, fork = map(int, process.stdout.readline().split())
        process.kill()
        try:
            deadline = time.monotonic() + PROMPT
            while left := [pid for pid in workers if runs(pid)]:
                assert time.monotonic() < deadline, left
                time.sleep(0.02)
        finally:
            os.kill(fork, signal.SIGKILL)
    tried("converter: kill -9 of the parent, a fork of which lives on")


@pytest.mark.tries(3, 10)
def test_sources_that_change_while_they_are_packed_give_an_error_or_a_sound_file(tmp_path: Path, tries: int, tried) -> None:
    files = plain(60) | {f"{i + 50}_left.jpeg": jpeg(picture(100, 80, seed=i), progressive=True) for i in range(6)}
    root, chosen = folder(tmp_path / "in", files), random.Random(tries)
    out, over, told = tmp_path / "o.beton", threading.Event(), list[str]()

    def change() -> None:
        while not over.is_set():
            path = root / "data" / chosen.choice(sorted(files))
            data = files[path.name]
            path.write_bytes(data[: chosen.randrange(len(data))])  # truncated in place, then replaced
            path.with_suffix(".new").write_bytes(files[chosen.choice(sorted(files))])
            path.with_suffix(".new").replace(path)
            path.unlink()
            path.write_bytes(data)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for number in range(tries):
            try:
                write_beton(
                    out, root=root, split="train", size=SIZE, workers=2, on_bad=("error", "skip")[number % 2], max_bad="90%"
                )
            except (ConvertError, LabelError) as error:  # removed while the table was read, or later
                told.append(str(error))
                assert not out.exists()
            else:
                assert verify_beton(out).bad == ()
                out.unlink()
            (tmp_path / "o.beton.skipped.csv").unlink(missing_ok=True)
            assert listing(tmp_path) == ["in"]
            tried("converter: sources truncated, replaced, removed while they are packed")
    finally:
        over.set()
        thread.join()
    assert not [text for text in told if not re.search(r"_img\.csv, line \d+: (.*/data/\d+_\w+\.jpeg: |no image )", text)]
