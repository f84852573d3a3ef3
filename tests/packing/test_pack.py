"""Packing: what passes through is the same bytes, what cannot is oriented and letterboxed, and failures leave nothing."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg
from PIL import Image

from fastretina.beton.reader import Beton
from fastretina.beton.verify import verify_beton
from fastretina.errors import ConvertError, JpegError, UsageError
from fastretina.packing.pack import write_beton
from fastretina.packing.reencode import ReencodePool, WorkerDied, reencode

SIZE = 64


def picture(width: int = SIZE, height: int = SIZE, seed: int = 0) -> Image.Image:
    """Smooth, asymmetric in every direction, and different for each seed."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    red = 40 + 200 * x / width
    green = 40 + 150 * y / height
    blue = 128 + 80 * np.sin((x + 2 * y) / 17 + seed)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **({"quality": 90} | options))
    return out.getvalue()


def folder(path: Path, files: dict[str, bytes], split: str = "train") -> Path:
    """A data set in the lab layout; grades count 0 to 4 over and over."""
    (path / "data").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / "data" / name).write_bytes(data)
    (path / f"{split}_img.csv").write_text("".join(f"{name.rpartition('.')[0]}\n" for name in files))
    (path / f"{split}_label.csv").write_text("".join(f"{i % 5}\n" for i in range(len(files))))
    return path


def plain(count: int) -> dict[str, bytes]:
    return {f"{i // 2}_{'left' if i % 2 else 'right'}.jpeg": jpeg(picture(seed=i)) for i in range(count)}


def listing(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def descendants() -> set[int]:
    """Process ids of this process's children."""
    return {child.pid for child in psutil.Process().children()}


def mixed() -> dict[str, bytes]:
    """One image of every kind that can be packed."""
    image, out = picture(), io.BytesIO()
    image.save(out, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "0_left.jpeg": jpeg(image),
        "0_right.jpg": jpeg(image, progressive=True),
        "1_left.jpeg": jpeg(image.convert("L")),
        "1_right.jpeg": jpeg(image.convert("CMYK")),
        "2_left.JPG": jpeg(picture(96, 64)),
        "2_right.png": out.getvalue(),
        "3_left.jpg": out.getvalue(),
        "3_right.jpeg": jpeg(image, exif=exif),
        "4_left.jpeg": jpeg(image, keep_rgb=True),
        "4_right.jpeg": jpeg(image, restart_marker_blocks=1),
    }


def test_pass_through_is_byte_for_byte(tmp_path: Path) -> None:
    files = plain(70)
    summary = write_beton(tmp_path / "o.beton", root=folder(tmp_path / "in", files), split="train", size=SIZE, workers=2)
    assert (summary.images, summary.passed, summary.reencoded, summary.skipped) == (70, 70, {}, 0)
    assert summary.grades == (14, 14, 14, 14, 14)
    with Beton(tmp_path / "o.beton") as beton:
        assert [bytes(beton.jpeg(i)) for i in range(70)] == list(files.values())
        assert list(beton.names) == [name.removesuffix(".jpeg") for name in files]
        assert beton.labels.tolist() == [i % 5 for i in range(70)]
        assert beton.ids.tolist() == list(range(70))
    assert listing(tmp_path) == ["in", "o.beton"]


def test_the_rest_is_reencoded_and_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", mixed())
    summary = write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE, workers=2)
    assert summary.passed == 2
    assert summary.reencoded == {
        "CMYK": 1, "EXIF-rotated": 1, "PNG": 2, "RGB": 1, "grayscale": 1, "other size": 1, "progressive": 1,
    }  # fmt: skip
    report = verify_beton(tmp_path / "o.beton", workers=2)
    assert report.bad == ()
    assert "OK" in str(report)
    assert "progressive 1" in str(summary)
    original = np.asarray(picture()).astype(int)
    with Beton(tmp_path / "o.beton") as beton:
        assert set(zip(beton.widths.tolist(), beton.heights.tolist(), strict=True)) == {(SIZE, SIZE)}
        for name in ("0_right", "2_right", "3_left", "4_left"):
            pixels = simplejpeg.decode_jpeg(beton.jpeg(list(beton.names).index(name)))
            assert np.abs(pixels - original).mean() < 3, name
        turned = simplejpeg.decode_jpeg(beton.jpeg(list(beton.names).index("3_right")))
        assert np.abs(turned - np.rot90(original, -1)).mean() < 3


def test_a_worker_found_dead_between_two_images_names_its_image_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found_dead(pool: ReencodePool) -> None:
        raise WorkerDied(2, -9)

    monkeypatch.setattr(ReencodePool, "poll", found_dead)
    monkeypatch.setattr("fastretina.packing.pipeline._CHUNK", 1)  # more than one, so that it looks at its workers in between
    root = folder(tmp_path / "in", plain(3))
    with pytest.raises(ConvertError, match=r"train_img\.csv, line 3: .*1_right\.jpeg: a worker process was killed by signal 9"):
        write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE, workers=2)
    assert listing(tmp_path) == ["in"]


def test_the_output_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    files = {f"a{i}_{name}": data for i in range(8) for name, data in mixed().items()}
    root = folder(tmp_path / "in", files)
    for workers in (1, 2, 5):
        write_beton(tmp_path / f"{workers}.beton", root=root, split="train", size=SIZE, workers=workers)
    one = (tmp_path / "1.beton").read_bytes()
    assert (tmp_path / "2.beton").read_bytes() == one
    assert (tmp_path / "5.beton").read_bytes() == one
    assert str(tmp_path).encode() not in one


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.asarray(picture()).astype(int)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(Image.fromarray(np.ascontiguousarray(stored).astype(np.uint8)), exif=exif, quality=95)
    assert np.abs(simplejpeg.decode_jpeg(reencode(data, SIZE).jpeg) - upright).mean() < 3


@pytest.mark.parametrize(("width", "height"), [(192, 128), (128, 192), (48, 32), (1, 200), (65, 64)])
def test_letterboxing_keeps_the_aspect_ratio_and_pads_with_black(width: int, height: int) -> None:
    light = Image.fromarray(np.linspace(180, 255, width * height).astype(np.uint8).reshape(height, width)).convert("RGB")
    pixels = simplejpeg.decode_jpeg(reencode(jpeg(light), SIZE).jpeg).mean(axis=2)
    bright = pixels > 128
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    scale = SIZE / max(width, height)
    assert pixels.shape == (SIZE, SIZE)
    assert abs(len(columns) - max(1, width * scale)) <= 1
    assert abs(len(rows) - max(1, height * scale)) <= 1
    assert abs(rows[0] - (SIZE - 1 - rows[-1])) <= 1
    assert abs(columns[0] - (SIZE - 1 - columns[-1])) <= 1


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_transparency_becomes_black_and_sixteen_bits_become_eight() -> None:
    clear = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    palette = Image.new("P", (SIZE, SIZE), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50, 90, 90, 90])
    deep = Image.fromarray(np.full((SIZE, SIZE), 51_400, np.uint16))
    one, grey = Image.new("1", (SIZE, SIZE), 1), Image.new("LA", (SIZE, SIZE), (90, 255))
    for image, stripe in ((clear, (9, 99, 9, 255)), (palette, 2), (deep, 25_700), (one, 0), (grey, (9, 255))):
        image.paste(stripe, (0, 0, SIZE, 8))  # something to see
    for data, expected in (
        (save(clear, "PNG"), (0, 0, 0)),
        (save(palette, "PNG"), (200, 100, 50)),
        (save(palette, "PNG", transparency=1), (0, 0, 0)),
        (save(deep, "PNG"), (200, 200, 200)),
        (save(deep, "TIFF"), (200, 200, 200)),
        (save(one, "PNG"), (255, 255, 255)),
        (save(grey, "PNG"), (90, 90, 90)),
    ):
        centre = simplejpeg.decode_jpeg(reencode(data, SIZE).jpeg)[SIZE // 2, SIZE // 2].astype(int)
        assert np.abs(centre - expected).max() <= 2


@pytest.mark.parametrize(
    "data", [b"", b"no image", save(picture(), "PNG")[:200], save(Image.new("F", (9, 9)), "TIFF"), b"%PDF-1.7"]
)
def test_what_pillow_cannot_or_should_not_read_is_our_error(data: bytes) -> None:
    with pytest.raises(JpegError):
        reencode(data, SIZE)


BAD = {
    "empty": b"",
    "text": b"this is not an image",
    "truncated": jpeg(picture())[:-50],
    "truncated progressive": jpeg(picture(), progressive=True)[:-50],
    "truncated png": save(picture(), "PNG")[:300],
    "12-bit": jpeg(picture()).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "bomb": jpeg(picture()).replace(b"\xff\xc0\0\x11\x08\0\x40\0\x40", b"\xff\xc0\0\x11\x08\xff\xdc\xff\xdc"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("row", [0, 40, 69])
def test_the_first_bad_image_stops_with_file_line_and_path(kind: str, row: int, tmp_path: Path) -> None:
    files = plain(70)
    name = list(files)[row]
    files[name] = BAD[kind]
    root = folder(tmp_path / "in", files)
    before = descendants()  # other tests leave multiprocessing's resource tracker
    with pytest.raises(ConvertError) as caught:
        write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE, workers=2)
    assert f"{root / 'train_img.csv'}, line {row + 1}: {root / 'data' / name}: " in str(caught.value)
    assert listing(tmp_path) == ["in"]
    assert descendants() <= before


def test_bad_images_can_be_skipped_and_are_listed(tmp_path: Path) -> None:
    files = plain(40)
    names = list(files)
    files[names[3]], files[names[17]] = BAD["truncated"], BAD["truncated png"]
    root = folder(tmp_path / "in", files)
    (root / "data" / names[30]).unlink()
    (root / "train_img.csv").write_text((root / "train_img.csv").read_text().replace("19_left", "=1+1"))
    summary = write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE, on_bad="skip", max_bad="4")
    assert (summary.images, summary.skipped) == (36, 4)
    with (tmp_path / "o.beton.skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["name"]) for row in rows] == [("4", "1_left"), ("18", "8_left"), ("31", "15_right"), ("40", "'=1+1")]
    assert "truncated" in rows[0]["reason"]
    assert "no image" in rows[2]["reason"]
    with Beton(tmp_path / "o.beton") as beton:
        assert beton.ids.tolist() == [i for i in range(40) if i not in (3, 17, 30, 39)]
        for i, row in enumerate(beton.ids.tolist()):
            assert bytes(beton.jpeg(i)) == files[names[row]]
            assert beton.labels[i] == row % 5


@pytest.mark.parametrize(("limit", "stops"), [("1%", True), ("2%", False), ("1", True), ("2", False), ("0", True)])
def test_too_many_bad_images_stop_after_all(limit: str, stops: bool, tmp_path: Path) -> None:
    files = plain(100)
    for name in list(files)[10:12]:
        files[name] = b"bad"
    root = folder(tmp_path / "in", files)
    try:
        write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE, on_bad="skip", max_bad=limit)
        stopped = False
    except ConvertError as error:
        stopped = "more than --max-bad" in str(error)
    assert stopped == stops
    assert listing(tmp_path) == (["in"] if stops else ["in", "o.beton", "o.beton.skipped.csv"])


def test_an_old_list_of_skipped_rows_does_not_outlive_its_file(tmp_path: Path) -> None:
    (tmp_path / "o.beton.skipped.csv").write_text("row,name,reason\n")
    write_beton(tmp_path / "o.beton", root=folder(tmp_path / "in", plain(3)), split="train", size=SIZE)
    assert listing(tmp_path) == ["in", "o.beton"]


def test_what_passes_through_is_checked_unless_told_not_to(tmp_path: Path) -> None:
    files = plain(10)
    data = bytearray(files["2_left.jpeg"])
    scan = data.index(b"\xff\xda") + 14
    data[scan : scan + 200] = b"\xff\x00" * 100
    files["2_left.jpeg"] = bytes(data)
    root = folder(tmp_path / "in", files)
    summary = write_beton(tmp_path / "o.beton", root=root, split="train", size=SIZE, check=False)
    assert summary.passed == 10
    assert "passed through byte for byte: 10 (not checked)" in str(summary)
    report = verify_beton(tmp_path / "o.beton")
    assert [(index, name) for index, name, _ in report.bad] == [(5, "2_left")]
    for options in ({}, {"verify": True}):
        with pytest.raises(ConvertError, match=r"line 6: .*2_left\.jpeg: cannot be decoded"):
            write_beton(tmp_path / "o2.beton", root=root, split="train", size=SIZE, **options)
    summary = write_beton(tmp_path / "o2.beton", root=root, split="train", size=SIZE, on_bad="skip", max_bad="1")
    assert (summary.passed, summary.skipped) == (9, 1)
    assert "passed through byte for byte: 9 (decoded and looked at)" in str(summary)


def test_the_flags_are_known_without_the_libraries_that_pack() -> None:
    code = "import sys, fastretina.packing.config; sys.exit(bool({'numpy', 'pandas', 'PIL', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_kaggle_layout_and_patients_in_both_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", plain(4))
    (root / "trainLabels.csv").write_text("image,level\n1_left,3\n0_right,1\n")
    summary = write_beton(tmp_path / "k.beton", images=root, labels=root / "trainLabels.csv", size=SIZE)
    assert (summary.images, summary.shared_patients) == (2, None)
    with Beton(tmp_path / "k.beton") as beton:
        assert list(beton.names) == ["1_left", "0_right"]
        assert beton.labels.tolist() == [3, 1]
        assert beton.provenance["layout"] == "table"
    (root / "test_img.csv").write_text("1_left\n7_left\n0_left\n")
    summary = write_beton(tmp_path / "l.beton", root=root, split="train", size=SIZE)
    assert summary.shared_patients == 2
    assert "patients in both train and test: 2" in str(summary)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"root": "x"},
        {"root": "x", "split": "train", "labels": "y"},
        {"labels": "y"},
        {"labels": "y", "images": "x", "split": "train"},
        {"root": "x", "split": "../train"},
        {"root": "x", "split": "train", "size": 0},
        {"root": "x", "split": "train", "size": 16_385},
        {"root": "x", "split": "train", "workers": 0},
        {"root": "x", "split": "train", "max_bad": "many"},
        {"root": "x", "split": "train", "max_bad": "-1%"},
        {"root": "x", "split": "train", "max_bad": "nan%"},
        {"root": "x", "split": "train", "on_bad": "ignore"},
        {"root": "x", "split": "train", "verify": True, "check": False},
    ],
)
def test_wrong_combinations_are_usage_errors(arguments: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_beton(tmp_path / "o.beton", **arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert listing(tmp_path) == []
