"""Writing of files that are there completely or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastretina.errors import RunError

FORMULA_STARTS = ("=", "+", "-", "@", "\t")


def unfinished(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], object], older: Path | None = None) -> None:
    """Let `write` fill a file that gets its name only when it is complete and on disk. RunError with the system's reason.

    older: a name for what `path` held until now.
    """
    temporary = unfinished(path)
    try:
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if older is not None and path.exists():
                _name_as_well(path, older)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def _name_as_well(path: Path, other: Path) -> None:
    """Let `other` name the file at `path`, in one step, so that neither name is ever missing."""
    spare = unfinished(other)
    spare.unlink(missing_ok=True)
    try:
        spare.hardlink_to(path)
        spare.replace(other)
    except OSError:  # a file system without hard links: for a moment there is only the other name, which a resume looks at too
        path.replace(other)
    # rename(2) does nothing, and leaves both names, where they are of the same file already: after a kill at the wrong moment.
    spare.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, so that a rename outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    write_atomically(path, lambda file: file.write(data))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically; NaN and infinity are a ValueError: what is undefined is None here and null there."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def csv_cell(value: object) -> str:
    """A cell's text: floats with 6 significant digits, None empty, and no text that a spreadsheet would run as a formula."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return str(value)
    text = value.replace("\r", " ").replace("\n", " ")  # many readers take either for the end of the row
    return "'" + text if text.lstrip(" ").startswith(FORMULA_STARTS) else text


def csv_line(cells: Iterable[object]) -> str:
    """One CSV line, LF at its end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([csv_cell(cell) for cell in cells])
    return buffer.getvalue()


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a UTF-8 CSV file with a header atomically."""

    def write(file: BinaryIO) -> None:
        file.write(csv_line(header).encode())
        for row in rows:
            file.write(csv_line(row).encode())

    write_atomically(path, write)
