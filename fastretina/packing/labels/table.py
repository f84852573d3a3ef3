"""The rows of one split that can be packed: name, path of the image and grade of each, or an error that names file and line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fastretina.errors import LabelError
from fastretina.grading import GRADES, NUM_CLASSES
from fastretina.packing.labels.images import ImageIndex, image_stem


def fail(source: Path, line: int, reason: str) -> NoReturn:
    """A LabelError about a line (1-based) of a label file."""
    raise LabelError(f"{source}, line {line}: {reason}")


@dataclass(frozen=True)
class LabelTable:
    """The usable content of one split's label files; row i of each sequence belongs together.

    Attributes:
        names: as in the CSV, without image extension. paths: of the images; "" where missing (see `problems`).
        grades: int64 (N,), 0 to NUM_CLASSES - 1. lines: int64 (N,), 1-based line in `source`.
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

    @classmethod
    def build(
        cls,
        source: Path,
        lines: Sequence[int],
        cells: Sequence[str],
        grades: NDArray[np.int64],
        index: ImageIndex,
        layout: str,
        digests: Mapping[str, str],
        missing_ok: bool,
    ) -> LabelTable:
        """From what `source` names (`cells`, in `lines`) and their grades, after a look for each image.

        Raises:
            LabelError: an image that is named twice, that leaves the folder, or that is missing, where that is not `missing_ok`.
        """
        paths: list[str] = []
        problems: dict[int, str] = {}
        seen: dict[str, int] = {}
        for row, (line, name) in enumerate(zip(lines, cells, strict=True)):
            try:
                path = index.find(name)
            except LabelError as error:
                fail(source, line, str(error))
            except FileNotFoundError as error:
                if not missing_ok:
                    fail(source, line, f"{error}. Add the file, remove the row, or leave such rows out with --on-bad skip")
                path, problems[row] = "", str(error)
            # By path, so that 10_left and 10_left.jpeg are found to be the same image.
            key = path or image_stem(name)
            if key in seen:
                fail(source, line, f"image {name!r} is named a second time (first in line {seen[key]})")
            seen[key] = line
            paths.append(path)
        return cls(
            names=tuple(image_stem(name) for name in cells),
            paths=tuple(paths),
            grades=grades,
            lines=np.asarray(lines, dtype=np.int64),
            source=source,
            layout=layout,
            digests=digests,
            problems=problems,
        )


def parse_grades(source: Path, lines: Sequence[int], cells: Sequence[str]) -> NDArray[np.int64]:
    """The grades that these cells hold, int64 (N,). Raises LabelError."""
    values = np.empty(len(cells), dtype=np.int64)
    for row, cell in enumerate(cells):
        grade = GRADES.get(cell, -1)
        if grade < 0:
            shown = repr(cell[:40]) if cell else "an empty cell"
            fail(source, lines[row], f"grade must be an integer from 0 to {NUM_CLASSES - 1}, not {shown}")
        values[row] = grade
    return values
