"""JPEGs made to keep a decoder busy or to mislead it, in a .beton whose checksums are right, or that has none: no way of reading a
sample hands them to a decoder."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from test_jpeg import encode, insert, patch_frame, photo
from test_malicious_files import foreign

from fastretina.beton.jpeg import check_claims
from fastretina.beton.reader import Beton
from fastretina.beton.verify import verify_beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import JpegError, SampleError
from fastretina.loading.loader import Loader
from fastretina.report.mistakes import thumbnail

SIDE, BAD = 512, 3
PROMPT = 20  # seconds for all ways together; a decoder alone takes 4 s for 20,000 scans of a red square


@cache
def good(number: int) -> bytes:
    return encode(photo(SIDE, SIDE).point(lambda value: value * (10 - number) // 10))


def with_scans(count: int, **options: object) -> bytes:
    """The last scan again and again."""
    data = encode(Image.new("RGB", (SIDE, SIDE), "red"), **options)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def one_by_one(count: int) -> bytes:
    """A baseline file of one scan for each component, the last one of them `count` times."""
    data = encode(Image.new("L", (SIDE, SIDE)))
    frame = data.index(b"\xff\xc0")
    sizes = data[frame + 5 : frame + 9]
    head = data[:frame] + b"\xff\xc0\0\x11\x08" + sizes + b"\x03\x01\x11\0\x02\x11\0\x03\x11\0" + data[frame + 13 :]
    scan = head[head.index(b"\xff\xda") + 10 : -2]
    start = head[: head.index(b"\xff\xda")]
    return start + b"".join(b"\xff\xda\0\x08\x01%c\0\0\x3f\0" % part + scan for part in (1, 2, *[3] * count)) + b"\xff\xd9"


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "20,000 progressive scans": (lambda: with_scans(20_000, progressive=True), "65 scans of 512 x 512 pixels, past the limit"),
    "4,000 scans of one component": (lambda: one_by_one(4_000), "65 scans of 512 x 512 pixels, past the limit"),
    "more scans behind that of a good one": (lambda: with_scans(100), "Didn't expect more than one scan"),
    "65,500 x 65,500 px": (lambda: patch_frame(good(0), 5, struct.pack(">HH", 65_500, 65_500)), "claims 65500 x 65500 pixels"),
    "16,384 x 8,000 px": (lambda: patch_frame(good(0), 5, struct.pack(">HH", 8_000, 16_384)), "is 16384 x 8000 pixels, its entry"),
    "one row less": (lambda: encode(photo(SIDE, SIDE - 1)), "is 512 x 511 pixels, its entry says 512 x 512"),
    "9 MiB of metadata": (lambda: insert_many(150, 65_000), "more than 8388608 bytes of metadata segments"),
    "600 segments": (lambda: insert_many(600, 4), "more than 512 segments"),
    "no JPEG": (lambda: b"\x89PNG" + bytes(500), "not a JPEG"),
}


def insert_many(count: int, size: int) -> bytes:
    data = good(0)
    return data[:2] + insert(b"\xff\xd8", 0xFE, bytes(size))[2:] * count + data[2:]


def packed(path: Path, bomb: bytes) -> Path:
    with BetonWriter(path, 6) as writer:
        for number in range(6):
            payload = bomb if number == BAD else good(number)
            writer.add(payload, zlib.crc32(payload), name=f"{number}_left", label=0, id=number, width=SIDE, height=SIDE)
        writer.finish({})
    return path


def of_another_maker(path: Path, bomb: bytes) -> Path:
    """The same samples as FFCV would write them: no names, no checksums."""
    payloads = [bomb if number == BAD else good(number) for number in range(6)]
    page = 1 << 24
    parts = foreign(len(payloads), page=page)
    starts = page + np.cumsum([0, *map(len, payloads)])
    parts["metadata"]["f0"]["width"] = parts["metadata"]["f0"]["height"] = SIDE
    parts["metadata"]["f0"]["data_ptr"] = parts["table"]["ptr"] = starts[:-1]
    parts["table"]["size"] = list(map(len, payloads))
    parts["header"]["alloc_table_ptr"] = starts[-1]
    head = b"".join(parts[key].tobytes() for key in ("header", "fields", "metadata"))
    path.write_bytes(head.ljust(page, b"\0") + b"".join(payloads) + parts["table"].tobytes())
    return path


def an_epoch(path: Path, **options: object) -> None:
    with Loader(path, **({"batch_size": 2, "resolution": SIDE, "workers": 2, "train": False} | options)) as loader:
        list(loader)


WAYS: dict[str, Callable[[Path], object]] = {
    "the loader": an_epoch,
    "the loader, at a fraction": lambda path: an_epoch(path, resolution=SIDE // 4),
    "the loader, into memory": lambda path: an_epoch(path, resident="on"),
    "a picture in the report": lambda path: thumbnail(Beton(path), BAD),
}


@pytest.mark.parametrize("made", [packed, of_another_maker])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_by_name_whoever_reads_it(bomb: str, made: Callable[[Path, bytes], Path], tmp_path: Path, tried) -> None:
    build, reason = BOMBS[bomb]
    path = made(tmp_path / "bomb.beton", build())
    started = time.monotonic()
    with Beton(path) as beton:
        name = beton.names[BAD]
    for way, read in WAYS.items():
        with pytest.raises(SampleError) as caught:
            read(path)
        error = caught.value
        assert (error.path, error.index, error.name) == (path, BAD, name), way
        assert reason in error.reason, way
    assert [(index, reason in found) for index, _, found in verify_beton(path, workers=2).bad] == [(BAD, True)]
    with Loader(path, batch_size=2, resolution=SIDE, workers=2, train=False, on_bad="skip", max_bad=0.5) as loader:
        assert sum(len(batch.ids) for batch in loader) == 5
        assert [error.index for error in loader.skipped] == [BAD]
    assert time.monotonic() - started < PROMPT
    tried("reader: a JPEG that is a bomb or lies about its size", len(WAYS) + 2)


def test_jpegs_of_every_kind_are_accepted_as_often_as_they_are_asked_about(tried) -> None:
    """A preview in the metadata holds the marker of a scan, and a large profile lies before the image."""
    preview = insert(insert(encode(), 0xE1, b"Exif\0\0" + encode()), 0xE2, bytes(6_000))
    kinds = [
        encode(),
        encode(optimize=True),
        encode(progressive=True),
        encode(photo(mode="L")),
        encode(photo(mode="CMYK")),
        preview,
    ]
    for _ in range(2):
        for number, data in enumerate(kinds):
            check_claims(memoryview(data), 64, 64)
            with pytest.raises(JpegError, match="is 64 x 64 pixels, its entry says 64 x 63"):
                check_claims(memoryview(data), 64, 63)
            tried("reader: kinds of JPEGs accepted", number == 0)


@pytest.mark.tries(150, 5_000)
def test_a_jpeg_that_is_let_through_is_of_its_entrys_size_and_decoded_in_little_time(tries: int, tried) -> None:
    """Bytes of the markers changed at random, one or two at a time; the walk has been before, and knows the good ones."""
    chosen = np.random.default_rng(0)
    kinds = [encode(), encode(progressive=True), encode(optimize=True), one_by_one(3)]
    passed = 0
    for number in range(tries):
        data = bytearray(kinds[number % 4])
        side = SIDE if number % 4 == 3 else 64
        check_claims(memoryview(kinds[number % 4]), side, side)
        for place in chosen.integers(0, data.index(b"\xff\xda") + 14, chosen.integers(1, 3)):
            data[place] = chosen.choice([0, 1, 8, 0x11, 0xC0, 0xC2, 0xD9, 0xDA, 0xE0, 0xFF, chosen.integers(256)])
        try:
            check_claims(memoryview(data), side, side)
        except JpegError:
            continue
        passed += 1
        started = time.perf_counter()
        with suppress(ValueError):
            assert simplejpeg.decode_jpeg(data).shape[:2] == (side, side)
        assert time.perf_counter() - started < 5
    assert passed > tries // 10
    tried("reader: markers of a JPEG changed at random: refused, or decoded at the size of its entry", tries)
