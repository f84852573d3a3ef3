"""The JPEG header walk under a fuzzer: whatever the bytes, a header or our error, in little time and memory.

What each kind of JPEG becomes, and the bombs by name, are in tests/beton/test_jpeg.py; docs/format.md holds the table.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_jpeg import _SEEDS, BOMBS, encode, insert, patch_frame

from fastretina.beton.jpeg import Limits, read_header, verdict
from fastretina.errors import JpegError

MORE_BOMBS = {
    "16,384 scans of one pixel": encode()[:-2] + (b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 16_384) + b"\xff\xd9",
    "segments within segments": insert(encode(), 0xE1, b"\xff\xe1\xff\xff" * 8_000),
    "an Exif of 65,535 entries": insert(encode(), 0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(12) * 5_000),
}


def test_bombs_are_met_in_ten_milliseconds_and_one_mebibyte(tried) -> None:
    for name, data in {**BOMBS, **MORE_BOMBS}.items():
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            try:
                read_header(data)
                refused = False
            except JpegError:
                refused = True
            seconds.append(time.perf_counter() - started)
        assert refused == (name not in list(MORE_BOMBS)[1:]), name
        assert min(seconds) < 0.01, name
        tracemalloc.start()
        try:
            verdict(read_header(data), 64)
        except JpegError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 1 << 20, name
        tried("JPEG: bomb")


def check(data: bytes) -> None:
    try:
        header = read_header(data)
    except JpegError:
        return
    limits = Limits()
    assert 1 <= header.width <= limits.side
    assert 1 <= header.height <= limits.side
    assert header.width * header.height <= limits.pixels
    assert 1 <= header.scans <= limits.scans
    assert header.app_bytes <= limits.app_bytes
    assert verdict(header, 64).action in ("pass", "convert", "reject")


# Segments with plausible markers and arbitrary bodies reach further into the walk than noise does.
_MARKERS = st.sampled_from([0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE, 0xD9, 0xD0])


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(_SEEDS)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(2, 700))
        body = draw(st.binary(max_size=60))
        length = draw(st.one_of(st.just(len(body) + 2), st.integers(0, 65_535)))
        data[place:place] = bytes([0xFF, draw(_MARKERS)]) + length.to_bytes(2, "big") + body
    for place, value in draw(st.lists(st.tuples(st.integers(0, 1_500), st.integers(0, 255)), max_size=6)):
        data[place % len(data)] = value
    return bytes(data[: draw(st.one_of(st.none(), st.integers(0, 1_500)))])


@pytest.mark.tries(300, 10_000)
def test_arbitrary_jpegs_give_a_header_or_our_error(tries: int, tried) -> None:
    @settings(max_examples=tries, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(jpegs())
    @example(b"")
    @example(patch_frame(encode(), 5, b"\xff\xff\xff\xff"))
    def walk(data: bytes) -> None:
        check(data)

    walk()
    tried("JPEG: the header walk under hypothesis", tries)


@pytest.mark.slow_faults
def test_a_coverage_guided_fuzzer_finds_only_our_error(tmp_path: Path, tried) -> None:
    """Seconds: FASTRETINA_FUZZ_SECONDS, 60 without it."""
    pytest.importorskip("atheris", reason="atheris, the coverage-guided fuzzer, is not installed (pip install atheris)")
    seconds = os.environ.get("FASTRETINA_FUZZ_SECONDS", "60")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, data in enumerate(_SEEDS):
        (corpus / str(number)).write_bytes(data)
    code = (
        "import sys, atheris\n"
        f"sys.path[:0] = {[path for path in sys.path if path]!r}\n"  # what pytest finds this file and its helpers by
        "with atheris.instrument_imports(include=['fastretina']):\n    import fastretina.beton.jpeg\n"
        "from test_header_walk_faults import check\n"
        "atheris.Setup(sys.argv, check)\natheris.Fuzz()\n"
    )
    line = [sys.executable, "-c", code, str(corpus), f"-max_total_time={seconds}", "-max_len=4096", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=float(seconds) + 120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = next(int(text.split()[1]) for text in done.stderr.splitlines() if text.startswith("Done "))
    assert runs > 10_000
    tried(f"JPEG: the header walk under a coverage-guided fuzzer, {seconds} s", runs)
