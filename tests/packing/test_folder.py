"""What lies in a folder: photographs are told by what they are, and all else is counted by kind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from fastretina.errors import JpegError
from fastretina.packing.folder import AGAIN, HIDDEN, LINKED, in_words, walk
from fastretina.packing.kinds import kind_of, readable_kind

JPEG = b"\xff\xd8\xff\xe0" + bytes(20)
HEIC = b"\0\0\0\x18ftypheic" + bytes(20)
DICOM = bytes(128) + b"DICM" + bytes(20)


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def names(root: Path, paths: Iterable[str]) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in paths]


def test_images_are_told_by_content_or_extension_and_the_rest_is_counted(tmp_path: Path) -> None:
    files = {"b.JPG": b"", "a": JPEG, "a.JPG_large": JPEG, "1.2.840.1": DICOM, "x.heic": HEIC, "deep/c.png": b"text", "-.tif": b""}
    others = {"Thumbs.db": b"x", "more.db": b"x", ".DS_Store": b"x", "._b.JPG": JPEG, ".git/a.jpg": JPEG, "DICOMDIR": DICOM}
    documents = {"notes.txt": b"BM and P5", "report.pdf": b"%PDF-1.4", "empty": b""}
    found = walk(fill(tmp_path, files | others | documents))
    assert names(tmp_path, found.images) == ["-.tif", "1.2.840.1", "a", "a.JPG_large", "b.JPG", "deep/c.png", "x.heic"]
    assert found.left_out == {".db": 2, HIDDEN: 3, "DICOMDIR": 1, ".txt": 1, ".pdf": 1, "no extension": 1}
    assert in_words(found.left_out) == "2 .db, 1 .pdf, 1 .txt, 1 DICOMDIR, 3 hidden, 1 no extension"
    assert (found.links, found.unlisted) == (set(), [])


def test_links_to_folders_are_followed_when_asked_and_each_folder_once(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", {"z/1.jpg": JPEG, "y/2.jpg": JPEG})
    fill(tmp_path / "nas", {"3.jpg": JPEG, "deep/4.jpg": JPEG})
    for link, target in (("2024", "../nas"), ("a", "z"), ("y/up", ".."), ("again", "../nas")):
        (root / link).symlink_to(target)
    (root / "5.jpg").symlink_to("../nas/3.jpg")
    (root / "gone.jpg").symlink_to("nowhere")
    kept = walk(root)
    assert names(root, kept.images) == ["5.jpg", "gone.jpg", "y/2.jpg", "z/1.jpg"]
    assert names(root, sorted(kept.links)) == ["5.jpg", "gone.jpg"]
    assert kept.left_out == {LINKED: 4}
    followed = walk(root, follow_links=True)
    assert names(root, followed.images) == ["2024/3.jpg", "2024/deep/4.jpg", "5.jpg", "gone.jpg", "y/2.jpg", "z/1.jpg"]
    assert followed.left_out == {AGAIN: 3}
    (tmp_path / "link").symlink_to("in")
    assert len(walk(tmp_path / "link").images) == 4


def test_what_is_no_file_is_not_opened_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    assert walk(tmp_path).left_out == {"no extension": 2}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    found = walk(fill(tmp_path, {"a.jpg": JPEG}) / "absent")
    assert found.unlisted == [(tmp_path / "absent", "No such file or directory")]


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"II+\0\x08\0\0\0", "BigTIFF"), (b"MM\0+\0\x08\0\0", "BigTIFF"), (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x4f\xff\x51\0", "JPEG 2000"), (b"GIF89a", "GIF"), (DICOM, "DICOM"),
        (b"\0\0\0\x1cftypavif", "AVIF"), (b"\0\0\0\x18ftypcrx ", "camera raw"), (b"\0\0\0\x18ftypisom", "video"), (b"%PDF-", "PDF"),
        (b"BM" + bytes(12) + b"\x28\0\0\0", "BMP"),
    ],
)  # fmt: skip
def test_kinds_are_told_by_their_first_bytes(head: bytes, name: str) -> None:
    kind = kind_of(head + bytes(20))
    assert kind is not None
    assert kind.name == name
    if kind.readable:
        assert readable_kind(head + bytes(20)) == kind
    else:
        with pytest.raises(JpegError, match=f"{name} files are not read; export the photograph as JPEG"):
            readable_kind(head)


@pytest.mark.parametrize("head", [b"", b"BMW is a car", b"P5", b"RIFF\0\0\0\0WAVE", b"DICM", bytes(200)])
def test_what_only_looks_like_one_is_no_image(head: bytes) -> None:
    assert kind_of(head) is None
