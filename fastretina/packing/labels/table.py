"""What a layout of labels is, and what it reads: name, path of the image and grade of each row, or an error with file and line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.reader import EYE, PATIENT
from fastretina.errors import LabelError
from fastretina.grading import GRADES, NUM_CLASSES, RETINOPATHY, Classes, eye_of
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.images import ImageIndex, image_stem


def fail(source: Path, line: int, reason: str) -> NoReturn:
    """A LabelError about a line (1-based) of a label file."""
    raise LabelError(f"{source}, line {line}: {reason}")


@dataclass(frozen=True)
class LabelTable:
    """The usable content of one split's label files; row i of each sequence belongs together.

    Attributes:
        names: as in the CSV, without image extension. paths: of the images; "" where missing (see `problems`).
        grades: int64 (N,), numbers of `classes`; UNLABELLED. lines: int64 (N,), 1-based line in `source`.
        source: the CSV that holds the names. digests: SHA-256 by file name of the CSVs read.
        problems: row to reason, for the rows whose image is missing; empty unless read with `missing_ok`.
        columns: text of each row, "" where unknown, by name as in `Beton.columns`: patient, eye, quality, groups.
        left_out: row to reason, for the rows to be left out as asked: ungradable, or without a valid grade. No bad images.
        ids: int64 (N,), what each row is called for ever. notes: what must be said about the table.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    grades: NDArray[np.int64]
    lines: NDArray[np.int64]
    source: Path
    layout: str
    digests: Mapping[str, str]
    problems: Mapping[int, str]
    classes: Classes
    columns: Mapping[str, Sequence[str]]
    left_out: Mapping[int, str]
    ids: NDArray[np.int64]
    notes: tuple[str, ...] = ()

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
        names = tuple(image_stem(name) for name in cells)
        columns = _people_by_name(names)
        ids = np.arange(len(names))
        lined = np.asarray(lines, dtype=np.int64)
        return cls(names, tuple(paths), grades, lined, source, layout, digests, problems, RETINOPATHY, columns, {}, ids)

    @property
    def patients(self) -> list[str | None] | None:
        """Of each row, None where unknown; None for all where nobody's is known."""
        found = self.columns.get(PATIENT)
        return [text or None for text in found] if found else None

    def select(self, rows: Sequence[int]) -> LabelTable:
        """These rows alone, in this order, under the ids that they had."""
        at = list(rows)

        def moved(reasons: Mapping[int, str]) -> dict[int, str]:
            return {new: reasons[row] for new, row in enumerate(at) if row in reasons}

        return replace(
            self,
            names=tuple(self.names[row] for row in at),
            paths=tuple(self.paths[row] for row in at),
            grades=self.grades[at],
            lines=self.lines[at],
            ids=self.ids[at],
            problems=moved(self.problems),
            left_out=moved(self.left_out),
            columns={name: tuple(text[row] for row in at) for name, text in self.columns.items()},
        )


def _people_by_name(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns of patients and eyes, as names tell of them; none where no name does."""
    eyes = [eye_of(name) or ("", "") for name in names]
    return {column: tuple(text) for column, text in zip((PATIENT, EYE), zip(*eyes, strict=True), strict=True) if any(text)}


@dataclass(frozen=True)
class Layout:
    """A layout of labels. Fields are those of PackConfig that only say where labels and images are.

    Attributes:
        name: what the file's provenance calls it. usage: the flags that it needs, as a user would type them.
        field: the one that means this layout; `needs` go with it, `takes` may.
        read: the table; missing images are errors, or, where the second argument is true, its `problems`. LabelError, UsageError.
        other_names: the images' names in the other split, to look for patients in both; None where there is none. LabelError.
    """

    name: str
    usage: str
    field: str
    needs: tuple[str, ...]
    read: Callable[[PackConfig, bool], LabelTable]
    takes: tuple[str, ...] = ()
    other_names: Callable[[PackConfig], Sequence[str] | None] = lambda config: None

    @property
    def fields(self) -> frozenset[str]:
        """All that it may be given."""
        return frozenset({self.field, *self.needs, *self.takes})


def parse_grades(source: Path, lines: Sequence[int], cells: Sequence[str]) -> NDArray[np.int64]:
    """The grades that these cells hold, int64 (N,). Raises LabelError."""
    for line, cell in zip(lines, cells, strict=True):
        if cell not in GRADES:
            shown = repr(cell[:40]) if cell else "an empty cell"
            fail(source, line, f"grade must be an integer from 0 to {NUM_CLASSES - 1}, not {shown}")
    return np.array([GRADES[cell] for cell in cells], dtype=np.int64)
