"""A table of labels as text: its encoding, what separates its cells, and its rows, a line of the file each.

The module csv splits the lines, and nothing guesses: a separator is one that divides every row alike, and where two do, the file
must say which (`sep=;` as its first line, as spreadsheets write it). What the columns mean is for `columns` to say.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastretina.errors import LabelError
from fastretina.packing.labels.table import fail
from fastretina.system.files import read_regular

MAX_LINE = 16_384  # characters of one line; a million-column line would otherwise become a million columns
MAX_CSV = 1 << 30
WINDOWS = "cp1252"
SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas", " ": "blanks"}
_MARKS = ((codecs.BOM_UTF8, "UTF-8"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
_SEP_LINE = re.compile(r'"?sep=([^\w\s"]|\t| )"?[\s,;]*', re.IGNORECASE)
_IN_WORDS = frozenset("–—‘’“”…·°µ²³ªº\xa0\xad")  # what cp1252 has beside letters, and people write in tables


@dataclass(frozen=True)
class CsvFile:
    """What `read` makes of a file.

    Attributes:
        rows: stripped cells; row n is line `first` + n, 1-based. Empty cells at the end of a row may be missing; no row is empty.
        separator: between cells. encoding: "UTF-8", "UTF-16" or WINDOWS. digest: the file's SHA-256.
    """

    source: Path
    rows: list[list[str]]
    first: int
    separator: str
    encoding: str
    digest: str

    @classmethod
    def read(cls, source: Path, is_header: Callable[[Sequence[str]], bool], blanks: bool = True) -> CsvFile:
        """Read a table.

        Args:
            is_header: whether cells are known names of columns; asked where two separators divide the rows alike.
            blanks: whether blanks may separate, where nothing else does.

        Raises:
            LabelError: naming file and line.
        """
        try:
            raw = read_regular(source, MAX_CSV)
        except OSError as error:
            raise LabelError(f"{source}: cannot be read: {error.strerror or error}") from None
        encoding, text = _decoded(source, raw)
        lines = list(io.StringIO(text, newline=""))  # ends at \n, \r and \r\n, and at nothing else
        longest = max(range(len(lines)), key=lambda number: len(lines[number]), default=0)
        if lines and len(lines[longest]) > MAX_LINE:
            fail(source, longest + 1, f"more than {MAX_LINE} characters in one line")
        if (position := text.find("\0")) >= 0:
            line = sum(1 for _ in io.StringIO(text[:position] + ".", newline=""))
            fail(source, line, "a NUL; if this is UTF-16, save the table as UTF-8")
        stated = _SEP_LINE.fullmatch(lines[0].rstrip("\r\n")) if lines else None
        if stated:
            lines = lines[1:]
        while lines and not lines[-1].strip():
            lines.pop()
        if not lines:
            fail(source, 1, "the file is empty" if not raw.strip() else "the file holds no rows")
        first = 2 if stated else 1
        parsed = _split(lines, stated[1]) if stated else _separated(source, first, lines, is_header, blanks)
        if parsed.problem:
            fail(source, first + parsed.problem[0], parsed.problem[1])
        rows = parsed.rows
        while rows and not any(rows[-1]):
            rows.pop()
        if not rows:
            fail(source, 1, "the file holds no rows")
        # A separator may end every row, but not one alone: there it stands in a cell, and all cells after that are shifted.
        width, alike = len(rows[0]), len({len(row) for row in rows[1:]}) == 1
        for number, row in enumerate(rows):
            if not any(row):
                fail(source, first + number, "blank line between rows")
            if len(row) > width and (any(row[width:]) or not alike):
                fail(source, first + number, f"{len(row)} columns, more than the {width} of line {first}")
        return cls(source, rows, first, parsed.separator, encoding, hashlib.sha256(raw).hexdigest())

    def __str__(self) -> str:
        """What was made of the file, and its first lines, for a message."""
        lines = "; ".join(f"line {self.first + number}: {'|'.join(row)[:80]!r}" for number, row in enumerate(self.rows[:3]))
        between = SEPARATORS.get(self.separator, repr(self.separator)) if len(self.rows[0]) > 1 else "nothing"
        return f"read as {self.encoding}, {between} between the cells; with | between them, {lines}"


@dataclass(frozen=True)
class _Parsed:
    """rows: stripped cells, up to a problem: (0-based row, reason)."""

    separator: str
    rows: list[list[str]]
    problem: tuple[int, str] | None = None

    @property
    def divides(self) -> bool:
        """Whether it divides every row, into no more cells than the first one."""
        width = len(self.rows[0]) if self.rows else 0
        return self.problem is None and all(
            len(row) >= 2 and (len(row) <= width or not any(row[width:])) for row in self.rows if row
        )


def _separated(source: Path, first: int, lines: Sequence[str], is_header: Callable[[Sequence[str]], bool], blanks: bool) -> _Parsed:
    """The rows by the separator that divides them. LabelError where that may be one or another."""
    tried = [_split(lines, separator) for separator in SEPARATORS if separator != " " and separator in lines[0]]
    likely = [parsed for parsed in tried if parsed.divides]
    if not likely and blanks and all(parsed.problem for parsed in tried):
        spaced = _split([line.strip(" \r\n") for line in lines], " ")
        # Blanks also stand within names: only where every row has as many cells do they separate.
        if spaced.divides and len({len(row) for row in spaced.rows}) == 1:
            return spaced
    likely = likely or [parsed for parsed in tried if parsed.problem or len(parsed.rows[0]) > 1]
    if not likely:
        return _split(lines, ",")
    if len(likely) > 1:
        likely = [parsed for parsed in likely if parsed.rows and is_header(parsed.rows[0])] or likely
    if len(likely) > 1 and likely[0].separator != "\t":  # nobody has tabs in names
        one, other = (SEPARATORS[parsed.separator] for parsed in likely[:2])
        fail(
            source,
            first,
            f"{one} or {other} may separate the cells of {lines[0].strip()[:80]!r}; say which by a line before it, "
            f"sep={likely[0].separator} or sep={likely[1].separator}",
        )
    return likely[0]


def _split(lines: Sequence[str], separator: str) -> _Parsed:
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if reader.line_num != len(rows) + 1:
                reason = "a line break inside a cell, or a quote that is never closed; a row is a line"
                return _Parsed(separator, rows, (len(rows), reason))
            rows.append([cell.strip() for cell in row])
    except csv.Error as error:
        closed = "expected after" in str(error)
        reason = "text after a closing quote" if closed else "a quote is never closed"
        return _Parsed(separator, rows, (len(rows), reason))
    return _Parsed(separator, rows)


def _decoded(source: Path, raw: bytes) -> tuple[str, str]:
    """The encoding and the text. Bytes that are neither UTF-8 nor plausible in cp1252 are a LabelError: no name is ever garbled."""
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            try:
                return encoding, raw.decode("utf-8-sig" if encoding == "UTF-8" else "utf-16")
            except UnicodeDecodeError as error:
                line = raw.count(b"\n", 0, error.start) + 1
                fail(source, line, f"not the {encoding} text that the file's first bytes say it is; save it as UTF-8")
    try:
        return "UTF-8", raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
    try:
        text = raw.decode(WINDOWS)
    except UnicodeDecodeError:
        text = "\x81"
    strange = next((c for c in set(text) if not (c.isascii() or c.isalpha() or c in _IN_WORDS)), None)
    if strange:
        fail(source, line, f"bytes that are not UTF-8 text, nor likely {WINDOWS} (Western Windows); save the table as UTF-8")
    return WINDOWS, text
