"""DICOM: the photograph in it and whose eye it is; what cannot be read is an error in words, and pydicom is never heard."""

from __future__ import annotations

import builtins
import io
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from dicom_cases import dicom_of
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.pixels.utils import pixel_array
from pydicom.uid import JPEG2000, DeflatedExplicitVRLittleEndian, JPEGLSLossless, RLELossless
from test_pack import SIZE, folder, jpeg, picture, save

from fastretina.beton.reader import Beton
from fastretina.errors import ConvertError, JpegError
from fastretina.packing import dicom
from fastretina.packing.decode import decode
from fastretina.packing.inspect import inspect
from fastretina.packing.pack import write_beton

PHOTO = picture()
PIXELS = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))


def shown(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, 10_000).image).astype(int)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.stack([pixels] * 3, axis=-1)


def test_a_jpeg_in_dicom_passes_through_byte_for_byte(tmp_path: Path) -> None:
    data = jpeg(PHOTO)
    root = folder(tmp_path / "in", {"1_left.dcm": dicom_of(PHOTO, data), "1_right.dcm": dicom_of(PHOTO)})
    summary = write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE)
    assert (summary.passed, summary.reencoded) == (1, {"DICOM": 1})
    with Beton(tmp_path / "o.beton") as beton:
        # A fragment has an even number of bytes.
        assert bytes(beton.jpeg(0)) == data + b"\0" * (len(data) % 2)
        assert np.abs(simplejpeg.decode_jpeg(beton.jpeg(1)).astype(int) - PIXELS).mean() < 3


def test_a_jpeg_in_dicom_is_checked_as_any_other(tmp_path: Path) -> None:
    data = jpeg(PHOTO)
    half = len(data) - 200
    root = folder(tmp_path / "in", {"1_left.dcm": dicom_of(PHOTO, data[:half] + bytes(len(data) - half - 2) + b"\xff\xd9")})
    with pytest.raises(ConvertError, match=r"line 1: .*1_left\.dcm: cannot be decoded: Corrupt JPEG data"):
        write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE)


def twelve(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint16) << 4 | pixels >> 4


YBR = np.asarray(PHOTO.convert("YCbCr"))
STORED = {
    "RGB": (dicom_of(PHOTO), PIXELS),
    "RGB, plane by plane": (
        dicom_of(PHOTO, PlanarConfiguration=1, PixelData=np.ascontiguousarray(PIXELS.transpose(2, 0, 1)).tobytes()), PIXELS
    ),
    "YBR_FULL": (dicom_of(YBR, PhotometricInterpretation="YBR_FULL"), PIXELS),
    "MONOCHROME2": (dicom_of(GREY), grey(GREY)),
    "MONOCHROME1": (dicom_of(255 - GREY, PhotometricInterpretation="MONOCHROME1"), grey(GREY)),
    "12 of 16 bits": (dicom_of(twelve(GREY), BitsStored=12, HighBit=11), grey(GREY)),
    "12 bits below an overlay": (dicom_of(twelve(GREY) | 0xF000, BitsStored=12, HighBit=11), grey(GREY)),
    "16 bits": (dicom_of(GREY.astype(np.uint16) * 257), grey(GREY)),
    "JPEG 2000": (dicom_of(PHOTO, save(PHOTO, "JPEG2000", no_jp2=True), JPEG2000, PhotometricInterpretation="YBR_RCT"), PIXELS),
    "JPEG 2000 of YCbCr": (
        dicom_of(PHOTO, save(Image.fromarray(YBR), "JPEG2000", no_jp2=True, mct=0), JPEG2000, PhotometricInterpretation="YBR_FULL"),
        PIXELS,
    ),
    "JPEG 2000, 16 bits": (
        dicom_of(
            GREY.astype(np.uint16) * 257, save(Image.fromarray(GREY.astype(np.uint16) * 257), "JPEG2000", no_jp2=True), JPEG2000
        ),
        grey(GREY),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STORED)
def test_what_is_stored_without_loss_is_shown_as_it_was(kind: str) -> None:
    data, expected = STORED[kind]
    assert np.abs(shown(data) - expected).max() <= (3 if "Y" in kind else 1)


@pytest.mark.parametrize(
    ("encoded", "meaning", "expected"),
    [
        (jpeg(PHOTO, quality=95), "YBR_FULL_422", PIXELS),
        (jpeg(PHOTO.convert("L"), quality=95), "MONOCHROME2", grey(GREY)),
        (jpeg(Image.fromarray(255 - GREY), quality=95), "MONOCHROME1", grey(GREY)),
        (jpeg(PHOTO, quality=95, keep_rgb=True), "RGB", PIXELS),
    ],
)
def test_a_jpeg_in_dicom_has_the_colours_that_both_say(encoded: bytes, meaning: str, expected: np.ndarray) -> None:
    samples = 1 if meaning.startswith("MONO") else 3
    data = dicom_of(PIXELS, encoded, PhotometricInterpretation=meaning, SamplesPerPixel=samples)
    assert np.abs(shown(data) - expected).mean() < 2


def test_without_a_marker_the_header_of_dicom_says_what_the_components_are() -> None:
    bare = jpeg(PHOTO, quality=95, keep_rgb=True)
    place = bare.index(b"\xff\xee")
    bare = bare[:place] + bare[place + 2 + int.from_bytes(bare[place + 2 : place + 4]) :]
    ids = bare.index(b"\xff\xc0") + 10
    bare = bytearray(bare)
    for number in range(3):  # their names are R, G and B, by which decoders would know them
        bare[ids + 3 * number] = number + 1
    scan = bare.index(b"\xff\xda") + 5
    for number in range(3):
        bare[scan + 2 * number] = number + 1
    assert np.abs(shown(bytes(bare)) - PIXELS).mean() > 20
    assert np.abs(shown(dicom_of(PHOTO, bytes(bare), PhotometricInterpretation="RGB")) - PIXELS).mean() < 2
    with pytest.raises(JpegError, match="its colours are unknown; export"):
        decode(dicom_of(PHOTO, jpeg(PHOTO), PhotometricInterpretation="RGB"), 64)


@pytest.mark.parametrize(
    "name",
    ["SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_dcmtk_+eb+cr.dcm",
     "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_small_odd_big_endian.dcm", "SC_rgb_small_odd_jpeg.dcm", "ExplVR_BigEnd.dcm",
     "examples_jpeg2k.dcm", "examples_rgb_color.dcm"],
)  # fmt: skip
def test_other_programs_files_are_shown_as_pydicom_shows_them(name: str) -> None:
    path = str(get_testdata_file(name))
    header = dcmread(path)
    expected = pixel_array(header).astype(float) * 255 / ((1 << header.BitsStored) - 1)
    assert np.abs(shown(Path(path).read_bytes()) - expected).max() <= 1


def test_a_palette_is_applied() -> None:
    found = shown(Path(str(get_testdata_file("examples_palette.dcm"))).read_bytes())
    header = dcmread(str(get_testdata_file("examples_palette.dcm")))
    tables = [np.frombuffer(getattr(header, f"{c}PaletteColorLookupTableData"), "<u2") for c in ("Red", "Green", "Blue")]
    assert np.abs(found - np.stack(tables, axis=-1)[header.pixel_array] / 257).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (dicom_of(np.stack([PIXELS] * 2), NumberOfFrames=2, Rows=SIZE, Columns=SIZE), "DICOM of 2 frames; export the one"),
        (dicom_of(PHOTO, Rows=60_000, Columns=60_000), "claims 60000 x 60000 pixels"),
        (dicom_of(GREY.astype(np.int16), PixelRepresentation=1), "signed, which is no photograph"),
        (dicom_of(GREY.astype(np.uint32)), "32 bits"),
        (dicom_of(GREY.astype(np.uint16) * 16), "16-bit picture that uses about 12 of its bits"),
        (dicom_of(PHOTO, PixelData=PIXELS.tobytes()[:-100]), "broken DICOM: "),
        (dicom_of(PHOTO, jpeg(PHOTO), JPEGLSLossless), "JPEG-LS Lossless .* is not read; export"),
        (dicom_of(PHOTO, b"no picture", JPEG2000), "neither JPEG nor JPEG 2000"),
        (dicom_of(np.zeros_like(PIXELS)), "dark all over"),
        (dicom_of(PHOTO, PhotometricInterpretation="HSV"), "DICOM of HSV is not read"),
        (bytes(128) + b"DICM" + bytes(900), "broken DICOM|without a picture"),
        (Path(str(get_testdata_file("image_dfl.dcm"))).read_bytes(), "deflated DICOM is not read"),
        (Path(str(get_testdata_file("reportsi.dcm"))).read_bytes(), "without a picture"),
        (Path(str(get_testdata_file("JPGExtended.dcm"))).read_bytes(), "12-bit JPEG"),
    ],
)
def test_what_is_no_photograph_is_an_error_that_says_so(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(JpegError, match=reason):
        decode(data, 64)
    (tmp_path / "a.dcm").write_bytes(data)
    inspect(str(tmp_path / "a.dcm"), SIZE)  # raises nothing


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"PatientID": "P 1 ", "ImageLaterality": "R"}, ("P 1", "right")),
        ({"PatientID": "", "Laterality": "L"}, (None, "left")),
        ({"PatientID": "0012", "ImageLaterality": "L", "Laterality": "R"}, ("0012", "left")),
        ({"PatientID": "a", "ImageLaterality": "B"}, ("a", None)),
        ({"PatientID": "a", "Laterality": "U"}, ("a", None)),
        ({}, (None, None)),
    ],
)
def test_patient_and_eye_stand_in_the_header(
    attributes: dict[str, str], expected: tuple[str | None, str | None], tmp_path: Path
) -> None:
    (tmp_path / "1").write_bytes(dicom_of(PHOTO, jpeg(PHOTO), **attributes))
    assert dicom.identity(str(tmp_path / "1")) == expected


def test_what_is_no_dicom_has_no_identity(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(jpeg(PHOTO))
    for name, reason in (("1", "not DICOM"), ("2", "No such file")):
        with pytest.raises(JpegError, match=reason):
            dicom.identity(str(tmp_path / name))


def test_without_pydicom_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object) -> object:
        if name.partition(".")[0] == "pydicom":
            raise ImportError(name)
        return real(name, *arguments)  # type: ignore[arg-type]

    data = dicom_of(PHOTO)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(JpegError, match=r"pip install 'fastretina\[dicom\]'"):
        decode(data, 64)


def test_pydicom_is_imported_only_for_dicom(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(PHOTO))
    code = (
        "import sys; from fastretina.packing.inspect import inspect; "
        f"assert not inspect({str(tmp_path / 'a.jpg')!r}, {SIZE}).bad; sys.exit('pydicom' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("kind", ["RGB", "JPEG 2000", "jpeg", "RLE"])
def test_corrupt_files_are_errors_and_never_more(kind: str, tmp_path: Path) -> None:
    if kind == "RLE":
        header = dcmread(io.BytesIO(dicom_of(PHOTO)))
        header.compress(RLELossless)
        out = io.BytesIO()
        header.save_as(out)
        data = out.getvalue()
        assert np.array_equal(shown(data), PIXELS)
    else:
        data = dicom_of(PHOTO, jpeg(PHOTO)) if kind == "jpeg" else STORED[kind][0]
    chosen = random.Random(kind)
    for number in range(120):
        broken = bytearray(data)
        if number % 3 == 0:
            broken = broken[: chosen.randrange(len(data))]
        else:
            for _ in range(1 + number % 5):
                broken[chosen.randrange(132, 900 if number % 3 == 1 else len(data))] = chosen.randrange(256)
        (tmp_path / "a").write_bytes(broken)
        for read in (lambda: decode(bytes(broken), 64), lambda: dicom.identity(str(tmp_path / "a"))):  # noqa: B023
            with suppress(JpegError):
                read()
    assert DeflatedExplicitVRLittleEndian.encode() == dicom._DEFLATED
