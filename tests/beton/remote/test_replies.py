"""However much a server sends, no more of it is read than was asked for: the memory of a process that reads stays small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastretina.beton import format as fmt

# VmHWM, not ru_maxrss: the latter begins with what the process that forked it had.
READ = """
import sys
from fastretina.beton.open import open_beton
from fastretina.beton.remote import Cache
from fastretina.errors import RemoteError

def most():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

import aiohttp, fsspec.implementations.http
before = most()
try:
    with open_beton(sys.argv[1], Cache(sys.argv[2], limit=1 << 30, attempts=2, timeout=20)) as beton:
        beton.jpeg(0)
except RemoteError as error:
    print(error)
print(most() - before)
"""


def read_elsewhere(url: str, cache: Path, **environment: str) -> tuple[str, int]:
    """The error that reading the first sample ends with, and MiB that it took."""
    done = subprocess.run(
        [sys.executable, "-c", READ, url, str(cache)], stdout=subprocess.PIPE, text=True, timeout=100, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    *error, growth = done.stdout.splitlines()
    return "".join(error), int(growth)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("endless", "the server ignores ranges"),
        ("elsewhere", "the server ignores ranges"),
        ("endless range", "more than the .* bytes that were asked for; gave up after 2 attempts"),
        ("longer", "more than the .* bytes that were asked for; gave up after 2 attempts"),
        ("encoded", r"the server sends the file encoded \(gzip\)"),
    ],
)
def test_a_reply_ends_where_what_was_asked_for_ends(serve, tmp_path, fault, says):
    """Of the samples, after two for the tables; all are read by the same function."""
    server = serve(lambda number, name: fault if number >= 2 else None)
    error, growth = read_elsewhere(f"{server.url}/train-00000-of-00012.beton", tmp_path / "cache")
    assert re.search(says, error), error
    assert growth < 128


@pytest.mark.parametrize("fault", ["endless", "endless range"])
def test_a_reply_of_a_bucket_ends_too(folder, serve, tmp_path, fault):
    pytest.importorskip("s3fs", reason="needs the remote extra")
    server = serve(lambda number, name: fault if number >= 2 else None, at=folder.parent)
    error, growth = read_elsewhere(
        f"s3://{folder.name}/train-00000-of-00012.beton", tmp_path / "cache", AWS_ENDPOINT_URL=server.url, FSSPEC_S3_ANON="true"
    )
    assert re.search("ignores ranges" if fault == "endless" else "more than the .* bytes that were asked for", error), error
    assert growth < 128


def test_a_listing_that_never_ends_is_an_error(serve, tmp_path):
    error, growth = read_elsewhere(f"{serve().url}/endless/train-*.beton", tmp_path / "cache")
    assert "its listing is longer than 33,554,432 bytes" in error
    assert growth < 256


def test_a_size_that_no_memory_holds_is_an_error(serve, tmp_path):
    """The server says that the file is huge, and its header that nearly all of it are tables."""
    served = tmp_path / "huge"
    served.mkdir()
    header = np.zeros(1, fmt.HEADER)
    header[0] = (fmt.VERSION, len(fmt.OUR_FIELDS), 1 << 21, 1 << 34, 1 << 42)
    with (served / "huge.beton").open("wb") as file:
        file.write(header.tobytes())
        file.truncate((1 << 43) - 1)
    error, growth = read_elsewhere(f"{serve(at=served).url}/huge.beton", tmp_path / "cache")
    assert re.search("tables of .* bytes do not fit in memory", error), error
    assert growth < 128
