"""Every kind of image that a folder of fundus photographs may hold, packed: each as the table in docs/format.md says."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from dicom_cases import dicom_of
from PIL import Image, ImageOps
from test_jpeg import BOMBS, insert, patch_frame
from test_pack import SIZE, folder, jpeg, picture, save

from fastretina.beton.reader import Beton
from fastretina.packing.pack import write_beton

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
PHOTO = picture()


def sampled(name: str) -> bytes:
    return simplejpeg.encode_jpeg(np.asarray(PHOTO), quality=95, colorsubsampling=name)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(PHOTO, exif=exif)


def ycck() -> bytes:
    """Pillow writes CMYK with an Adobe marker, whose last byte says how the colours are stored."""
    data = jpeg(PHOTO.convert("CMYK"))
    place = data.index(b"Adobe") + 11
    return data[:place] + b"\2" + data[place + 1 :]


PASS = ""
# Kind: its bytes, and what it is counted as; PASS: goes through byte for byte; None: rejected.
KINDS: dict[str, tuple[bytes, str | None]] = {
    "4:4:4": (sampled("444"), PASS),
    "4:2:2": (sampled("422"), PASS),
    "4:2:0": (sampled("420"), PASS),
    "4:4:0": (sampled("440"), PASS),
    "4:1:1": (sampled("411"), PASS),
    "restart markers": (jpeg(PHOTO, restart_marker_blocks=1), PASS),
    "EXIF 1": (turned(1), PASS),
    **{f"EXIF {orientation}": (turned(orientation), "EXIF-rotated") for orientation in range(2, 9)},
    "100 bytes behind its end": (jpeg(PHOTO) + bytes(100), PASS),
    "70,000 bytes behind its end": (jpeg(PHOTO) + bytes(70_000), "trailing data"),
    "progressive": (jpeg(PHOTO, progressive=True), "progressive"),
    "grayscale": (jpeg(PHOTO.convert("L")), "grayscale"),
    "CMYK": (jpeg(PHOTO.convert("CMYK")), "CMYK"),
    "YCCK": (ycck(), "YCCK"),
    "RGB": (jpeg(PHOTO, keep_rgb=True), "RGB"),
    "JFIF and Adobe at odds": (insert(jpeg(PHOTO), 0xEE, b"Adobe\0\x64\0\0\0\0\0"), "ambiguous"),
    "one column short": (jpeg(picture(SIZE - 1, SIZE)), "other size"),
    "one row short": (jpeg(picture(SIZE, SIZE - 1)), "other size"),
    "larger": (jpeg(picture(3 * SIZE, 2 * SIZE)), "other size"),
    "PNG named .jpeg": (save(PHOTO, "PNG"), "PNG"),
    "TIFF named .jpeg": (save(PHOTO, "TIFF"), "TIFF"),
    "BMP named .jpeg": (save(PHOTO, "BMP"), "BMP"),
    "WebP named .jpeg": (save(PHOTO, "WEBP", lossless=True), "WebP"),
    "BigTIFF named .jpeg": (save(PHOTO, "TIFF", big_tiff=True), "BigTIFF"),
    "PPM named .jpeg": (save(PHOTO, "PPM"), "PPM"),
    "GIF named .jpeg": (save(PHOTO, "GIF"), "GIF"),
    "JPEG 2000 named .jpeg": (save(PHOTO, "JPEG2000"), "JPEG 2000"),
    "codestream of JPEG 2000 named .jpeg": (save(PHOTO, "JPEG2000", no_jp2=True), "JPEG 2000"),
    "DICOM named .jpeg": (dicom_of(PHOTO), "DICOM"),
    "JPEG of another size in DICOM": (dicom_of(picture(96, 64), jpeg(picture(96, 64))), "other size"),
    "zero bytes": (b"", None),
    "text": (b"this is no image", None),
    "PDF named .jpeg": (b"%PDF-1.7", None),
    "12-bit": (patch_frame(jpeg(PHOTO), 4, b"\x0c"), None),
    "lossless": (patch_frame(jpeg(PHOTO), 1, b"\xc3"), None),
    "hierarchical": (patch_frame(jpeg(PHOTO), 1, b"\xc5"), None),
    "truncated": (jpeg(PHOTO)[:-2], None),
    "truncated PNG": (save(PHOTO, "PNG")[:300], None),
    "65,500 x 65,500": (BOMBS["65,500 x 65,500"], None),
    "1,024 scans": (BOMBS["1,024 scans"], None),
}


def upright(kind: str, data: bytes) -> np.ndarray:
    """What Pillow makes of it: (SIZE, SIZE, 3)."""
    if "DICOM" in kind:
        data = jpeg(picture(96, 64) if "another" in kind else PHOTO)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.pad(ImageOps.exif_transpose(image).convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def documented() -> set[str]:
    """What the table says that images are counted as."""
    rows = [line.split("|") for line in FORMAT.read_text().splitlines() if line.count("|") == 4 and "convert" in line]
    return {word.strip() for row in rows for word in row[3].split(",")}


def test_each_kind_passes_is_converted_or_rejected_as_the_table_says(tmp_path: Path, documented: set[str], tried) -> None:
    names = {kind: f"{number}_left" for number, kind in enumerate(KINDS)}
    root = folder(tmp_path / "in", {f"{names[kind]}.jpeg": data for kind, (data, _) in KINDS.items()})
    out = tmp_path / "o.beton"
    summary = write_beton(out, root=root, split="train", size=SIZE, workers=2, on_bad="skip", max_bad="100%")
    counted = Counter(action for _, action in KINDS.values() if action)
    assert summary.reencoded == counted
    assert counted.keys() <= documented
    with out.with_name("o.beton.skipped.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [
            names[kind] for kind, (_, action) in KINDS.items() if action is None
        ]
    with Beton(out) as beton:
        for kind, (data, action) in KINDS.items():
            if action == PASS:
                assert bytes(beton.jpeg(list(beton.names).index(names[kind]))) == data, kind
            elif action is not None:
                pixels = simplejpeg.decode_jpeg(beton.jpeg(list(beton.names).index(names[kind])))
                assert np.abs(pixels.astype(int) - upright(kind, data)).mean() < 3, kind
    tried("JPEG: kinds of image, each as the table says", len(KINDS))
