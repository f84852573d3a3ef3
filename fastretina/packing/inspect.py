"""One source image on its way into a .beton: read it, decide by its header whether its bytes may pass through, and check them."""

from __future__ import annotations

import errno
import zlib
from dataclasses import dataclass

from fastretina.errors import JpegError
from fastretina.packing import dicom, kinds
from fastretina.packing.colour import of_pass_through
from fastretina.packing.decode import accepted, check_jpeg
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.system.files import read_regular

MAX_FILE = 256 << 20  # bytes; the largest fundus photographs have 15 MB


@dataclass(frozen=True, slots=True)
class Source:
    """`payload`, a JPEG file, and its `crc` (zlib.crc32); None where it is to be re-encoded, or `bad`. `reason`: why that is.

    notes: what else is to be told of it, in words that are always the same, so that they can be counted.
    """

    payload: bytes | None
    crc: int
    reason: str = ""
    bad: bool = False  # it cannot be packed at all
    notes: tuple[str, ...] = ()


def inspect(path: str, size: int, check: bool = True, preparation: Preparation = UNPREPARED) -> Source:
    """Read the image at `path` for a .beton of `size` x `size` pixels; `check` what would pass through: `decode.check_jpeg`.

    Never raises for a bad image: `bad` and `reason` say what is wrong with it.
    """
    try:
        return look(read_file(path), size, check, preparation)
    except JpegError as error:
        return Source(None, 0, str(error), bad=True)


def look(data: bytes, size: int, check: bool = True, preparation: Preparation = UNPREPARED) -> Source:
    """As `inspect`, of a file's bytes. With any `preparation` nothing passes through, and that is the reason of all. Raises
    JpegError."""
    kind = kinds.readable_kind(data)
    jpeg = data if kind is kinds.JPEG else dicom.contents(data).jpeg if kind is kinds.DICOM else None
    reason = kind.name
    if jpeg is not None:
        header, reason = accepted(jpeg, size)
        if not reason and not preparation:
            if check:
                check_jpeg(jpeg, header)
            return Source(jpeg, zlib.crc32(jpeg), notes=of_pass_through(header.profile))
    return Source(None, 0, str(preparation) if preparation else reason)


def read_file(path: str) -> bytes:
    """All bytes of a regular file of at most 256 MiB. Raises JpegError with the reason, without the path; OSError where that is
    not the file's fault."""
    try:
        return read_regular(path, MAX_FILE)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise JpegError(f"cannot be read: {error.strerror or error}") from None
