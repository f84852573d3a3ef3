"""From CSV files and a folder of images to a table of (name, path, grade), or an error that names file and line.

Two layouts: the lab's (`{split}_img.csv` and `{split}_label.csv`, one column each and no header) and Kaggle's (one CSV,
`image,level`). A header is recognised by what it says, never assumed: the usual reader of the lab's files takes the
first image of each for a header and trains on 28,099 of 28,100.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fastretina.errors import LabelError
from fastretina.grading import GRADES

EXTENSIONS = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".ppm")
MAX_NAME = 255  # bytes; what file systems allow for one component
MAX_LINE = 16_384  # bytes of one CSV line; a million-column line would otherwise become a million columns
MAX_CSV = 1 << 30
_IMAGE_WORDS = ("image", "images", "img", "image_id", "image_name", "id_code", "name", "file", "filename", "file_name")
_GRADE_WORDS = ("level", "levels", "label", "labels", "grade", "grades", "diagnosis", "class", "dr_grade", "retinopathy_grade")


@dataclass(frozen=True)
class LabelTable:
    """The usable content of one split's label files; row i of each sequence belongs together.

    Attributes:
        names: as in the CSV, without image extension. paths: of the images; "" where missing (see `problems`).
        grades: int64 (N,), 0-4. lines: int64 (N,), 1-based line in `source`.
        source: the CSV that holds the names. digests: SHA-256 by file name of the CSVs read.
        problems: row to reason, for the rows whose image is missing; empty unless read with `missing_ok`.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    grades: NDArray[np.int64]
    lines: NDArray[np.int64]
    source: Path
    layout: str
    digests: Mapping[str, str]
    problems: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        """ "file, line n" of a 0-based row, for messages."""
        return f"{self.source}, line {self.lines[row]}"


def read_lab(
    root: str | os.PathLike[str], split: str, images: str | os.PathLike[str] | None = None, *, missing_ok: bool = False
) -> LabelTable:
    """The lab layout: `{split}_img.csv` and `{split}_label.csv` in `root`; images in `images`, or in or below `root`.

    Raises:
        LabelError: see the module; with `missing_ok` missing images go to `problems` instead.
    """
    root = Path(root)
    name_file, grade_file = root / f"{split}_img.csv", root / f"{split}_label.csv"
    names, name_digest = _read_csv(name_file, columns=1)
    grades, grade_digest = _read_csv(grade_file, columns=1)
    name_lines, name_cells = _body(name_file, names, [_IMAGE_WORDS])
    grade_lines, grade_cells = _body(grade_file, grades, [_GRADE_WORDS])
    if len(name_lines) != len(grade_lines):
        raise LabelError(
            f"{grade_file}, line {grade_lines[-1]}: {len(grade_lines)} grades for the {len(name_lines)} names of {name_file}; "
            "row n of one file must belong to row n of the other"
        )
    values = _grades(grade_file, grade_lines, grade_cells[0])
    digests = {name_file.name: name_digest, grade_file.name: grade_digest}
    index = ImageIndex(images if images is not None else root)
    return _table(name_file, name_lines, name_cells[0], values, index, "lab", digests, missing_ok)


def read_kaggle(labels: str | os.PathLike[str], images: str | os.PathLike[str], *, missing_ok: bool = False) -> LabelTable:
    """Kaggle's layout: one CSV of `image,level` (further columns are ignored where a header names them); images below `images`.

    Raises:
        LabelError: see the module; with `missing_ok` missing images go to `problems` instead.
    """
    source = Path(labels)
    rows, digest = _read_csv(source, columns=None)
    lines, cells = _body(source, rows, [_IMAGE_WORDS, _GRADE_WORDS])
    values = _grades(source, lines, cells[1])
    return _table(source, lines, cells[0], values, ImageIndex(images), "kaggle", {source.name: digest}, missing_ok)


def read_lab_names(root: str | os.PathLike[str], split: str) -> tuple[str, ...]:
    """Only the names of one split of the lab layout, without looking for its images. Raises LabelError."""
    source = Path(root) / f"{split}_img.csv"
    rows, _ = _read_csv(source, columns=1)
    return tuple(_stem(name) for name in _body(source, rows, [_IMAGE_WORDS])[1][0])


class ImageIndex:
    """The image files in a folder and below, by relative path and by name, from one walk (no stat for each image).

    Hidden folders and links to folders are not entered, except a `data` folder directly below, which may be a link to
    another disk. A link to a file must lead to a file inside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files: dict[str, list[str]] = {}  # relative path, name, and both without extension -> paths
        self._links: set[str] = set()
        self._roots = [os.path.realpath(self.folder)]
        data = self.folder / "data"
        if data.is_symlink():
            self._roots.append(os.path.realpath(data))
        stack = [(os.fspath(self.folder), "")]
        try:
            while stack:
                self._scan(*stack.pop(), stack)
        except OSError as error:
            raise LabelError(f"{error.filename}: cannot list the image folder: {error.strerror}") from None

    def _scan(self, folder: str, prefix: str, stack: list[tuple[str, str]]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                stem, extension = _split(name)
                if extension.lower() in EXTENSIONS:
                    if entry.is_symlink():
                        self._links.add(entry.path)
                    elif not entry.is_file():
                        continue
                    for key in {name, stem, prefix + name, prefix + stem}:
                        self._files.setdefault(key, []).append(entry.path)
                elif entry.is_dir(follow_symlinks=prefix == "" and name == "data") and not name.startswith("."):
                    stack.append((entry.path, f"{prefix}{name}/"))

    def find(self, name: str) -> str:
        """The path of the image called `name` (with or without extension).

        Raises:
            FileNotFoundError: there is none. LabelError: the name or a link leaves the folder, or it may be two files.
            Neither names the CSV's file and line: the caller knows them.
        """
        _check_name(name)
        paths = self._files.get(name)
        if not paths:
            raise FileNotFoundError(f"no image {name!r} in {self.folder} (looked for {', '.join(EXTENSIONS)})")
        if len(paths) > 1:
            raise LabelError(f"{name!r} may be {paths[0]} or {paths[1]}; name the folder with --images")
        if paths[0] in self._links:
            self._check_link(name, paths[0])
        return paths[0]

    def _check_link(self, name: str, path: str) -> None:
        target = os.path.realpath(path)
        if not any(target.startswith(root.rstrip("/") + "/") for root in self._roots):
            raise LabelError(f"{name!r} is a link that leaves the image folder (to {target})")
        try:
            regular = stat.S_ISREG(Path(target).stat().st_mode)
        except OSError as error:
            raise FileNotFoundError(f"{name!r} is a link to nothing: {error.strerror}") from None
        if not regular:
            raise LabelError(f"{name!r} is a link to something that is not a file")


def _check_name(name: str) -> None:
    """Refuse names that could leave the image folder, before any path is made of them. LabelError without file and line."""
    if not name:
        raise LabelError("empty image name")
    if len(os.fsencode(name)) > 4 * MAX_NAME or any(len(os.fsencode(part)) > MAX_NAME for part in name.split("/")):
        raise LabelError(f"image name of {len(name)} characters, {name[:40]!r}...; file systems allow {MAX_NAME} bytes")
    if any(ord(character) < 32 or character == "\x7f" for character in name):
        raise LabelError(f"image name {name!r} holds control characters")
    parts = name.replace("\\", "/").split("/")
    if parts[0] in ("", "~") or name.startswith("~") or ".." in parts or "." in parts or ":" in parts[0] or "\\" in name:
        raise LabelError(f"image name {name!r} leaves the image folder; give names relative to it")


def _split(name: str) -> tuple[str, str]:
    """Stem and extension with its dot; no extension where the name begins with its only dot."""
    stem, dot, extension = name.rpartition(".")
    return (stem, dot + extension) if stem else (name, "")


def _stem(name: str) -> str:
    stem, extension = _split(name)
    return stem if extension.lower() in EXTENSIONS else name


def _table(
    source: Path,
    lines: Sequence[int],
    cells: Sequence[str],
    grades: NDArray[np.int64],
    index: ImageIndex,
    layout: str,
    digests: Mapping[str, str],
    missing_ok: bool,
) -> LabelTable:
    paths: list[str] = []
    problems: dict[int, str] = {}
    seen: dict[str, int] = {}
    for row, (line, name) in enumerate(zip(lines, cells, strict=True)):
        try:
            path = index.find(name)
        except LabelError as error:
            _fail(source, line, str(error))
        except FileNotFoundError as error:
            if not missing_ok:
                _fail(source, line, f"{error}. Add the file, remove the row, or leave such rows out with --on-bad skip")
            path, problems[row] = "", str(error)
        # By path, so that 10_left and 10_left.jpeg are found to be the same image.
        key = path or _stem(name)
        if key in seen:
            _fail(source, line, f"image {name!r} is named a second time (first in line {seen[key]})")
        seen[key] = line
        paths.append(path)
    return LabelTable(
        names=tuple(_stem(name) for name in cells),
        paths=tuple(paths),
        grades=grades,
        lines=np.asarray(lines, dtype=np.int64),
        source=source,
        layout=layout,
        digests=digests,
        problems=problems,
    )


def _grades(source: Path, lines: Sequence[int], cells: Sequence[str]) -> NDArray[np.int64]:
    values = np.empty(len(cells), dtype=np.int64)
    for row, cell in enumerate(cells):
        grade = GRADES.get(cell, -1)
        if grade < 0:
            shown = repr(cell[:40]) if cell else "an empty cell"
            _fail(source, lines[row], f"grade must be an integer from 0 to 4, not {shown}")
        values[row] = grade
    return values


def _fail(source: Path, line: int, reason: str) -> NoReturn:
    raise LabelError(f"{source}, line {line}: {reason}")


def _read_csv(source: Path, columns: int | None) -> tuple[list[list[str]], str]:
    """All cells as stripped text, row n being line n + 1, blank lines at the end removed; and the file's SHA-256."""
    raw = _read_bytes(source)
    _check_lines(source, raw)
    try:
        frame = pd.read_csv(
            io.BytesIO(raw),
            header=None,
            dtype=str,
            na_filter=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
            skipinitialspace=True,
        )
    except pd.errors.EmptyDataError:
        raise LabelError(f"{source}, line 1: the file is empty") from None
    except pd.errors.ParserError as error:
        found = re.search(r"in line (\d+), saw (\d+)", str(error))
        row = re.search(r"starting at row (\d+)", str(error))
        line = int(found[1]) if found else int(row[1]) + 1 if row else 1
        _fail(source, line, f"{found[2]} columns, more than in the lines before" if found else "a quote is never closed")
    rows = [["" if cell is None else str(cell).strip() for cell in row] for row in frame.itertuples(index=False, name=None)]
    while rows and not any(rows[-1]):
        rows.pop()
    if not rows:
        raise LabelError(f"{source}, line 1: the file holds no rows")
    if columns is not None and len(rows[0]) != columns:
        _fail(source, 1, f"{len(rows[0])} columns where one is expected; one CSV of image,level is given by --images and --labels")
    return rows, hashlib.sha256(raw).hexdigest()


def _read_bytes(source: Path) -> bytes:
    try:
        # O_NONBLOCK: a FIFO must not hang the open.
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise LabelError(f"{source}: not a file")
            if status.st_size > MAX_CSV:
                raise LabelError(f"{source}: {status.st_size} bytes is no label file")
            return file.read()
    except (OSError, ValueError) as error:
        raise LabelError(f"{source}: cannot read it: {getattr(error, 'strerror', None) or error}") from None


def _check_lines(source: Path, raw: bytes) -> None:
    """What the CSV parser would misread or choke on, by line: NUL, over-long lines, other encodings."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise LabelError(f"{source}, line 1: UTF-16 text; save the file as UTF-8 CSV")
    content = np.frombuffer(raw, dtype=np.uint8)
    ends = np.concatenate(([-1], np.flatnonzero(content == 10), [len(content)]))
    longest = int(np.argmax(np.diff(ends)))
    if ends[longest + 1] - ends[longest] > MAX_LINE:
        _fail(source, longest + 1, f"more than {MAX_LINE} bytes in one line")
    for position in (raw.find(b"\0"), _first_undecodable(raw)):
        if position >= 0:
            _fail(source, raw.count(b"\n", 0, position) + 1, "a NUL or a byte that is not UTF-8 text")


def _first_undecodable(raw: bytes) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return -1


def _body(source: Path, rows: list[list[str]], words: Sequence[Sequence[str]]) -> tuple[list[int], list[list[str]]]:
    """Lines and cells of the columns that `words` describe, after a header if there is one, or by position."""
    for line, row in enumerate(rows, start=1):
        if not any(row):
            _fail(source, line, "blank line between rows")
        if any("\n" in cell or "\r" in cell for cell in row):
            _fail(source, line, "a line break inside a cell; line numbers would no longer mean anything")
    first = [cell.lower() for cell in rows[0]]
    known = [word for column in words for word in column]
    # A grade in the first row makes it data, whatever the image is called.
    header = any(cell in known for cell in first) and not any(re.fullmatch(r"[+-]?\d+(\.\d*)?", cell) for cell in first)
    columns = list(range(len(words)))
    if header:
        for i, column in enumerate(words):
            places = [place for place, cell in enumerate(first) if cell in column]
            if not places:
                _fail(source, 1, f"no column {column[0]!r} in the header {','.join(rows[0])!r}")
            columns[i] = places[0]
        rows = rows[1:]
        if not rows:
            _fail(source, 1, "a header and no rows")
    elif len(rows[0]) != len(words):
        _fail(source, 1, f"{len(rows[0])} column(s) where {len(words)} are expected, {','.join(column[0] for column in words)}")
    start = 2 if header else 1
    return list(range(start, start + len(rows))), [[row[place] for row in rows] for place in columns]
