"""Servers that stall, and processes that have no thread, no descriptor left to fetch with; at moments drawn at random."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.beton.remote.remote_cases import PATTERN, SHARDS, write_shards
from tests.http_faults import FaultyServer

pytestmark = pytest.mark.skipif(not (find_spec("fsspec") and find_spec("aiohttp")), reason="needs the remote extra")
SOON = 15  # seconds; a patient reader would wait for 372


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server(shards: Path) -> Iterator[FaultyServer]:
    with FaultyServer(shards) as server:
        yield server


READ = """
import gc, json, os, resource, signal, sys, threading, time
import numpy, aiohttp, fsspec.implementations.http
from fastretina.beton.open import open_beton
from fastretina.beton.remote import Cache
from fastretina.errors import FastretinaError
url, cache, how, number = *sys.argv[1:4], int(sys.argv[4])
said = ""

def opened():
    return open_beton(url, Cache(cache, limit=1 << 30))

def read(beton):
    beton.expect(numpy.arange(len(beton)))
    for i in range(0, len(beton), 3):
        beton.verify(i)

def close(*_):
    beton.close()

try:
    if how == "threads":
        os.setgroups([])
        os.setgid(65534 - number % 7)
        os.setuid(65534 - number % 7)
        resource.setrlimit(resource.RLIMIT_NPROC, (number, number))
    elif how == "files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, 4096))
    elif how == "garbage":
        gc.set_threshold(number)
    with opened() as beton:
        signal.signal(signal.SIGUSR1, close)
        print("open", flush=True)
        if how == "garbage":
            for _ in range(10):
                cycle = [opened()]
                cycle.append(cycle)
                cycle[0].expect(numpy.arange(len(beton)))
                read(beton)
                del cycle
        if how == "files":
            read(beton)
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        read(beton)
    said = "read"
except FastretinaError as error:
    said = f"{type(error).__name__} {error}"
except KeyboardInterrupt:
    said = "KeyboardInterrupt"
print(json.dumps(said))
"""


def start(server: FaultyServer, cache: Path, how: str = "", number: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READ, f"{server.url}/{PATTERN}", cache.name, how, str(number)], cwd=cache.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def said_by(process: subprocess.Popen[str], seconds: float) -> str:
    """Its last word; it must end within so many seconds, and without a traceback."""
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert errors == "", errors
    assert process.returncode == 0
    return str(json.loads(out.splitlines()[-1]))


@pytest.mark.tries(1, 8)
@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, ("KeyboardInterrupt",)), (signal.SIGUSR1, ("already closed", "closed while"))]
)
def test_a_reader_of_a_server_that_stalls_ends_soon_by_ctrl_c_and_by_a_handler_that_closes(
    server, tmp_path, tries, tried, number, ends
):
    draw = random.Random(tries)
    for attempt in range(tries):
        begin = draw.randrange(2 * SHARDS, 3 * SHARDS - 2)  # two requests a shard for its tables, one for its samples
        server.requests.clear()
        server.faults = lambda number, name, begin=begin: "silent" if number > begin else None
        process = start(server, tmp_path / str(attempt))
        assert process.stdout.readline() == "open\n"
        time.sleep(draw.uniform(0, 0.6))
        process.send_signal(number)
        said = said_by(process, SOON)
        assert any(end in said for end in ends), said
        tried(f"servers: stalls, and {signal.Signals(number).name} comes")


@pytest.mark.tries(1, 8)
def test_a_process_without_threads_to_spare_is_told_so(server, tmp_path, tries, tried):
    if os.geteuid() != 0:
        pytest.skip("needs root, who may become a user that has no other processes")
    tmp_path.chmod(0o777)
    ends = set()
    for attempt in range(tries):
        said = said_by(start(server, tmp_path / str(attempt), "threads", 1 + attempt * 20 // tries), 60)
        assert said == "read" or "can't start new thread" in said, said
        ends.add(said == "read")
        tried("servers: a limit of threads")
    assert False in ends  # the first of them has room for none


@pytest.mark.tries(1, 8)
def test_a_process_without_descriptors_to_spare_is_told_so_and_loses_nothing(server, tmp_path, tries, tried):
    """Sooner or later: it may be able to open the set, and not to read it. No file of the cache is taken for a corrupt one."""
    first = start(server, tmp_path / "cache")
    assert said_by(first, 60) == "read"
    complete = {path.name: path.stat().st_ino for path in (tmp_path / "cache").glob("*.beton")}
    for attempt in range(tries):
        said = said_by(start(server, tmp_path / "cache", "files", 12 + attempt * 30 // tries), 90)
        assert said == "read" or "oo many open files" in said or "Errno 24" in said, said
        assert {path.name: path.stat().st_ino for path in (tmp_path / "cache").glob("*.beton")} == complete
        tried("servers: a limit of open files")


@pytest.mark.tries(1, 3)
def test_sets_forgotten_in_cycles_end_whatever_the_collector_interrupts(server, tmp_path, tries, tried):
    for attempt in range(tries):
        assert said_by(start(server, tmp_path / "cache", "garbage", 5 + 40 * attempt), 60) == "read"
        tried("servers: sets forgotten in cycles", 10)


@pytest.mark.slow_faults
def test_a_second_ctrl_c_ends_a_training_whose_data_stall(server, tmp_path, tried):
    """The first one waits for the end of the step."""
    server.faults = lambda number, name: "silent" if server.requests[-1][1] == 1 << 21 else None
    url = f"{server.url}/{PATTERN}"
    options = ["--train", url, "--test", url, "--resolution", "32", "--epochs", "1", "--workers", "2", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastretina.train", *options, "--out", tmp_path / "run"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FASTRETINA_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    try:
        while not server.faulty["silent"]:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(2)  # into the loop
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, errors = process.communicate(timeout=SOON)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    tried("servers: a training whose data stall, and SIGINT twice")
