"""What Pillow reads (PNG, TIFF, BMP, WebP, PPM, GIF, JPEG 2000), with what Pillow does not look at: limits, depth, lost data."""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, TiffImagePlugin

from fastretina.beton.jpeg import DEFAULT_LIMITS, exif_orientation, read_header
from fastretina.errors import JpegError
from fastretina.packing import kinds
from fastretina.packing.png import picture_of

FIRST = "first of several pages"

# TIFF tags
_SUBFILE, _PHOTOMETRIC, _BITS, _COMPRESSION, _ORIENTATION, _DNG = 254, 262, 258, 259, 274, 50706
_OFFSETS, _COUNTS, _TILE, _JPEG_TABLES = (273, 324), (279, 325), (322, 323), 347
_JPEG_COMPRESSION = 7
_WHITE_IS_ZERO = 0
_PPM_WHITE = re.compile(rb"P[56](?:\s+#[^\n]*)*\s+\d+(?:\s+#[^\n]*)*\s+\d+(?:\s+#[^\n]*)*\s+(\d+)")


class Stored(NamedTuple):
    """A picture as it is stored, of mode L, RGB or CMYK, and what is to be done to it."""

    image: Image.Image
    bits: int = 8  # of a sample in the file
    orientation: int = 1  # of EXIF
    profile: bytes | None = b""  # ICC; None: broken
    shrunk: bool = False
    notes: tuple[str, ...] = ()


def read(data: bytes, kind: kinds.Kind) -> Stored:
    """Decode what Pillow reads; of several pages the first. Raises JpegError, and whatever Pillow raises of a corrupt file."""
    if kind is kinds.PNG:
        png = picture_of(data)
        notes = (FIRST,) if png.animated else ()
        return Stored(_image(png.data, kind)[0], png.depth, png.orientation, png.profile, notes=notes)
    image, bits, info, several = _image(data, kind)
    orientation = exif_orientation(info.get("exif", b"").removeprefix(b"Exif\0\0")) if kind is kinds.WEBP else 1
    return Stored(image, bits, orientation, info.get("icc_profile") or b"", notes=(FIRST,) if several else ())


def _image(data: bytes, kind: kinds.Kind) -> tuple[Image.Image, int, dict[Any, Any], bool]:
    """The picture in memory, bits of a sample, what Pillow found beside it, and whether there are further ones."""
    with Image.open(io.BytesIO(data), formats=(kind.pillow,)) as image:
        width, height = image.size
        limits = DEFAULT_LIMITS
        if max(width, height) > limits.side or width * height > limits.pixels:
            raise JpegError(f"claims {width} x {height} pixels, past the limit")
        bits = 8
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            bits = _check_tiff(image, data)
        elif kind is kinds.JPEG_2000:
            bits = _precision(data)
        elif kind is kinds.PPM and (white := _PPM_WHITE.match(data)) and int(white[1]) > 255:
            bits = 16
        several = bool(getattr(image, "is_animated", False))
        if image.mode == "I" and kind is kinds.PPM:  # 16 bits, stretched to 65,535
            return _eight_bits(np.asarray(image)), bits, image.info, several
        return plain(image), bits, image.info, several


def plain(image: Image.Image) -> Image.Image:
    """As L, RGB or CMYK, transparency over black, 16 bits as 8."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)
        tags = getattr(image, "tag_v2", {})
        return _eight_bits(65_535 - values if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else values)
    if image.mode in ("I", "F"):
        raise JpegError(f"{image.mode}-mode pixels (32 bits) have no defined white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema()[1] == 0:
            raise JpegError("nothing to see: the picture is transparent all over")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    if image.mode in ("L", "RGB", "CMYK"):
        return image.copy()
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(values: npt.NDArray[Any]) -> Image.Image:
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _precision(data: bytes) -> int:
    """Bits of a sample of a JPEG 2000: ISO/IEC 15444-1, A.5.1, of the first component."""
    start = data.find(b"\xff\x4f\xff\x51")
    return (data[start + 42] & 127) + 1 if 0 <= start < len(data) - 42 else 8


def _check_tiff(image: TiffImagePlugin.TiffImageFile, data: bytes) -> int:
    """Bits of a sample. Raises JpegError: a camera's raw file, tiles past the limits, a JPEG in it that is corrupt."""
    tags = image.tag_v2
    if _DNG in tags or int(tags.get(_SUBFILE, 0)) & 1:
        raise JpegError("its first page is a preview, as in camera raw files; export the photograph as JPEG, PNG or TIFF")
    across, down = (int(tags.get(tag, 1)) for tag in _TILE)
    if across * down > DEFAULT_LIMITS.pixels:
        raise JpegError(f"claims tiles of {across} x {down} pixels, past the limit")
    if tags.get(_COMPRESSION) == _JPEG_COMPRESSION:
        _check_strips(tags, data)
    # Pillow turns a TIFF upright by itself, and then writes all its EXIF anew, which fails on what it cannot express.
    exif = image.getexif()
    for tag in [tag for tag in exif if tag != _ORIENTATION or tags.get(_ORIENTATION) is None]:
        del exif[tag]
    return int(max(tags.get(_BITS, (8,))))


def _check_strips(tags: Any, data: bytes) -> None:
    """Decode the JPEGs that a TIFF is made of strictly, which libtiff does not. Raises JpegError, ValueError."""
    offsets, counts = (next((tags[tag] for tag in pair if tag in tags), ()) for pair in (_OFFSETS, _COUNTS))
    tables = bytes(tags.get(_JPEG_TABLES, b""))
    for offset, count in zip(offsets, counts, strict=True):
        strip = data[offset : offset + count]
        if len(strip) < count:
            raise JpegError("truncated TIFF")
        whole = tables[:-2] + strip[2:] if tables else strip
        header = read_header(whole)
        if header.subsampling != "other" and header.components != 4:
            simplejpeg.decode_jpeg(whole, "GRAY", min_width=-(-header.width // 8), min_height=-(-header.height // 8), strict=True)
