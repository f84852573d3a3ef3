"""DICOM: the photograph in a file, and whose eye it is. Imports pydicom (extra `dicom`) when the first such file is met.

A JPEG or a JPEG 2000 in it is handed on as it is, so that it is checked and decoded as any other; pydicom decodes what is not
compressed, and RLE. Nothing of the header is kept but what `identity` returns.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastretina.beton.jpeg import DEFAULT_LIMITS
from fastretina.errors import JpegError
from fastretina.packing.kinds import DICOM, HEAD, JPEG, kind_of
from fastretina.system.files import open_regular

if TYPE_CHECKING:
    from pydicom import Dataset

_AS_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_AS_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_BY_PYDICOM = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MARKED = ("YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "RGB", "MONOCHROME1", "MONOCHROME2")
_NO_TRANSFORM = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"  # the marker that says that a JPEG's components are R, G and B
_MARKERS = 512  # bytes of a JPEG in which JFIF's and Adobe's markers lie, which are the first
_EXPORT = "export the photograph as JPEG, PNG or uncompressed DICOM"

# pydicom warns of all that is not by the book, through a filter that belongs to the whole process.
_LOCK = threading.Lock()


class Contents(NamedTuple):
    """What a DICOM file holds: either `encoded`, a JPEG or JPEG 2000 file, or `pixels`, uint8 (H, W) or (H, W, 3) RGB.

    inverted: 0 is white (of what `encoded` decodes to; `pixels` are as they should be). ybr: `encoded` decodes to YCbCr.
    bits: of a stored sample.
    """

    encoded: bytes | None = None
    pixels: npt.NDArray[np.uint8] | None = None
    inverted: bool = False
    ybr: bool = False
    bits: int = 8

    @property
    def jpeg(self) -> bytes | None:
        """The JPEG that shows the photograph as it is, if it is one."""
        return self.encoded if self.encoded is not None and kind_of(self.encoded) is JPEG and not self.inverted else None


def contents(data: bytes) -> Contents:
    """The one photograph in a DICOM file. Raises JpegError: broken, several frames, none, or stored in a way that is not read."""
    if _DEFLATED in data:
        raise JpegError(f"deflated DICOM is not read; {_EXPORT}")
    with _pydicom():
        from pydicom import dcmread

        return _contents(dcmread(BytesIO(data)))


def _contents(header: Dataset) -> Contents:
    if "PixelData" not in header:
        raise JpegError("DICOM without a picture")
    if (frames := int(header.get("NumberOfFrames") or 1)) != 1:
        raise JpegError(f"DICOM of {frames} frames; export the one to be graded")
    width, height, limits = int(header.Columns), int(header.Rows), DEFAULT_LIMITS
    if not (0 < width <= limits.side and 0 < height <= limits.side and width * height <= limits.pixels):
        raise JpegError(f"claims {width} x {height} pixels, past the limit")
    samples, stored, allocated = (int(header.get(name) or 1) for name in ("SamplesPerPixel", "BitsStored", "BitsAllocated"))
    meaning, syntax = str(header.PhotometricInterpretation), header.file_meta.TransferSyntaxUID
    if samples not in (1, 3) or allocated not in (8, 16) or stored > allocated or header.get("PixelRepresentation"):
        raise JpegError(f"DICOM of {samples} samples of {stored} bits in {allocated}, or signed, which is no photograph")
    if syntax in _BY_PYDICOM:
        return Contents(pixels=_pixels(header, meaning, stored), bits=stored)
    if syntax not in (*_AS_JPEG, *_AS_JPEG_2000) or meaning not in _MARKED:
        raise JpegError(f"{getattr(syntax, 'name', syntax)} of {meaning} in DICOM is not read; {_EXPORT}")
    from pydicom.encaps import generate_frames

    encoded = next(generate_frames(header.PixelData, number_of_frames=1))
    if syntax in _AS_JPEG_2000:
        return Contents(encoded, inverted=meaning == "MONOCHROME1", ybr=meaning.startswith("YBR_FULL"), bits=stored)
    if meaning == "RGB" and b"Adobe" not in encoded[:_MARKERS]:
        if b"JFIF" in encoded[:_MARKERS]:  # both kinds of file exist: cameras label wrongly, and archives rewrite markers
            raise JpegError(f"DICOM that says RGB, of a JPEG that says YCbCr: its colours are unknown; {_EXPORT}")
        encoded = encoded[:2] + _NO_TRANSFORM + encoded[2:]  # without a marker every decoder takes it for YCbCr
    return Contents(encoded, inverted=meaning == "MONOCHROME1", bits=stored)


def _pixels(header: Dataset, meaning: str, stored: int) -> npt.NDArray[np.uint8]:
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    values: npt.NDArray[Any] = pixel_array(header)  # YBR_FULL and YBR_FULL_422 as RGB
    white = (1 << stored) - 1
    if meaning == "PALETTE COLOR":
        white = (1 << int(header.RedPaletteColorLookupTableDescriptor[2])) - 1
        values = apply_color_lut(values, header)
    elif meaning not in ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422"):
        raise JpegError(f"DICOM of {meaning} is not read; {_EXPORT}")
    if values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,)):
        raise JpegError(f"broken DICOM: pixels of shape {values.shape}")
    # What lies above the stored bits is none of the picture's.
    scaled = (((values.astype(np.uint32) & white) * 255 + white // 2) // white).astype(np.uint8)
    return 255 - scaled if meaning == "MONOCHROME1" else scaled


def identity(path: str) -> tuple[str | None, Literal["left", "right"] | None]:
    """Whose photograph a DICOM file is: PatientID, and which eye (ImageLaterality, else Laterality; None for both or unknown).

    Reads no pixels. Raises JpegError without the path.
    """
    try:
        descriptor, _ = open_regular(path)
    except OSError as error:
        raise JpegError(f"cannot be read: {error.strerror or error}") from None
    with os.fdopen(descriptor, "rb") as file:
        head = file.read(1 << 14)
        if kind_of(head[:HEAD]) is not DICOM:
            raise JpegError("not DICOM")
        if _DEFLATED in head:
            raise JpegError(f"deflated DICOM is not read; {_EXPORT}")
        file.seek(0)
        return _identity(file)


def _identity(file: BinaryIO) -> tuple[str | None, Literal["left", "right"] | None]:
    with _pydicom():
        from pydicom import dcmread

        header = dcmread(file, stop_before_pixels=True, specific_tags=["PatientID", "ImageLaterality", "Laterality"])
        patient = str(header.get("PatientID") or "").strip() or None
        side = str(header.get("ImageLaterality") or header.get("Laterality") or "").strip().upper()
    return patient, "left" if side == "L" else "right" if side == "R" else None


@contextmanager
def _pydicom() -> Iterator[None]:
    """For whatever calls pydicom: quiet, one at a time, and all that it raises of a broken file is a JpegError."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise JpegError("DICOM files need pydicom; install it with: pip install 'fastretina[dicom]'") from None
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except JpegError:
            raise
        except Exception as error:  # whatever its parsers meet: ValueError, KeyError, struct.error, RecursionError
            raise JpegError(f"broken DICOM: {error or type(error).__name__}") from None
