"""A packed file, corrupted in every way: what the tables cannot show at open, the checksums show before a pixel is used.

The exhaustive tests of the format itself are in tests/beton/test_reader.py and tests/beton/test_malicious_files.py.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_malicious_files import MALICIOUS, edit, foreign, save
from test_pack import SIZE, folder, plain

from fastretina.beton.reader import Beton
from fastretina.beton.verify import verify_beton
from fastretina.errors import BetonError
from fastretina.loading.loader import Loader
from fastretina.packing.pack import write_beton

SAMPLES = 101  # a hundred of them to be spoilt, one to stay good
PROMPT = 5  # seconds until an error must have reached the user
SLOWEST = 0.1  # seconds to refuse a file; one of a kind is allowed to be slower, on a machine that has other things to do


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reader")
    write_beton(root / "a.beton", root=folder(root / "in", plain(SAMPLES)), split="train", size=SIZE, workers=1)
    return root / "a.beton"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.beton"
    path.write_bytes(packed.read_bytes())
    return path


def refusal_seconds(path: Path) -> float:
    started = time.perf_counter()
    with pytest.raises(BetonError, match=path.name):
        Beton(path)
    return time.perf_counter() - started


@pytest.mark.tries((300, 40), (4096, 200))
def test_a_truncated_file_is_refused_at_open(copy: Path, tries: tuple[int, int], tried) -> None:
    size = copy.stat().st_size
    tail, anywhere = tries
    places = {*range(size - tail, size), *random.Random(0).sample(range(size - tail), anywhere)}
    seconds = []
    for length in sorted(places, reverse=True):
        os.truncate(copy, length)
        seconds.append(refusal_seconds(copy))
    assert sorted(seconds)[-2] < SLOWEST
    tried("reader: file truncated", len(places))


@pytest.mark.tries(200, 2_000)
def test_a_flipped_bit_in_header_or_tables_is_found_at_open(copy: Path, tries: int, tried) -> None:
    data = copy.read_bytes()
    with Beton(copy) as beton:
        payload = range(int(beton._pointers[0]), int(beton._pointers[-1] + beton._sizes[-1]))
    descriptors_end = 24 + 4 * 1041 + SAMPLES * 40
    # The gap between the metadata and the first page, and that after the last sample, belong to nobody.
    tables = [*range(descriptors_end), *range(payload.stop + -payload.stop % 8, len(data))]
    chosen = random.Random(1)
    with copy.open("r+b", buffering=0) as file:
        for _ in range(tries):
            place = chosen.choice(tables)
            os.pwrite(file.fileno(), bytes([data[place] ^ 1 << chosen.randrange(8)]), place)
            refusal_seconds(copy)
            os.pwrite(file.fileno(), data[place : place + 1], place)
    Beton(copy).close()
    tried("reader: one bit flipped in header or tables", tries)


@pytest.mark.tries(1, 21)
def test_a_flipped_bit_in_a_payload_is_found_by_verify_and_by_the_loader(copy: Path, tries: int, tried) -> None:
    """One bit in each of the samples at a time; every one of them must be found, and no other."""
    data = copy.read_bytes()
    with Beton(copy) as beton:
        spans = [(int(start), int(size)) for start, size in zip(beton._pointers, beton._sizes, strict=True)]
    chosen = random.Random(2)
    for _ in range(tries):
        struck = bytearray(data)
        for start, size in spans[1:]:  # all but the first: a good one among them must stay good
            struck[start + chosen.randrange(size)] ^= 1 << chosen.randrange(8)
        copy.write_bytes(struck)
        assert [index for index, _, _ in verify_beton(copy, workers=2).bad] == list(range(1, SAMPLES))
        with Loader(copy, batch_size=16, resolution=SIZE, workers=2, train=False, on_bad="skip", max_bad=1.0) as loader:
            assert [int(number) for batch in loader for number in batch.ids] == [0]
            assert [error.index for error in loader.skipped] == list(range(1, SAMPLES))
        tried("reader: one bit flipped in a payload, found by verify_beton and by the loader", SAMPLES - 1)


def no_file(kind: str, place: Path) -> Path:
    """Something that is no readable file at `place`/a.beton."""
    path = place / "a.beton"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to("a.beton")
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"x" * 5_000)
    if kind == "no permission":
        path.chmod(0)
    return path


# Root may read everything: there the reader becomes somebody else, who may enter the folder.
OPEN = """
import os, sys
from fastretina.beton.reader import Beton
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.chmod(".", 0o755)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    Beton("a.beton")
except Exception as error:
    print(type(error).__name__, error)
"""
NO_FILES = {
    "missing": "No such file or directory",
    "empty": "empty file",
    "a folder": "cannot be opened as a .beton: a folder, not a file",
    "a FIFO": "cannot be opened as a .beton: not a file",
    "a link to itself": "Too many levels of symbolic links",
    "no permission": "Permission denied",
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_readable_file_is_an_error_that_names_it(kind: str, tmp_path: Path, tried) -> None:
    no_file(kind, tmp_path)
    done = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.startswith("BetonError a.beton: ")
    assert NO_FILES[kind] in done.stdout
    tried("reader: no readable file (missing, empty, a folder, a FIFO, a link to itself, no permission)")


FIELD_NAMES = {
    "two fields of one name": edit("fields", "name", b"image", 1),
    "a name of 16 bytes without end": edit("fields", "name", b"\xff" * 16, 0),
    "an empty name": edit("fields", "name", b"", 1),
}


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_odd_field_names_do_not_confuse_the_reader(name: str, tmp_path: Path, tried) -> None:
    parts = foreign()
    FIELD_NAMES[name](parts)
    path = save(tmp_path / "odd.beton", parts)
    with Beton(path) as beton:  # fields are told apart by their types first
        assert beton.labels.tolist() == [0, 0, 0]
        assert [len(beton.jpeg(i)) for i in range(3)] == [100] * 3
    tried("reader: malicious header")


def test_hostile_headers_together_take_no_memory(tmp_path: Path, tried) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for change in MALICIOUS.values():
        parts = foreign()
        change(parts)
        refusal_seconds(save(tmp_path / "malicious.beton", parts))
        tried("reader: malicious header")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_file_replaced_under_the_loader_goes_on_as_the_old_one(copy: Path, tried) -> None:
    with Loader(copy, batch_size=4, resolution=SIZE, workers=2, train=False) as loader:
        batches = iter(loader)
        next(batches)
        copy.with_suffix(".new").write_bytes(b"another file")
        copy.with_suffix(".new").rename(copy)
        assert sum(len(batch.ids) for batch in batches) == SAMPLES - 4
    tried("reader: file replaced by renaming while open")


@pytest.mark.tries(9, 60)
def test_a_file_changed_in_place_under_its_readers_is_an_error_that_names_it(
    packed: Path, tmp_path: Path, tries: int, tried
) -> None:
    """Cut, overwritten with zeros or with another file, at random moments: an error, never a signal and never a hang."""
    size, chosen = packed.stat().st_size, random.Random(3)
    with Beton(packed) as beton:
        samples = range(int(beton._pointers[0]), int(beton._pointers[-1]))  # at its end one is lost at least
    other = tmp_path / "other.beton"
    write_beton(other, root=folder(tmp_path / "in", dict(list(plain(SAMPLES).items())[::-1])), split="train", size=SIZE, workers=1)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "fork_readers.py"), str(packed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        for number in range(tries):
            path = tmp_path / "struck.beton"
            path.write_bytes(packed.read_bytes())
            job = {
                "path": str(path), "other": str(other), "after": chosen.uniform(0, 0.3),
                "change": ("truncate", "zero", "copy")[number % 3],
                "at": chosen.choice([0, 4096, chosen.randrange(size // 2), chosen.choice(samples)]),
                "reader": chosen.choice(["loader", "loader", "verify"]),
            }  # fmt: skip
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            ended = json.loads(server.stdout.readline())
            assert ended["code"] == 1, (job, ended)
            assert str(path) in ended["error"], (job, ended)
            assert ended["seconds"] < PROMPT, (job, ended)
            tried(f"reader: file changed in place under its readers ({job['change']})")
    finally:
        server.stdin.close()
        server.wait(30)
        server.stdout.close()


@pytest.mark.tries(40, 200)
def test_a_file_truncated_while_it_is_opened_is_refused(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tries: int, tried
) -> None:
    """After its length was looked at, or after any of the reads that follow."""
    path, whole, chosen = tmp_path / "truncated.beton", packed.read_bytes(), random.Random(4)
    real, reads, strike, length = os.preadv, 0, len(whole), 0

    def preadv(descriptor: int, buffers: list[np.ndarray], place: int) -> int:
        nonlocal reads
        if reads == strike:
            os.truncate(path, length)
        reads += 1
        return real(descriptor, buffers, place)

    monkeypatch.setattr(os, "preadv", preadv)
    with Beton(packed) as beton:
        samples = int(beton._pointers[-1])  # what lies behind them is read last
    for _ in range(tries):
        path.write_bytes(whole)
        reads, strike, length = 0, chosen.randrange(5), chosen.randrange(samples)
        with pytest.raises(BetonError, match=rf"^{path}: was truncated while open"):
            Beton(path)
        assert reads > strike
    tried("reader: file truncated while it is opened", tries)


def test_a_disk_that_cannot_read_a_sample_is_a_bad_sample_and_one_that_cannot_read_the_tables_a_bad_file(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tried
) -> None:
    real, broken = os.preadv, range(0)

    def preadv(descriptor: int, buffers: list[np.ndarray], place: int) -> int:
        if place in broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, place)

    monkeypatch.setattr(os, "preadv", preadv)
    with Loader(copy, batch_size=16, resolution=SIZE, workers=2, train=False, on_bad="skip", max_bad=1.0) as loader:
        start = int(loader.dataset._pointers[7])
        broken = range(start, start + 1)
        assert sum(len(batch.ids) for batch in loader) == SAMPLES - 1
        assert [(error.index, error.reason) for error in loader.skipped] == [(7, "cannot be read: Input/output error")]
    broken = range(1)
    with pytest.raises(BetonError, match=rf"{copy.name}: cannot be read: Input/output error"):
        Beton(copy)
    tried("reader: disk errors", 2)


@pytest.mark.tries(3, 10)
def test_epochs_full_of_bad_samples_leave_threads_descriptors_and_memory_flat(copy: Path, tries: int, tried) -> None:
    data = bytearray(copy.read_bytes())
    with Beton(copy) as beton:
        spans = [(int(start), int(size)) for start, size in zip(beton._pointers, beton._sizes, strict=True)]
    for start, size in spans[1:]:
        data[start + size // 2] ^= 1
    copy.write_bytes(data)

    def footprint() -> tuple[int, int, int]:
        gc.collect()
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir())), psutil.Process().memory_info().rss

    with Loader(copy, batch_size=16, resolution=SIZE, workers=2, on_bad="skip", max_bad=1.0) as loader:
        for _ in range(3):
            list(loader)
        before = footprint()
        for _ in range(tries):
            assert sum(len(batch.ids) for batch in loader) == 1
        after = footprint()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] * 1.02
    tried(f"reader: epochs of {SAMPLES - 1} bad samples, memory, descriptors and threads flat", tries)
