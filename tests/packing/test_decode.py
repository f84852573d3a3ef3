"""One way into pixels for every file: what is shown is what was stored, in whatever wrapping; what is lost or empty is an error."""

from __future__ import annotations

import io
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from dicom_cases import dicom_of
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin
from test_jpeg import insert
from test_pack import jpeg, picture, save

from fastretina.beton.jpeg import read_header
from fastretina.errors import JpegError
from fastretina.packing import colour
from fastretina.packing.decode import LENIENT, check_jpeg, decode
from fastretina.packing.pillow import FIRST

PHOTO = picture(96, 64)
PIXELS = np.asarray(PHOTO).astype(int)
GREY = np.asarray(PHOTO.convert("L"))
SIXTEEN = GREY.astype(np.uint16) * 257
LARGE = 10_000  # px: nothing is decoded smaller


def shown(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, LARGE).image).astype(int)


KINDS = {
    "PNG": save(PHOTO, "PNG"),
    "TIFF": save(PHOTO, "TIFF"),
    "TIFF, LZW": save(PHOTO, "TIFF", compression="tiff_lzw"),
    "BigTIFF": save(PHOTO, "TIFF", big_tiff=True),
    "BMP": save(PHOTO, "BMP"),
    "WebP": save(PHOTO, "WEBP", lossless=True),
    "PPM": save(PHOTO, "PPM"),
    "JPEG 2000": save(PHOTO, "JPEG2000"),
    "codestream": save(PHOTO, "JPEG2000", no_jp2=True),
    "DICOM": dicom_of(PHOTO),
}
LOSSY = {
    "JPEG": jpeg(PHOTO, quality=95),
    "progressive": jpeg(PHOTO, quality=95, progressive=True),
    "CMYK": jpeg(PHOTO.convert("CMYK"), quality=95),
    "MPO": save(PHOTO, "MPO", quality=95, save_all=True, append_images=[picture(96, 64, seed=9)]),
    "TIFF of JPEGs": save(PHOTO, "TIFF", compression="jpeg", quality=95),
    "GIF": save(PHOTO.quantize(256), "GIF"),
}


@pytest.mark.parametrize("kind", KINDS | LOSSY)
def test_every_kind_shows_what_was_stored(kind: str) -> None:
    found = decode((KINDS | LOSSY)[kind], LARGE)
    assert found.image.mode == "RGB"
    assert np.abs(np.asarray(found.image).astype(int) - PIXELS).mean() <= (4 if kind in LOSSY else 0)
    assert found.notes == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_whatever_else_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x011A] = TiffImagePlugin.IFDRational(-1, 0)
    with pytest.raises((OverflowError, ValueError, struct.error)):
        exif.tobytes()  # which is what Pillow tries when it turns a picture
    wrapped = b"Exif\0\0II*\0" + struct.pack("<LHHHLLHHLLL", 8, 2, 0x112, 3, 1, orientation, 0x11A, 10, 1, 38, 0)
    wrapped += struct.pack("<ll", -1, 0)
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    if kind == "TIFF":
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[0x112] = orientation
        info[0x10F] = "\N{SNOWMAN}"
        options["tiffinfo"] = info
    else:
        options["exif"] = wrapped
    data = save(PHOTO, kind, **options)
    plain = Image.Exif()
    plain[0x112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(save(PHOTO, "PNG", exif=plain)))))
    found = shown(data)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 3


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(data: bytes, name: bytes, body: bytes) -> bytes:
    """A PNG with one chunk more after its header."""
    return data[:33] + chunk(name, body) + data[33:]


def test_zipped_text_and_broken_extras_of_a_png_are_not_unpacked() -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "<x>" + "k" * 3_000_000 + "</x>", zip=True)
    for data in (
        save(PHOTO, "PNG", pnginfo=text),
        with_chunk(KINDS["PNG"], b"zTXt", b"a\0\0" + bomb),
        with_chunk(KINDS["PNG"], b"iTXt", b"a\0\1\0\0\0" + bomb),
        with_chunk(KINDS["PNG"], b"pHYs", b"?"),
        with_chunk(KINDS["PNG"], b"tIME", b"")[:-1] + KINDS["PNG"][-1:],
    ):
        assert np.array_equal(shown(data), PIXELS)
    bombed = decode(with_chunk(KINDS["PNG"], b"iCCP", b"a\0\0" + bomb), LARGE)
    assert bombed.notes == (colour.BROKEN,)


def test_the_first_of_several_pages_is_shown_and_told() -> None:
    second = picture(96, 64, seed=5)
    for kind, options in (("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        found = decode(save(PHOTO, kind, save_all=True, append_images=[second], **options), LARGE)
        assert found.notes == (FIRST,)
        assert np.array_equal(np.asarray(found.image), PIXELS)
    found = decode(save(PHOTO.quantize(256), "GIF", save_all=True, append_images=[second.quantize(256)]), LARGE)
    assert found.notes == (FIRST,)
    assert np.abs(np.asarray(found.image) - PIXELS).mean() < 4


# ---- colours -----------------------------------------------------------------------------------------------------------


def profile(name: str) -> bytes:
    """sRGB's own, or one whose red is blue's."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if name == "sRGB":
        return data
    data = bytearray(data)
    count = int.from_bytes(data[128:132])
    tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_profiles_are_applied_where_they_say_something_else_than_srgb(kind: str) -> None:
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    same = decode(save(PHOTO, kind, icc_profile=profile("sRGB"), **options), LARGE)
    assert same.notes == ()
    assert np.abs(np.asarray(same.image) - PIXELS).mean() < 2
    swapped = decode(save(PHOTO, kind, icc_profile=profile("swapped"), **options), LARGE)
    assert swapped.notes == (colour.APPLIED,)
    assert np.abs(np.asarray(swapped.image) - PIXELS[..., ::-1]).mean() < 3
    broken = decode(save(PHOTO, kind, icc_profile=profile("sRGB")[:200] + bytes(300), **options), LARGE)
    assert broken.notes == (colour.BROKEN,)
    assert np.abs(np.asarray(broken.image) - PIXELS).mean() < 2


def test_a_profile_of_another_colour_space_is_told_and_ignored() -> None:
    found = decode(save(PHOTO.convert("L"), "PNG", icc_profile=profile("sRGB")), LARGE)
    assert found.notes == (colour.BROKEN,)
    assert np.array_equal(np.asarray(found.image)[..., 0], GREY)


def test_a_jpeg_that_would_pass_through_keeps_its_colours_which_is_told() -> None:
    square = picture(64, 64)
    data = jpeg(square, quality=95, icc_profile=profile("swapped"))
    kept, applied = decode(data, LARGE, passes_at=64), decode(data, LARGE)
    assert (kept.notes, applied.notes) == ((colour.NOT_APPLIED,), (colour.APPLIED,))
    assert np.array_equal(np.asarray(kept.image), simplejpeg.decode_jpeg(data))
    assert decode(jpeg(square, icc_profile=profile("sRGB")), LARGE, passes_at=64).notes == ()


def test_a_profile_in_several_segments_is_put_together() -> None:
    whole = profile("swapped")
    data, parts = jpeg(PHOTO), [whole[:100], whole[100:300], whole[300:]]
    for number in (2, 3, 1):
        data = insert(data, 0xE2, b"ICC_PROFILE\0" + bytes([number, 3]) + parts[number - 1])
    assert read_header(data).profile == whole
    missing = insert(jpeg(PHOTO), 0xE2, b"ICC_PROFILE\0" + bytes([1, 3]) + parts[0])
    assert read_header(missing).profile == b""


# ---- something to see --------------------------------------------------------------------------------------------------


def noisy(level: float, spread: float) -> np.ndarray:
    return np.random.default_rng(0).normal(level, spread, (256, 384, 3)).clip(0, 255).astype(np.uint8)


def lit(share: float, level: int) -> np.ndarray:
    """A noisy black frame of which a share is lit, in a corner."""
    pixels, side = noisy(3, 1.5), round((256 * 384 * share) ** 0.5)
    pixels[:side, :side] = level
    return pixels


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((64, 64, 3), np.uint8), "dark all over"),
        (noisy(5, 2), "dark all over"),
        (lit(0.004, 250), "dark all over"),  # a date burnt into a corner
        (np.full((64, 64, 3), 255, np.uint8), "one colour all over"),
        (np.full((64, 64, 3), (90, 40, 20), np.uint8), "one colour all over"),
        (noisy(254, 0.4), "one colour all over"),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "DICOM"])
def test_what_shows_nothing_is_an_error_on_every_way(pixels: np.ndarray, reason: str, kind: str) -> None:
    image = Image.fromarray(pixels)
    data = dicom_of(pixels) if kind == "DICOM" else save(image, kind)
    with pytest.raises(JpegError, match=f"nothing to see: .*{reason}"):
        decode(data, LARGE)
    if kind == "JPEG":
        with pytest.raises(JpegError, match=f"nothing to see: .*{reason}"):
            check_jpeg(data, read_header(data))


@pytest.mark.parametrize("pixels", [lit(0.02, 20), lit(0.02, 250), noisy(128, 4), noisy(20, 3), picture(16, 16), picture(8, 300)])
def test_dark_and_even_photographs_are_no_error(pixels: np.ndarray) -> None:
    data = jpeg(Image.fromarray(np.asarray(pixels)))
    decode(data, LARGE)
    check_jpeg(data, read_header(data))


def pgm(white: int, values: np.ndarray) -> bytes:
    return b"P5\n# of a camera\n96 64\n%d\n" % white + values.astype(">u2").tobytes()


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_few_bits_in_sixteen_are_an_error_not_a_black_picture(bits: int) -> None:
    values = (np.where(GREY.max() == GREY, 65_535, SIXTEEN) >> (16 - bits)).astype(np.uint16)
    grey = Image.fromarray(values)
    for data in (save(grey, "PNG"), save(grey, "TIFF"), save(grey, "JPEG2000"), dicom_of(values), pgm(65_535, values)):
        with pytest.raises(JpegError, match=f"16-bit picture that uses about {bits} of its bits"):
            decode(data, LARGE)
    deep = np.stack([values] * 3, axis=-1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    data = KINDS["PNG"][:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 64, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    with pytest.raises(JpegError, match="16-bit picture"):
        decode(data, LARGE)


def test_all_sixteen_bits_and_a_white_that_is_told_are_shown() -> None:
    grey = np.stack([GREY] * 3, axis=-1).astype(int)
    image, inverted = Image.fromarray(SIXTEEN), TiffImagePlugin.ImageFileDirectory_v2()
    inverted[262] = 0
    for data in (
        save(image, "PNG"), save(image, "TIFF"), save(image, "JPEG2000"), pgm(65_535, SIXTEEN), pgm(4095, SIXTEEN >> 4),
        save(Image.fromarray(65_535 - SIXTEEN), "TIFF", tiffinfo=inverted),
    ):  # fmt: skip
        assert np.abs(shown(data) - grey).max() <= 1


def test_transparent_all_over_is_an_error() -> None:
    clear = PHOTO.convert("RGBA")
    clear.putalpha(0)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        with pytest.raises(JpegError, match="transparent all over"):
            decode(save(clear, kind, **options), LARGE)


def test_a_preview_in_front_of_a_raw_photograph_is_no_photograph() -> None:
    for tag, value in ((254, 1), (50706, b"\1\4\0\0")):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[tag] = value
        with pytest.raises(JpegError, match="a preview, as in camera raw"):
            decode(save(PHOTO, "TIFF", tiffinfo=info), LARGE)


# ---- damage ------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, chosen: random.Random, number: int) -> bytes:
    """A JPEG whose coded data was flipped, lost, cut off or shortened; its markers stay."""
    start = data.index(b"\xff\xda") + 14
    place = chosen.randrange(start, len(data) - 2)
    if number % 4 == 0:
        return data[:place] + bytes([data[place] ^ 1 << chosen.randrange(8)]) + data[place + 1 :]
    if number % 4 == 1:
        return data[:place] + bytes(len(data) - 2 - place) + data[-2:]
    if number % 4 == 2:
        return data[:place] + data[-2:]
    return data[:place] + data[min(place + chosen.randrange(1, 80), len(data) - 2) :]


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_an_eighth_of_the_size_shows_the_same_damage_as_all_of_it(options: dict[str, object]) -> None:
    image = picture(512, 512)
    image = Image.fromarray(
        (np.asarray(image) + np.random.default_rng(0).normal(0, 9, (512, 512, 3))).clip(0, 255).astype(np.uint8)
    )
    data, chosen, found = jpeg(image, **options), random.Random(0), 0
    for number in range(80):
        broken, whole, eighth = damaged(data, chosen, number), True, True
        try:
            simplejpeg.decode_jpeg(broken, strict=True)
        except ValueError:
            whole = False
        try:
            check_jpeg(broken, read_header(broken))
        except JpegError as error:
            eighth = "cannot be decoded" not in str(error) and "corrupt" not in str(error)
        assert eighth == whole
        found += not whole
    assert found > 40


@pytest.mark.parametrize("longer", [1, LARGE])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_half_lost_jpegs_are_errors_at_any_scale(mode: str, longer: int) -> None:
    data = jpeg(picture(800, 600).convert(mode))
    half = len(data) // 2
    with pytest.raises(JpegError, match="cannot be decoded: "):
        decode(data[:half] + bytes(len(data) - half - 2) + data[-2:], longer)


def test_a_half_lost_jpeg_in_a_tiff_is_an_error() -> None:
    data = save(picture(400, 300), "TIFF", compression="jpeg")
    with Image.open(io.BytesIO(data)) as image:
        start, count = image.tag_v2[273][0], image.tag_v2[279][0]
    middle = start + count // 2
    with pytest.raises(JpegError, match="cannot be decoded: "):
        decode(data[:middle] + bytes(start + count - middle - 2) + data[start + count - 2 :], LARGE)


def test_sampling_factors_that_only_pillow_reads_are_told() -> None:
    data = bytearray(jpeg(PHOTO, keep_rgb=True))  # whose components share their tables, so that blocks may change places
    data[data.index(b"\xff\xc0") + 11] = 0x31
    assert decode(bytes(data), LARGE).notes == (LENIENT,)


SEEDS = KINDS | LOSSY | {
    "EXIF and profile": save(PHOTO, "PNG", icc_profile=profile("swapped"), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "JPEG with a profile": jpeg(PHOTO, icc_profile=profile("swapped")),
    "16 bits": save(Image.fromarray(SIXTEEN), "TIFF"),
    "animated": save(PHOTO.quantize(64), "GIF", save_all=True, append_images=[picture(96, 64, seed=2).quantize(64)]),
    "pages": save(PHOTO, "TIFF", save_all=True, append_images=[PHOTO]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEDS)
def test_corrupt_files_of_every_kind_are_errors_and_never_more(kind: str) -> None:
    data, chosen = SEEDS[kind], random.Random(kind)
    for number in range(60):
        broken = bytearray(data)
        if number % 3 == 0:
            broken = broken[: chosen.randrange(len(data))]
        for _ in range(number % 3 * 2):
            broken[chosen.randrange(len(data) if number % 3 == 1 else min(400, len(data)))] = chosen.randrange(256)
        with suppress(JpegError):
            assert decode(bytes(broken), 64).image.mode == "RGB"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("DICOM",)])
def test_truncated_files_of_every_kind_are_errors(kind: str) -> None:
    data = KINDS[kind]
    for share in (0.1, 0.5, 0.9, 0.99):
        with pytest.raises(JpegError):
            decode(data[: int(share * len(data))], 64)


CLAIMS = {
    "PNG": KINDS["PNG"][:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 65_000, 65_000, 8, 2, 0, 0, 0)) + KINDS["PNG"][33:],
    "GIF": b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + save(PHOTO, "GIF")[10:],
    "GIF's frame": save(PHOTO, "GIF").replace(
        b"," + struct.pack("<HHHH", 0, 0, 96, 64), b"," + struct.pack("<HHHH", 0, 0, 65_000, 65_000)
    ),
    "BMP": KINDS["BMP"][:18] + struct.pack("<ii", 65_000, 65_000) + KINDS["BMP"][26:],
    "PPM": b"P6 65000 65000 255\n" + bytes(100),
    "JPEG 2000": KINDS["codestream"][:8] + struct.pack(">II", 65_000, 65_000) + KINDS["codestream"][16:],
    "DICOM": dicom_of(PHOTO, Rows=65_000, Columns=65_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLAIMS)
def test_claimed_sizes_are_refused_before_anything_is_allocated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JpegError, match=r"claims 65000 x 65000|past the limit"):
        decode(CLAIMS[kind], 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as where we decode
    with pytest.raises(JpegError, match=r"claims 65000 x 65000 pixels"):
        decode(CLAIMS[kind], 64)


def test_tiles_are_refused_by_their_size_too() -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[65_322], info[65_323] = 65_000, 65_000
    data = save(PHOTO, "TIFF", tiffinfo=info)
    for tag in (322, 323):  # which Pillow does not write
        data = data.replace(struct.pack("<H", 65_000 + tag), struct.pack("<H", tag))
    with pytest.raises(JpegError, match="claims tiles of 65000 x 65000 pixels"):
        decode(data, 64)
