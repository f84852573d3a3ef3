"""CSV that every program reads as the same cells, and that runs nothing in a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastretina.system.files import write_bytes

FORMULA_STARTS = ("=", "+", "-", "@")
_ENDS = re.compile(
    "[\t\0\r\n\v\f\x1c-\x1e\x85\u2028\u2029]"
)  # what some reader takes for the end of a cell, of a row, or of the file


def csv_cell(value: object) -> str:
    """A cell's text: floats with 6 significant digits, None empty, and no text that a spreadsheet would run as a formula."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return str(value)
    # Where the comma is the decimal separator, spreadsheets divide at semicolons instead, inside of quotes too.
    return ";".join("'" + part if _begins_formula(part) else part for part in _ENDS.sub(" ", value).split(";"))


def _begins_formula(text: str) -> bool:
    """Whether a formula's sign, of any width, comes first after what spreadsheets overlook: blanks, what shows nothing, and a quote
    that a separator within the cell has cut off from the one before it."""
    first = next((letter for letter in text if letter != '"' and unicodedata.category(letter)[0] not in "CZ"), "")
    return unicodedata.normalize("NFKC", first).startswith(FORMULA_STARTS)


def csv_line(cells: Iterable[object]) -> str:
    """One CSV line, LF at its end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([csv_cell(cell) for cell in cells])
    return buffer.getvalue()


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a UTF-8 CSV file with a header atomically."""
    write_bytes(path, "".join(map(csv_line, [header, *rows])).encode(errors="backslashreplace"))  # a file's name may be no text
