"""Any photograph as upright RGB pixels, decoded strictly: a picture of which a part is lost, or that shows nothing, is an error.

Every image that is decoded comes this way, whether to be packed or to be graded, so that one file is treated the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastretina.beton.jpeg import JpegHeader, exif_orientation, read_header, verdict
from fastretina.errors import JpegError
from fastretina.packing import dicom, kinds
from fastretina.packing.colour import of_pass_through, to_srgb
from fastretina.packing.pillow import Stored, plain, read
from fastretina.packing.seen import check_seen

LENIENT = "damage not looked for"  # by the only decoder that reads it

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LOOK = 64  # px of the shorter side that are enough to see whether there is anything to see


class Picture(NamedTuple):
    """`image`: RGB, upright. shrunk: decoded to 1/2, 1/4 or 1/8. notes: what is to be told, in words that are always the same."""

    image: Image.Image
    shrunk: bool = False
    notes: tuple[str, ...] = ()


def decode(data: bytes, longer: float, shorter: float = 0, passes_at: int = 0) -> Picture:
    """Decode a file of any kind that can be read. A JPEG may come smaller, but no side below `longer` and `shorter` px.

    passes_at: a JPEG that a .beton of so many pixels a side takes byte for byte keeps its colours here, too, profile or not.

    Raises:
        JpegError: undecodable, corrupt or truncated; past the limits of `fastretina.beton.jpeg`; nothing to see.
    """
    return _finished(lambda: _stored(data, longer, shorter, passes_at))


def of_image(image: Image.Image) -> Picture:
    """A picture that is open in Pillow already, as `decode` would have made it of its file: upright, its colour profile applied,
    transparency black. Raises JpegError."""
    exif = exif_orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    return _finished(lambda: Stored(plain(image), orientation=exif, profile=image.info.get("icc_profile") or b""))


def _finished(read_it: Callable[[], Stored]) -> Picture:
    try:
        stored = read_it()
        image, notes = stored.image, stored.notes
        if stored.bits > 8:
            _check_depth(image, stored.bits)
        image, told = to_srgb(image, stored.profile)
        notes += told
        if (method := _UPRIGHT.get(stored.orientation)) is not None:
            image = image.transpose(method)
        check_seen(np.asarray(image))
    except JpegError:
        raise
    except Image.DecompressionBombError as error:  # where the process that calls has left Pillow its own limit
        raise JpegError(f"past the limit: {error}") from None
    except UnidentifiedImageError:
        raise JpegError("cannot be decoded: corrupt or truncated at its beginning") from None
    except Exception as error:  # Pillow raises whatever its plug-ins meet: OSError, SyntaxError, ValueError, struct.error
        raise JpegError(f"cannot be decoded: {error or type(error).__name__}") from None
    return Picture(image, stored.shrunk, notes)


def check_jpeg(data: bytes, header: JpegHeader) -> None:
    """Raises JpegError where a JPEG is corrupt or shows nothing. Takes half the time of decoding it.

    All coded data is read at 1/8 of the size, too: of 3,000 files of five kinds, damaged in four ways, a strict decoder refused at
    1/8 the very same as at full size.
    """
    try:
        check_seen(_decode_jpeg(data, header, _LOOK, _LOOK)[0])
    except ValueError as error:
        raise JpegError(f"cannot be decoded: {error}") from None


def accepted(data: bytes, size: int) -> tuple[JpegHeader, str]:
    """A JPEG's header, and why it cannot go byte for byte into a .beton of `size` px; "" where it can. JpegError: it is refused."""
    header = read_header(data)
    found = verdict(header, size)
    if found.action == "reject":
        raise JpegError(found.reason)
    return header, found.reason


def _check_depth(image: Image.Image, bits: int) -> None:
    """JpegError where 12 bits were stored in 16 without being scaled: it would be a black picture.

    A quarter of the range is the limit. No photograph is so dark that not one of all its pixels reaches it.
    """
    extrema = image.getextrema()
    top = int(max(pair[1] for pair in extrema) if isinstance(extrema[0], tuple) else extrema[1])
    if top <= 64:
        used = bits - 8 + max(0, top - 1).bit_length()
        raise JpegError(f"{bits}-bit picture that uses about {used} of its bits; save it with 8 bits, or with all {bits} used")


def _stored(data: bytes, longer: float, shorter: float, passes_at: int) -> Stored:
    kind = kinds.readable_kind(data)
    if kind is kinds.DICOM:
        return _dicom(dicom.contents(data), longer, shorter, passes_at)
    if kind is kinds.JPEG:
        return _jpeg(data, longer, shorter, passes_at)
    return read(data, kind)


def _jpeg(data: bytes, longer: float, shorter: float, passes_at: int) -> Stored:
    header, reason = accepted(data, passes_at)
    try:
        pixels, shrunk = _decode_jpeg(data, header, longer, shorter)
    except ValueError as error:
        if header.subsampling != "other" or "subsampling" not in str(error):
            raise
        return read(data, kinds.JPEG)._replace(orientation=header.orientation, profile=header.profile, notes=(LENIENT,))
    stored = Stored(_image(pixels), orientation=header.orientation, profile=header.profile, shrunk=shrunk)
    if not reason and header.profile:
        return stored._replace(profile=b"", notes=of_pass_through(header.profile))
    return stored


def _decode_jpeg(data: bytes, header: JpegHeader, longer: float, shorter: float) -> tuple[npt.NDArray[np.uint8], bool]:
    """(H, W, 3) or CMYK (H, W, 4) or grey (H, W), and whether shrunk. Raises ValueError."""
    scale = max(longer / max(header.width, header.height), shorter / min(header.width, header.height))
    factor = next((factor for factor in (8, 4, 2) if scale * factor <= 1), 1)
    colours = {"grayscale": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(header.colour, "RGB")
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, colours, min_width=-(-header.width // factor), min_height=-(-header.height // factor), strict=True
    )
    if colours == "CMYK":
        pixels = 255 - pixels  # the convention of Adobe, which all programs follow that write such files
    return pixels, factor > 1


def _image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return Image.frombuffer("CMYK", pixels.shape[1::-1], np.ascontiguousarray(pixels), "raw", "CMYK", 0, 1)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _dicom(found: dicom.Contents, longer: float, shorter: float, passes_at: int) -> Stored:
    if found.pixels is not None:
        return Stored(Image.fromarray(found.pixels), bits=found.bits)
    assert found.encoded is not None
    kind = kinds.kind_of(found.encoded)
    if kind is kinds.JPEG:
        stored = _jpeg(found.encoded, longer, shorter, passes_at)
    elif kind is kinds.JPEG_2000:
        stored = read(found.encoded, kind)
    else:
        raise JpegError("broken DICOM: neither JPEG nor JPEG 2000, as it says")
    if found.ybr:
        image = Image.merge("YCbCr", stored.image.split()).convert("RGB")
        return stored._replace(image=image)
    if found.inverted:
        return stored._replace(image=Image.eval(stored.image, lambda value: 255 - value))
    return stored
