"""What a JPEG claims to be, read from its markers without decoding it, and what the converter does with it.

Decoders trust headers: a 34 KB file that claims 65,500 x 65,500 pixels makes one allocate 12 GiB, and 1,300 bytes can
hold 100 scans that take seconds. `read_header` walks the markers first, with limits, in some 25 microseconds for a
fundus photograph; the entropy-coded bytes are skipped by one C-speed search. Pure Python: packing workers import it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from fastretina.errors import JpegError

MAX_SIDE = 16_384


@dataclass(frozen=True)
class Limits:
    """What a header may ask for before it is refused. No fundus camera comes near any of these."""

    side: int = MAX_SIDE  # pixels
    pixels: int = 1 << 27  # 134 megapixels: 384 MiB decoded
    scans: int = 64  # a progressive photograph has about 10
    scan_pixels: int = 1 << 31  # pixels x scans: each scan of a progressive file is a pass over all coefficients
    app_bytes: int = 8 << 20  # APPn and COM segments together: Exif, ICC profiles, previews
    segments: int = 512
    tables: int = 8  # quantisation or Huffman tables in one segment; the standard knows 4 + 4


DEFAULT_LIMITS = Limits()

# SOFn code -> coding process (ITU T.81, table B.1)
_PROCESSES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive", 0xC9: "arithmetic", 0xCA: "arithmetic"}
_UNDECODABLE = {0xC3: "lossless", 0xCB: "lossless"} | dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical")

# Luma factors, where both chroma components are 1 x 1: the layouts that libjpeg-turbo's and NVIDIA's decoders share.
_SUBSAMPLING = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0", (1, 2): "4:4:0", (4, 1): "4:1:1"}

# In entropy-coded data FF is followed by 00 (stuffing), a restart marker or fill; anything else is the next segment.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_FILL = re.compile(rb"\xff+")
_HEAD = 4096  # bytes in which the image data of most photographs begin; with an sRGB profile at 3.8 KB
_HEADS = 256  # such beginnings are kept, 1 MB at most
_EXIF_ORIENTATION, _EXIF_SHORT = 0x0112, 3
_EXIF_ENTRIES = 128  # IFD0 of a camera has 10 to 20, in ascending order; orientation is among the first

Colour = Literal["YCbCr", "grayscale", "RGB", "CMYK", "YCCK", "ambiguous", "unknown"]


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What the markers say. Sizes in pixels or bytes.

    Attributes:
        process: "baseline", "extended" (sequential, Huffman), "progressive", "arithmetic", "lossless" or "hierarchical".
        subsampling: "4:2:0" and so on, "4:0:0" for one component, "other" for layouts that decoders disagree about.
        colour: by libjpeg's rules; "ambiguous" where JFIF (YCbCr) and Adobe (RGB) markers contradict each other.
        orientation: EXIF orientation 1-8; 1 where absent or out of range.
        interleaved: the first scan holds all components. tables_complete: it finds all its Huffman tables and 8-bit
        quantisation tables in the file itself. trailing: bytes after the end-of-image marker.
        profile: the ICC profile, b"" where there is none or a part of it is missing.
    """

    width: int
    height: int
    components: int
    precision: int
    process: str
    subsampling: str
    colour: Colour
    orientation: int
    scans: int
    interleaved: bool
    tables_complete: bool
    app_bytes: int
    trailing: int
    ends_with_eoi: bool
    profile: bytes = b""


@dataclass(slots=True)
class _Walk:
    """What has been seen so far."""

    frame: tuple[int, int, int, int, str] | None = None  # width, height, components, precision, process
    parts: tuple[tuple[int, int, int, int], ...] = ()  # component id, h, v, quantisation table
    quant: int = 0  # bit sets of the 8-bit tables defined before the first scan
    huffman: int = 0
    jfif: bool = False
    adobe: int = -1
    orientation: int = 0
    scans: int = 0
    interleaved: bool = False
    tables_complete: bool = False
    app_bytes: int = 0
    segments: int = 0
    profile: dict[int, memoryview] = field(default_factory=dict)  # its parts by number, from 1
    profile_parts: int = 0


def read_header(data: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> JpegHeader:
    """Walk the markers of `data` (not copied) from start to end.

    A file that stops before its end-of-image marker is not an error here: `ends_with_eoi` says so.

    Raises:
        JpegError: not a JPEG, a malformed or impossible segment, or past `limits`. Never anything else.
    """
    view = memoryview(data)
    if view.ndim != 1 or view.format != "B":
        view = view.cast("B")
    size = len(view)
    if size < 4 or view[0] != 0xFF or view[1] != 0xD8:
        raise JpegError("not a JPEG: it does not start with FF D8" if size else "empty file (0 bytes)")
    walk, position, ended = _Walk(), 2, False
    while position + 1 < size:
        if view[position] != 0xFF:
            raise JpegError(f"corrupt JPEG: no marker at byte {position}")
        if view[position + 1] == 0xFF:
            fill = _FILL.match(view, position)
            position = fill.end() - 1 if fill else position
            continue
        marker = view[position + 1]
        position += 2
        if marker == 0xD9:
            ended = True
            break
        if marker < 0xC0 or marker == 0xC8 or 0xD0 <= marker <= 0xD8 or 0xF0 <= marker <= 0xFD:
            raise JpegError(f"corrupt JPEG: unexpected marker FF {marker:02X} at byte {position - 2}")
        if position + 2 > size:
            break
        length = view[position] << 8 | view[position + 1]
        end = position + length
        if length < 2 or end > size:
            raise JpegError(f"corrupt or truncated JPEG: segment FF {marker:02X} at byte {position - 2} does not fit")
        walk.segments += 1
        if walk.segments > limits.segments:
            raise JpegError(f"more than {limits.segments} segments")
        _segment(walk, marker, view[position + 2 : end], limits)
        position = end
        if marker == 0xDA:
            found = _NEXT_MARKER.search(view, end)
            position = found.start() if found else size
    if walk.frame is None:
        raise JpegError("corrupt or truncated JPEG: no frame header")
    if walk.scans == 0:
        raise JpegError("corrupt or truncated JPEG: no image data")
    return JpegHeader(
        *walk.frame,
        subsampling=_subsampling(walk),
        colour=_colour(walk),
        orientation=walk.orientation or 1,
        scans=walk.scans,
        interleaved=walk.interleaved,
        tables_complete=walk.tables_complete,
        app_bytes=walk.app_bytes,
        trailing=size - position if ended else 0,
        ends_with_eoi=ended,
        profile=b"".join(walk.profile.get(number, b"") for number in range(1, walk.profile_parts + 1))
        if len(walk.profile) == walk.profile_parts
        else b"",
    )


def check_claims(data: memoryview, width: int, height: int) -> None:
    """Raises JpegError where a JPEG claims to be anything but an image of width x height px that is decoded in bounded time.

    For whoever is about to decode it. The markers of most photographs in a data set are the same bytes up to the image data, and
    are walked once: that leaves 2 microseconds of the 16 (and 20 more for the data of a 64 KB file).
    """
    head = bytes(data[:_HEAD])
    start = head.find(b"\xff\xda")
    found = _single_scan(head[: start + 2 + (head[start + 2] << 8 | head[start + 3])]) if 0 < start < len(head) - 3 else None
    if found is None:
        header = read_header(data)
        found = header.width, header.height
    if found != (width, height):
        raise JpegError(f"is {found[0]} x {found[1]} pixels, its entry says {width} x {height}")


@lru_cache(_HEADS)
def _single_scan(head: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that begins with these bytes, up to and with the header of its first scan, where that is the only
    scan whatever follows: all of a baseline file's components in it. libjpeg-turbo calls a second one an error, and passes over
    anything else in one go: 10 MB of tables behind it take 20 ms. None: all of the file is to be walked."""
    try:
        header = read_header(head)
    except JpegError:
        return None
    return (header.width, header.height) if header.process == "baseline" and header.interleaved else None


def _segment(walk: _Walk, marker: int, body: memoryview, limits: Limits) -> None:
    """Take note of one segment; `body` is what follows its length."""
    if marker == 0xDB:
        _quantisation(walk, body, limits)
    elif marker == 0xC4:
        _huffman(walk, body, limits)
    elif marker in _PROCESSES or marker in _UNDECODABLE:
        _frame(walk, marker, body, limits)
    elif marker == 0xDA:
        _scan(walk, body, limits)
    elif marker == 0xDD and len(body) != 2:
        raise JpegError("corrupt JPEG: restart interval of the wrong length")
    elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
        walk.app_bytes += len(body)
        if walk.app_bytes > limits.app_bytes:
            raise JpegError(f"more than {limits.app_bytes} bytes of metadata segments")
        if marker == 0xE0:
            walk.jfif = walk.jfif or bytes(body[:5]) == b"JFIF\0"
        elif marker == 0xEE:
            if len(body) >= 12 and bytes(body[:5]) == b"Adobe":
                walk.adobe = body[11]
        elif marker == 0xE1 and not walk.orientation and bytes(body[:6]) == b"Exif\0\0":
            walk.orientation = exif_orientation(body[6:])
        elif marker == 0xE2 and len(body) > 14 and bytes(body[:12]) == b"ICC_PROFILE\0":
            walk.profile[body[12]], walk.profile_parts = body[14:], body[13]
    elif marker == 0xDC:
        raise JpegError("the height is defined after the image data (DNL), which decoders do not support")
    # DAC, DHP, EXP: the frame header decides about those files


def _frame(walk: _Walk, marker: int, body: memoryview, limits: Limits) -> None:
    if walk.frame is not None:
        raise JpegError("corrupt JPEG: two frame headers")
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise JpegError("corrupt JPEG: frame header of the wrong length")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if not 1 <= components <= 4:
        raise JpegError(f"{components} colour components")
    if width == 0 or height == 0:
        raise JpegError(f"claims {width} x {height} pixels")
    if width > limits.side or height > limits.side or width * height > limits.pixels:
        raise JpegError(
            f"claims {width} x {height} pixels; the limit is {limits.side} a side and {limits.pixels / 1e6:.0f} megapixels"
        )
    parts = tuple((body[i], body[i + 1] >> 4, body[i + 1] & 15, body[i + 2]) for i in range(6, len(body), 3))
    if any(not (1 <= h <= 4 and 1 <= v <= 4 and quant <= 3) for _, h, v, quant in parts):
        raise JpegError("corrupt JPEG: impossible sampling factors or table numbers")
    walk.parts = parts
    walk.frame = (width, height, components, precision, _PROCESSES.get(marker) or _UNDECODABLE[marker])


def _scan(walk: _Walk, body: memoryview, limits: Limits) -> None:
    if walk.frame is None:
        raise JpegError("corrupt JPEG: image data before the frame header")
    count = body[0] if len(body) else 0
    if not 1 <= count <= walk.frame[2] or len(body) != 4 + 2 * count:
        raise JpegError("corrupt JPEG: scan header of the wrong length")
    walk.scans += 1
    if walk.scans > limits.scans or walk.scans * walk.frame[0] * walk.frame[1] > limits.scan_pixels:
        raise JpegError(f"{walk.scans} scans of {walk.frame[0]} x {walk.frame[1]} pixels, past the limit")
    if walk.scans == 1:
        ids = [part[0] for part in walk.parts]
        spectral = (body[1 + 2 * count], body[2 + 2 * count], body[3 + 2 * count])
        walk.interleaved = (
            count == len(ids) and [body[1 + 2 * i] for i in range(count)] == ids and (count == 1 or len(set(ids)) == count)
        )
        needed = 0
        for i in range(count):
            tables = body[2 + 2 * i]
            # Baseline knows two tables of each class; AC tables stand 4 bits above DC tables in the set.
            needed |= 1 << (tables >> 4) | 1 << (4 + (tables & 15)) if tables >> 4 <= 1 and tables & 15 <= 1 else 1 << 8
        quants = 0
        for part in walk.parts:
            quants |= 1 << part[3]
        walk.tables_complete = walk.huffman & needed == needed and walk.quant & quants == quants and spectral == (0, 63, 0)


def _quantisation(walk: _Walk, body: memoryview, limits: Limits) -> None:
    position = tables = 0
    while position < len(body):
        wide, table = body[position] >> 4, body[position] & 15
        position += 129 if wide else 65
        tables += 1
        if wide > 1 or table > 3 or position > len(body) or tables > limits.tables:
            raise JpegError("corrupt JPEG: impossible quantisation table")
        walk.quant = walk.quant & ~(1 << table) if wide else walk.quant | 1 << table


def _huffman(walk: _Walk, body: memoryview, limits: Limits) -> None:
    position = tables = 0
    while position < len(body):
        kind, table = body[position] >> 4, body[position] & 15
        codes = sum(body[position + 1 : position + 17])
        position += 17 + codes
        tables += 1
        if kind > 1 or table > 3 or codes > 256 or position > len(body) or tables > limits.tables:
            raise JpegError("corrupt JPEG: impossible Huffman table")
        walk.huffman |= 1 << (4 * kind + table)


def exif_orientation(tiff: bytes | memoryview) -> int:
    """Orientation 1-8 from a TIFF structure; 0 where absent or unreadable (viewers ignore broken Exif too)."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    if order is None or len(tiff) < 8:
        return 0
    (offset,) = struct.unpack_from(order + "I", tiff, 4)
    if offset + 2 > len(tiff):
        return 0
    (entries,) = struct.unpack_from(order + "H", tiff, offset)
    entries = min(entries, _EXIF_ENTRIES, (len(tiff) - offset - 2) // 12)
    for i in range(entries):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * i)
        if tag == _EXIF_ORIENTATION:
            return value if kind == _EXIF_SHORT and count == 1 and 1 <= value <= 8 else 0
    return 0


def _subsampling(walk: _Walk) -> str:
    if len(walk.parts) == 1:
        return "4:0:0"
    factors = [(h, v) for _, h, v, _ in walk.parts]
    if len(factors) != 3 or factors[1:] != [(1, 1), (1, 1)]:
        return "other"
    return _SUBSAMPLING.get(factors[0], "other")


def _colour(walk: _Walk) -> Colour:
    """libjpeg's guess (default_decompress_parms in jdapimin.c), except that contradictions are named."""
    ids = tuple(part[0] for part in walk.parts)
    match len(ids):
        case 1:
            return "grayscale"
        case 3:
            if walk.jfif:
                return "ambiguous" if walk.adobe == 0 else "YCbCr"
            if walk.adobe >= 0:
                return "RGB" if walk.adobe == 0 else "YCbCr"
            return "RGB" if ids == (0x52, 0x47, 0x42) else "YCbCr"
        case 4:
            return "YCCK" if walk.adobe == 2 else "CMYK"
        case _:
            return "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What packing does with a JPEG, and why in a few words ("" for pass)."""

    action: Literal["pass", "convert", "reject"]
    reason: str = ""


MAX_TRAILING = 64 << 10


def verdict(header: JpegHeader, size: int) -> Verdict:
    """Whether a file with this header goes byte for byte into a .beton of `size` x `size` pixels, or must be re-encoded.

    Extended-sequential files (SOF1) are re-encoded though libjpeg reads them: GPU decoders promise baseline and
    progressive only, and encoders write SOF1 only at qualities so low that another pass costs nothing.
    The table in docs/format.md lists every kind.
    """
    if header.precision != 8:
        return Verdict("reject", f"{header.precision}-bit JPEG, decoders read 8-bit ones")
    if header.process in ("lossless", "hierarchical"):
        return Verdict("reject", f"{header.process} JPEG, which decoders do not read")
    if header.colour == "unknown":
        return Verdict("reject", f"JPEG of {header.components} components")
    if not header.ends_with_eoi:
        return Verdict("reject", "truncated JPEG: the end-of-image marker is missing")
    checks = (
        (header.process != "baseline", header.process),
        (header.colour != "YCbCr", header.colour),
        (header.orientation != 1, "EXIF-rotated"),
        (header.width != size or header.height != size, "other size"),
        (header.scans != 1 or not header.interleaved, "several scans"),
        (header.subsampling == "other", "unusual subsampling"),
        (not header.tables_complete, "incomplete tables"),
        (header.trailing > MAX_TRAILING, "trailing data"),
    )
    reason = next((reason for failed, reason in checks if failed), "")
    return Verdict("convert" if reason else "pass", reason)
