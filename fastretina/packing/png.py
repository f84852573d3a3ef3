"""A PNG as its picture alone: what else it may hold (zipped text without end, animation) is left out before anybody unzips it."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from fastretina.beton.jpeg import exif_orientation
from fastretina.errors import JpegError

_SIGNATURE = 8  # bytes
_MAX_PROFILE = 8 << 20  # bytes; as much metadata as a JPEG may have


class Png(NamedTuple):
    """`data`: a PNG of the critical chunks and transparency. depth: bits a sample. profile: ICC, b"" without, None if broken.

    animated: further pictures follow the first, and were left out.
    """

    data: bytes
    depth: int
    orientation: int
    profile: bytes | None
    animated: bool


def picture_of(data: bytes) -> Png:
    """Raises JpegError: a chunk that does not fit into the file or does not match its checksum, or no end."""
    view, position, kept = memoryview(data), _SIGNATURE, [data[:_SIGNATURE]]
    orientation, animated, name = 1, False, b""
    profile: bytes | None = b""
    while name != b"IEND":
        if position + 12 > len(data):
            raise JpegError("truncated PNG: its end is missing")
        (length,), name = struct.unpack_from(">I", data, position), data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise JpegError("truncated PNG: its last chunk does not fit")
        body = view[position + 8 : end - 4]
        if name[:1].isupper() or name == b"tRNS":  # critical: no picture without it
            if zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
                raise JpegError(f"corrupt PNG: the checksum of a chunk {name!r} at byte {position} does not match")
            kept.append(data[position:end])
        elif name == b"eXIf":
            orientation = exif_orientation(body) or 1
        elif name == b"iCCP":
            profile = _unzipped(bytes(body).partition(b"\0")[2][1:])
        animated = animated or name == b"acTL"
        position = end
    if len(kept[1]) != 25 or kept[1][4:8] != b"IHDR":
        raise JpegError("corrupt PNG: it does not begin with its header")
    return Png(b"".join(kept), kept[1][16], orientation, profile, animated)


def _unzipped(data: bytes) -> bytes | None:
    unzip = zlib.decompressobj()
    try:
        profile = unzip.decompress(data, _MAX_PROFILE)
    except zlib.error:
        return None
    return profile if unzip.eof and profile else None
