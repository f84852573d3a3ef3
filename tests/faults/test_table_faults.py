"""What several changes at once do to the tables of a .beton: all of them are found when it is opened."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from test_malicious_files import foreign, save

from fastretina.beton import format as fmt
from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import BetonError

SAMPLES = 400
METADATA = 24 + 4 * fmt.DESCRIPTOR.itemsize
ROW = 40  # bytes of a sample's metadata: its label is at 16


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "a.beton"
    with BetonWriter(path, SAMPLES, ["patient"], fmt.MIN_PAGE) as writer:
        for number in range(SAMPLES):
            payload = bytes([number % 251 + 1]) * (90 + number % 7)
            named = {"name": f"{number}_left", "text": [str(number // 2)]}
            writer.add(payload, zlib.crc32(payload), label=number % 5, id=number, width=64, height=64, **named)
        writer.finish({"made": "by a test"})
    return path


def covered(data: bytes) -> tuple[range, range]:
    """What the checksums cover: header, descriptors and metadata; our block and the allocation table."""
    table = struct.unpack_from("<Q", data, 16)[0]
    return range(METADATA + SAMPLES * ROW), range(table - struct.unpack_from("<Q", data, table - 56)[0], len(data))


def two_bits(data: bytearray, chosen: random.Random) -> None:
    head, tail = covered(data)
    for place in chosen.sample(range(len(head) + len(tail)), 2):
        data[place if place < len(head) else tail[place - len(head)]] ^= 1 << chosen.randrange(8)


def two_highest_bits(data: bytearray, chosen: random.Random) -> None:
    """Bit 63 of two words of one group of 512, which the sum of older files does not see."""
    head, _ = covered(data)
    group = chosen.randrange(0, (len(head) // 4096) * 4096, 4096)
    for word in chosen.sample(range(512), 2):
        data[group + 8 * word + 7] ^= 0x80


def two_marks(data: bytearray, chosen: random.Random) -> None:
    """Of the three that say whose file it is."""
    table = struct.unpack_from("<Q", data, 16)[0]
    marks = [24 + 17, 24 + 1, table - 64]
    for place in chosen.sample(marks, 2):
        data[place + chosen.randrange(5)] ^= 1 << chosen.randrange(8)


def three_labels(data: bytearray, chosen: random.Random) -> None:
    """One grade up, two down, one up, in rows as far apart, between which the sum of older files does not tell."""
    while True:
        first, step = chosen.randrange(SAMPLES - 40), chosen.randrange(1, 20)
        places = [METADATA + (first + number * step) * ROW + 16 for number in range(3)]
        labels = [data[place] + change for place, change in zip(places, (1, -2, 1), strict=True)]
        if all(0 <= label < 5 for label in labels):
            break
    for place, label in zip(places, labels, strict=True):
        data[place] = label


def swapped(size: int, step: int) -> Callable[[bytearray, random.Random], None]:
    def change(data: bytearray, chosen: random.Random) -> None:
        one = other = b""
        while one == other:
            first, second = (METADATA + step * place for place in chosen.sample(range(SAMPLES * ROW // step - size // step), 2))
            one, other = bytes(data[first : first + size]), bytes(data[second : second + size])
            if abs(first - second) < size:
                other = one
        data[first : first + size], data[second : second + size] = other, one

    return change


def a_run(data: bytearray, chosen: random.Random) -> None:
    """Of zeros, of ones or of anything, up to a disk's sector."""
    region = chosen.choice(covered(data))
    size = chosen.randrange(1, 513)
    start = chosen.randrange(region.start, region.stop - size)
    before = bytes(data[start : start + size])
    while data[start : start + size] == before:
        data[start : start + size] = chosen.choice([bytes(size), b"\xff" * size, chosen.randbytes(size)])
        if before in (bytes(size), b"\xff" * size):
            data[start : start + size] = chosen.randbytes(size)


CHANGES: dict[str, Callable[[bytearray, random.Random], None]] = {
    "two bits": two_bits,
    "the highest bits of two words": two_highest_bits,
    "two of the three marks of our files": two_marks,
    "three labels": three_labels,
    "words swapped": swapped(8, 8),
    "rows swapped": swapped(ROW, ROW),
    "4 KiB swapped": swapped(4096, 8),
    "a run of bytes": a_run,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.tries(150, 5_000)
def test_whatever_changes_in_the_tables_is_found_at_open(packed: Path, tmp_path: Path, change: str, tries: int, tried) -> None:
    data, path, chosen, missed = packed.read_bytes(), tmp_path / "struck.beton", random.Random(change), []
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for number in range(tries):
            struck = bytearray(data)
            CHANGES[change](struck, chosen)
            assert struck != data
            for region in covered(data):
                os.pwrite(file.fileno(), struck[region.start : region.stop], region.start)
            try:
                Beton(path).close()
                missed.append(number)
            except BetonError as error:
                assert str(path) in str(error)  # noqa: PT017  # a file that opens is counted, not raised
    assert missed == []
    tried(f"tables: {change}, found at open", tries)


def older(data: bytes) -> bytearray:
    """The file as it was written before the footer had a revision."""
    table = struct.unpack_from("<Q", data, 16)[0]
    aged = bytearray(data)
    aged[table - 24 : table - 4] = bytes(20)
    aged[table - 4 : table] = struct.pack("<I", zlib.crc32(aged[table - 64 : table - 4]))
    return aged


@pytest.mark.tries(150, 5_000)
def test_older_files_are_read_and_one_flipped_bit_in_their_tables_is_found(packed: Path, tmp_path: Path, tries: int, tried) -> None:
    aged, path, chosen = older(packed.read_bytes()), tmp_path / "older.beton", random.Random(0)
    path.write_bytes(aged)
    with Beton(path) as beton, Beton(packed) as newer:
        assert beton.digest == newer.digest
        assert beton.packing == ""
    places = [place for region in covered(aged) for place in region]
    with path.open("r+b", buffering=0) as file:
        for _ in range(tries):
            place = chosen.choice(places)
            os.pwrite(file.fileno(), bytes([aged[place] ^ 1 << chosen.randrange(8)]), place)
            with pytest.raises(BetonError, match=path.name):
                Beton(path)
            os.pwrite(file.fileno(), aged[place : place + 1], place)
    tried("tables: one bit of an older file, found at open", tries)


def test_a_file_of_a_newer_fastretina_is_refused_as_that_and_not_as_corrupt(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    table = struct.unpack_from("<Q", data, 16)[0]
    data[table - 8 : table - 4] = struct.pack("<I", fmt.REVISION + 1)
    data[table - 4 : table] = struct.pack("<I", zlib.crc32(data[table - 64 : table - 4]))
    path = tmp_path / "newer.beton"
    path.write_bytes(data)
    with pytest.raises(BetonError, match=r"newer\.beton: written by a newer fastretina \(footer revision 2\)"):
        Beton(path)


# Opens a file where a process may have little memory.
LITTLE = """
import resource, sys
from fastretina.beton.reader import Beton
from fastretina.errors import BetonError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
try:
    Beton(sys.argv[1])
except BetonError as error:
    print(error)
"""


def test_tables_larger_than_a_process_may_have_are_an_error_that_names_the_file(tmp_path: Path, tried) -> None:
    """A sparse file of 20 million samples, which take no room on the disk."""
    parts, count = foreign(), 20_000_000
    start = 24 + 2 * fmt.DESCRIPTOR.itemsize
    parts["header"][0] = (2, 2, 1 << 21, count, start + 25 * count)
    path = save(tmp_path / "sparse.beton", parts)
    os.truncate(path, start + 49 * count)
    done = subprocess.run([sys.executable, "-c", LITTLE, str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"{path}: its tables ")
    assert "memory" in done.stdout
    tried("tables: larger than the memory of the process")
