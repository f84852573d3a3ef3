"""A CSV file of labels: its cells as text, line by line, and the columns of it that are wanted.

A header is recognised by what it says, never assumed: the usual reader of the lab's files takes the first image of each for a
header and trains on 28,099 of 28,100.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fastretina.errors import LabelError
from fastretina.packing.labels.table import fail
from fastretina.system.files import read_regular

MAX_LINE = 16_384  # bytes of one CSV line; a million-column line would otherwise become a million columns
MAX_CSV = 1 << 30
IMAGE_WORDS = ("image", "images", "img", "image_id", "image_name", "id_code", "name", "file", "filename", "file_name")
GRADE_WORDS = ("level", "levels", "label", "labels", "grade", "grades", "diagnosis", "class", "dr_grade", "retinopathy_grade")


@dataclass(frozen=True)
class CsvFile:
    """rows: stripped cells, row n being line n + 1, blank lines at the end left out. digest: the file's SHA-256."""

    source: Path
    rows: list[list[str]]
    digest: str

    @classmethod
    def read(cls, source: Path) -> CsvFile:
        """Raises LabelError naming file and line."""
        try:
            raw = read_regular(source, MAX_CSV)
        except OSError as error:
            raise LabelError(f"{source}: cannot be read: {error.strerror or error}") from None
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
            fail(source, line, f"{found[2]} columns, more than in the lines before" if found else "a quote is never closed")
        rows = [["" if cell is None else str(cell).strip() for cell in row] for row in frame.itertuples(index=False, name=None)]
        while rows and not any(rows[-1]):
            rows.pop()
        if not rows:
            raise LabelError(f"{source}, line 1: the file holds no rows")
        return cls(source, rows, hashlib.sha256(raw).hexdigest())

    def columns(self, *words: Sequence[str]) -> tuple[list[int], list[list[str]]]:
        """Lines (1-based), and the cells of one column for each of `words`: by what a header calls it, without one by position."""
        rows = self.rows
        for line, row in enumerate(rows, start=1):
            if not any(row):
                fail(self.source, line, "blank line between rows")
            if any("\n" in cell or "\r" in cell for cell in row):
                fail(self.source, line, "a line break inside a cell; line numbers would no longer mean anything")
        first = [cell.lower() for cell in rows[0]]
        known = [word for column in words for word in column]
        # A grade in the first row makes it data, whatever the image is called.
        header = any(cell in known for cell in first) and not any(re.fullmatch(r"[+-]?\d+(\.\d*)?", cell) for cell in first)
        columns = list(range(len(words)))
        if header:
            for i, column in enumerate(words):
                found = [number for number, cell in enumerate(first) if cell in column]
                if not found:
                    fail(self.source, 1, f"no column {column[0]!r} in the header {','.join(rows[0])!r}")
                columns[i] = found[0]
            rows = rows[1:]
            if not rows:
                fail(self.source, 1, "a header and no rows")
        elif len(rows[0]) != len(words):
            expected = ",".join(column[0] for column in words)
            fail(self.source, 1, f"{len(rows[0])} column(s) where {len(words)} are expected, {expected}")
        start = 2 if header else 1
        return list(range(start, start + len(rows))), [[row[number] for row in rows] for number in columns]


def _check_lines(source: Path, raw: bytes) -> None:
    """What the CSV parser would misread or choke on, by line: NUL, over-long lines, other encodings."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise LabelError(f"{source}, line 1: UTF-16 text; save the file as UTF-8 CSV")
    content = np.frombuffer(raw, dtype=np.uint8)
    ends = np.concatenate(([-1], np.flatnonzero(content == 10), [len(content)]))
    longest = int(np.argmax(np.diff(ends)))
    if ends[longest + 1] - ends[longest] > MAX_LINE:
        fail(source, longest + 1, f"more than {MAX_LINE} bytes in one line")
    position = raw.find(b"\0")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        position = error.start if position < 0 else position
    if position >= 0:
        fail(source, raw.count(b"\n", 0, position) + 1, "a NUL or a byte that is not UTF-8 text")
