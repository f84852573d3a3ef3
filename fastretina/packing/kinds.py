"""What kind of file it is, told by its first bytes, and whether a photograph can be read from it. Imports no library.

The packer and `predict` both ask here, so that a file is an image to one of them if it is to the other. Names tell nothing: clinics
have PNGs called .jpeg, and files without an extension.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastretina.errors import JpegError

EXTENSIONS = (
    ".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".gif", ".jp2", ".j2k", ".dcm",
)  # fmt: skip
HEAD = 256  # bytes that tell the kind


@dataclass(frozen=True, slots=True)
class Kind:
    """name: in words. pillow: the plug-in of Pillow that reads it; "" where Pillow does not.

    readable: a photograph can be read from it. picture: it is one, readable or not; a file that is none is left out of a folder.
    """

    name: str
    pillow: str = ""
    readable: bool = True
    picture: bool = True


JPEG = Kind("JPEG", "JPEG")
PNG = Kind("PNG", "PNG")
TIFF = Kind("TIFF", "TIFF")
BIG_TIFF = Kind("BigTIFF", "TIFF")
TIFFS = (TIFF, BIG_TIFF)
PPM = Kind("PPM", "PPM")
GIF = Kind("GIF", "GIF")
WEBP = Kind("WebP", "WEBP")
JPEG_2000 = Kind("JPEG 2000", "JPEG2000")
DICOM = Kind("DICOM")

_MAGIC = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb".{128}DICM", DICOM),  # first: what stands before it may be a TIFF's beginning, for programs that know no DICOM
        (rb"\xff\xd8", JPEG),
        (rb"\x89PNG\r\n\x1a\n", PNG),
        (rb"II\*\0.{4}CR", Kind("camera raw", readable=False)),  # Canon's CR2, which is a TIFF with a preview in front
        (rb"II\*\0|MM\0\*", TIFF),
        (rb"II\+\0|MM\0\+", BIG_TIFF),
        # Two letters are few: the length of the header, too, is one of those that there are.
        (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", Kind("BMP", "BMP")),
        (rb"RIFF.{4}WEBP", WEBP),
        (rb"P[56]\s", PPM),
        (rb"GIF8[79]a", GIF),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", JPEG_2000),
        (rb".{4}ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", Kind("HEIC", readable=False)),
        (rb".{4}ftypavi[fs]", Kind("AVIF", readable=False)),
        (rb".{4}ftypcrx |IIR[OS]|IIU\0|MMOR|FUJIFILMCCD-RAW", Kind("camera raw", readable=False)),
        (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", Kind("JPEG XL", readable=False)),
        (rb"8BPS", Kind("Photoshop", readable=False)),
        (rb"FOCTFD|HSF-OCT|CMDb", Kind("OCT", readable=False)),  # Topcon's fda and fds; Heidelberg's vol and e2e
        (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", Kind("video", readable=False, picture=False)),
        (rb"%PDF", Kind("PDF", readable=False, picture=False)),
        (rb"PK\x03\x04", Kind("zip", readable=False, picture=False)),
    )
)


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file that begins with `head` (HEAD bytes of it, or all); None where it is unknown."""
    head = head[:HEAD]
    return next((kind for pattern, kind in _MAGIC if pattern.match(head)), None)


def readable_kind(data: bytes) -> Kind:
    """The kind of a file that a photograph can be read from. Raises JpegError, in words, for all others."""
    kind = kind_of(data)
    if kind is None:
        raise JpegError("not an image of a known kind" if data else "empty file (0 bytes)")
    if not kind.readable:
        raise JpegError(f"{kind.name} files are not read; export the photograph as JPEG, PNG, TIFF or DICOM")
    return kind
