"""The header walk: what it says about real files (Pillow as oracle), its limits, and that it raises only its own error."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastretina.beton.jpeg import JpegHeader, Limits, Verdict, read_header, verdict
from fastretina.errors import JpegError


def photo(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    rgb = np.stack([x * 255 / width, y * 255 / height, 128 + 60 * np.sin(x / 5)], axis=-1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encode(image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or photo()).save(out, "JPEG", **({"quality": 90} | options))
    return out.getvalue()


def with_exif(orientation: int, order: str = "<") -> bytes:
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return insert(encode(), 0xE1, b"Exif\0\0" + tiff)


def insert(data: bytes, marker: int, body: bytes) -> bytes:
    return data[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + data[2:]


def patch_frame(data: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite bytes of the frame header, counted from its marker."""
    at = data.index(b"\xff\xc0") + offset
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(("name", "sampling"), [("4:4:4", "4:4:4"), ("4:2:2", "4:2:2"), ("4:2:0", "4:2:0")])
def test_an_ordinary_jpeg_passes(name: str, sampling: str) -> None:
    header = read_header(encode(subsampling=name))
    assert header == JpegHeader(64, 64, 3, 8, "baseline", sampling, "YCbCr", 1, 1, True, True, 14, 0, True)
    assert verdict(header, 64) == Verdict("pass")


@pytest.mark.parametrize("sampling", ["440", "411"])
def test_rarer_subsamplings_pass(sampling: str) -> None:
    data = simplejpeg.encode_jpeg(np.asarray(photo()), colorsubsampling=sampling)
    assert verdict(read_header(data), 64) == Verdict("pass")


@pytest.mark.parametrize(("width", "height"), [(511, 512), (512, 511), (1, 1), (1000, 7)])
def test_size_is_what_pillow_says(width: int, height: int) -> None:
    header = read_header(encode(photo(width, height)))
    assert (header.width, header.height) == (width, height)
    assert verdict(header, 512) == Verdict("convert", "other size")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_will_do(kind: type) -> None:
    assert read_header(kind(encode())).width == 64


@pytest.mark.parametrize(
    ("data", "action", "reason"),
    [
        (encode(progressive=True), "convert", "progressive"),
        (encode(photo(mode="L")), "convert", "grayscale"),
        (encode(photo(mode="CMYK")), "convert", "CMYK"),
        (encode(keep_rgb=True), "convert", "RGB"),
        (with_exif(6), "convert", "EXIF-rotated"),
        (with_exif(1), "pass", ""),
        (encode(restart_marker_blocks=2), "pass", ""),
        (encode() + b"\0" * 100, "pass", ""),
        (encode() + b"\0" * 70_000, "convert", "trailing data"),
        (patch_frame(encode(), 1, b"\xc1"), "convert", "extended"),
        (patch_frame(encode(), 1, b"\xc9"), "convert", "arithmetic"),
        (patch_frame(encode(subsampling="4:2:0"), 11, b"\x31"), "convert", "unusual subsampling"),
        (encode().replace(b"\xff\xc4", b"\xff\xfe"), "convert", "incomplete tables"),
        (insert(encode(), 0xEE, b"Adobe\0\x64\0\0\0\0\0"), "convert", "ambiguous"),
        (patch_frame(encode(), 4, b"\x0c"), "reject", "12-bit"),
        (patch_frame(encode(), 1, b"\xc3"), "reject", "lossless"),
        (patch_frame(encode(), 1, b"\xc5"), "reject", "hierarchical"),
        (encode()[:-2], "reject", "truncated"),
        (encode()[:-200], "reject", "truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind_has_its_verdict(data: bytes, action: str, reason: str) -> None:
    found = verdict(read_header(data), 64)
    assert found.action == action
    assert reason in found.reason
    assert bool(found.reason) == (action != "pass")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_is_what_pillow_says(orientation: int, order: str) -> None:
    data = with_exif(orientation, order)
    assert read_header(data).orientation == orientation == Image.open(io.BytesIO(data)).getexif()[0x0112]


@pytest.mark.parametrize(
    "body", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0XX*\0\x08\0\0\0"]
)
def test_broken_exif_means_upright(body: bytes) -> None:
    assert read_header(insert(encode(), 0xE1, body)).orientation == 1


def test_trailing_bytes_are_reported() -> None:
    assert read_header(encode(restart_marker_blocks=2)).trailing == 0
    assert read_header(encode() + b"tail").trailing == 4


def test_separate_scans_are_counted() -> None:
    header = read_header(encode(progressive=True))
    assert header.process == "progressive"
    assert header.scans > 5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        encode()[:30],
        encode()[:300],
        insert(encode(), 0xDD, b"\0"),
        insert(encode(), 0xC0, b"\x08\0\x10\0\x10\x01\x01\x11\0"),
        insert(encode(), 0xDC, b"\0\x10"),
        insert(encode(), 0xDB, b"\x05" + bytes(64)),
        insert(encode(), 0xC4, b"\0" + b"\xff" * 16),
        insert(encode(), 0xDA, b"\x01\x01\0\0\x3f\0"),
        insert(encode(), 0x02, b""),
        patch_frame(encode(), 9, b"\x05"),
        patch_frame(encode(), 11, b"\x00"),
        patch_frame(encode(), 5, b"\0\0"),
        patch_frame(encode(), 7, b"\0\0"),
    ],
)
def test_malformed_data_is_our_error(data: bytes) -> None:
    with pytest.raises(JpegError):
        read_header(data)


def scans(count: int) -> bytes:
    data = encode(progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + b"\xff\xd9"


BOMBS = {
    "65,500 x 65,500": patch_frame(encode(), 5, struct.pack(">HH", 65_500, 65_500)),
    "16,384 x 16,384": patch_frame(encode(), 5, struct.pack(">HH", 16_384, 16_384)),
    "1,024 scans": scans(1024),
    "40 scans of 60 megapixels": scans(40).replace(
        b"\xff\xc2\0\x11\x08\0\x40\0\x40", b"\xff\xc2\0\x11\x08" + struct.pack(">HH", 8_000, 8_000)
    ),
    "100 MB of metadata": encode()[:2] + (b"\xff\xe2\xff\xff" + bytes(65_533)) * 1_600 + encode()[2:],
    "100,000 segments": encode()[:2] + b"\xff\xfe\0\2" * 100_000 + encode()[2:],
    "4,000 tables": insert(encode(), 0xC4, bytes(17) * 3_800),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_with_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(JpegError):
            read_header(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_limits_can_be_chosen() -> None:
    with pytest.raises(JpegError, match="64 x 64"):
        read_header(encode(), Limits(side=63))
    with pytest.raises(JpegError, match="metadata"):
        read_header(encode(), Limits(app_bytes=13))


def test_fill_bytes_before_a_marker_are_skipped() -> None:
    data = encode()
    assert read_header(data[:2] + b"\xff" * 1_000_000 + data[2:]).width == 64


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_raise_only_our_error(tail: bytes) -> None:
    for data in (tail, b"\xff\xd8" + tail, b"\xff\xd8\xff" + tail):
        with pytest.raises(JpegError):
            read_header(data)


_SEEDS = [encode(), encode(progressive=True), with_exif(6), encode(photo(mode="CMYK")), encode(restart_marker_blocks=1)]


@settings(max_examples=600)
@given(st.sampled_from(_SEEDS), st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=8), st.integers(0, 3000))
def test_damaged_files_give_a_header_or_our_error(seed: bytes, edits: list[tuple[int, int]], length: int) -> None:
    data = bytearray(seed)
    for place, value in edits:
        data[place % len(data)] = value
    try:
        header = read_header(bytes(data[: length or None]))
    except JpegError:
        return
    assert 1 <= header.width <= 16_384
    assert 1 <= header.height <= 16_384
    assert 1 <= header.scans <= 64
    assert verdict(header, 64).action in ("pass", "convert", "reject")


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=3))
def test_what_passes_has_the_size_that_the_decoder_sees(edits: list[tuple[int, int]]) -> None:
    data = bytearray(_SEEDS[0])
    for place, value in edits:
        data[place % len(data)] = value
    try:
        if verdict(read_header(data), 64).action != "pass":
            return
    except JpegError:
        return
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(bytes(data), strict=False)
    except ValueError:
        return  # passes, and is then found by the decoder: the walk does not promise to decode
    assert (height, width) == (64, 64)
