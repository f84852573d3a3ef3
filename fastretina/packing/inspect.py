"""One source image on its way into a .beton: read it, look at its header, decide whether its bytes may pass through."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import simplejpeg

from fastretina.beton.jpeg import read_header, verdict
from fastretina.errors import JpegError
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.system.files import read_regular

MAX_FILE = 256 << 20  # bytes; the largest fundus photographs have 15 MB

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
    (b"RIFF", "WebP"),
    (b"P5", "PPM"),
    (b"P6", "PPM"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """`payload`, a JPEG file, and its `crc` (zlib.crc32); None where it is to be re-encoded, or `bad`. `reason`: why that is."""

    payload: bytes | None
    crc: int
    reason: str = ""
    bad: bool = False  # it cannot be packed at all


def inspect(path: str, size: int, verify: bool = False, preparation: Preparation = UNPREPARED) -> Source:
    """Read the image at `path` for a .beton of `size` x `size` pixels; `verify` also decodes what would pass through.

    With any `preparation` nothing passes through, and that is the reason of all.
    Never raises for a bad image: `bad` and `reason` say what is wrong with it.
    """
    try:
        data = read_file(path)
        if data[:2] != b"\xff\xd8":
            kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)
            if kind is None:
                raise JpegError("not an image of a known kind" if data else "empty file (0 bytes)")
            return Source(None, 0, str(preparation) if preparation else kind)
        found = verdict(read_header(data), size)
        if found.action == "reject":
            raise JpegError(found.reason)
        if preparation:
            return Source(None, 0, str(preparation))
        if found.action == "convert":
            return Source(None, 0, found.reason)
        if verify:
            simplejpeg.decode_jpeg(data, strict=True)
    except JpegError as error:
        return Source(None, 0, str(error), bad=True)
    except ValueError as error:
        return Source(None, 0, f"cannot be decoded: {error}", bad=True)
    return Source(data, zlib.crc32(data))


def read_file(path: str) -> bytes:
    """All bytes of a regular file of at most 256 MiB. Raises JpegError with the reason, without the path."""
    try:
        return read_regular(path, MAX_FILE)
    except OSError as error:
        raise JpegError(f"cannot be read: {error.strerror or error}") from None
