"""Label files made to reach out of the image folder: what the process opens is watched, not only what it says."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_pack import SIZE, jpeg, picture

from fastretina.errors import ConvertError, LabelError
from fastretina.packing.pack import write_beton

_OPENED: list[str] | None = None  # while watching


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _OPENED is not None and event in ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir") and arguments:
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            _OPENED.append(os.path.realpath(os.fsdecode(path)))


sys.addaudithook(_watch)  # can never be removed; it does nothing while nobody watches


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that Python opens, lists, renames or removes during the test."""
    global _OPENED
    _OPENED = found = []
    yield found
    _OPENED = None


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`in` with two images and a link out, beside `secret` with one image, which nothing may touch."""
    for name in ("in", "secret"):
        (tmp_path / name).mkdir()
        for eye in ("left", "right"):
            (tmp_path / name / f"1_{eye}.jpeg").write_bytes(jpeg(picture()))
    (tmp_path / "in" / "link.jpeg").symlink_to(tmp_path / "secret" / "1_left.jpeg")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "secret")
    return tmp_path


# A second row, after a good first one. {secret} is the folder outside.
MALICIOUS_NAMES = {
    "parent": "../secret/1_left,0",
    "parent within": "x/../../secret/1_left,0",
    "parent with backslashes": "..\\secret\\1_left,0",
    "absolute": "{secret}/1_left.jpeg,0",
    "absolute in quotes": '"{secret}/1_left.jpeg",0',
    "absolute after a space": " {secret}/1_left.jpeg,0",
    "two slashes": "/{secret}/1_left.jpeg,0",
    "url": "file://{secret}/1_left.jpeg,0",
    "url of a server": "http://127.0.0.1:9/1_left.jpeg,0",
    "drive": "C:\\1_left.jpeg,0",
    "home": "~/1_left,0",
    "other home": "~root/1_left,0",
    "variable": "$HOME/1_left,0",
    "glob": "../sec*/1_left,0",
    "link out": "link,0",
    "link out with extension": "link.jpeg,0",
    "folder link out": "folder/1_left,0",
    "itself": ".,0",
    "parent alone": "..,0",
    "the same by a dot": "./1_left,0",
    "NUL": "1_right\0.jpeg,0",
    "escape": "1_right\x1b[2J,0",
    "4,097 bytes": "a" * 4097 + ",0",
    "4,097 bytes of path": "a/" * 2048 + "a,0",
    "device": "/dev/zero,0",
    "process": "/proc/self/environ,0",
    "pipe": "|cat /etc/passwd,0",
    "formula": "=HYPERLINK(1),0",
}
MALICIOUS_CELLS = {
    "grade NaN": "1_right,NaN",
    "grade 1.5": "1_right,1.5",
    "grade of many digits": "1_right," + "9" * 5_000,
    "grade missing": "1_right",
    "two rows of one image": "1_left,3",
    "a quote never closed": '"1_right,0',
    "10^6 columns": "1_right," + "0," * 10**6,
    "one cell of 10^7 bytes": "1" * 10**7 + ",0",
    "UTF-16 inside": "1_right\xff\xfe,0",
}


@pytest.mark.parametrize("name", {**MALICIOUS_NAMES, **MALICIOUS_CELLS})
def test_a_malicious_row_is_named_and_nothing_outside_is_opened(name: str, place: Path, opened: list[str], tried) -> None:
    row = {**MALICIOUS_NAMES, **MALICIOUS_CELLS}[name].replace("{secret}", str(place / "secret"))
    (place / "all.csv").write_bytes(f"image,level\n1_left,0\n{row}\n".encode("latin-1"))
    opened.clear()
    with pytest.raises((LabelError, ConvertError)) as caught:
        write_beton(place / "out.beton", images=place / "in", labels=place / "all.csv", size=SIZE, workers=1)
    seen = list(opened)
    assert f"{place / 'all.csv'}, line " in str(caught.value)
    assert any(f"line {line}:" in str(caught.value) for line in (2, 3))
    assert len(str(caught.value)) < 1_000
    assert str(place / "all.csv") in seen  # the watch works
    assert [path for path in seen if path.startswith((str(place / "secret"), "/etc", "/dev/zero", "/proc/self/env"))] == []
    assert not (place / "out.beton").exists()
    tried("CSV: malicious name or cell")


HARMLESS: dict[str, Callable[[str], bytes]] = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "quotes": lambda text: text.replace("1_left", '"1_left"').encode(),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_variations_are_read(kind: str, place: Path, tried) -> None:
    (place / "all.csv").write_bytes(HARMLESS[kind]("image,level\n1_left,0\n1_right,4\n"))
    summary = write_beton(place / "out.beton", images=place / "in", labels=place / "all.csv", size=SIZE, workers=1)
    assert summary.grades == (1, 0, 0, 0, 1)
    tried("CSV: harmless variation")


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_list_of_skipped_rows_holds_a_formula(start: str, place: Path, tried) -> None:
    (place / "all.csv").write_text(f'image,level\n1_left,0\n"{start}HYPERLINK(1)",2\n')
    out = place / "out.beton"
    write_beton(out, images=place / "in", labels=place / "all.csv", size=SIZE, workers=1, on_bad="skip", max_bad="1")
    with (place / "out.beton.skipped.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert f"'{start}HYPERLINK(1)" in cells
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    tried("CSV: formula in a list that we write")
