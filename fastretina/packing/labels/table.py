"""What a layout of labels is, and what it reads: name, path of the image and class of each row, or an error with file and line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.reader import PATIENT
from fastretina.errors import LabelError
from fastretina.grading import Classes
from fastretina.packing.config import PackConfig

_Reason = TypeVar("_Reason")


class LeftOut(NamedTuple):
    """Why a row is left out though its image may be good: one of few words, by which rows are counted, and what it says itself."""

    kind: Literal["ungradable", "no grade", "no valid grade"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


def fail(source: Path, line: int, reason: str) -> NoReturn:
    """A LabelError about a line of a label file, 1-based; 0: about a folder, which has no lines."""
    raise LabelError(f"{place(source, line)}: {reason}")


def place(source: Path, line: int) -> str:
    """ "file, line n", for messages."""
    return f"{source}, line {line}" if line else str(source)


@dataclass(frozen=True)
class LabelTable:
    """The usable content of one split's label files; row i of each sequence belongs together.

    Attributes:
        names: as in the table, without image extension unless two images differ in that alone. paths: of the images; "" where
            missing (see `problems`).
        grades: int64 (N,), numbers of `classes`; UNLABELLED. lines: int64 (N,), 1-based line in `source`; 0 where that is a folder.
        source: the table that holds the names, or the folder of the class folders. digests: SHA-256 by file name of the CSVs read.
        problems: row to reason, for the rows whose image is missing; empty unless read with `missing_ok`.
        columns: text of each row, "" where unknown, by name as in `Beton.columns`: patient, eye, quality, groups.
        left_out: row to reason, for the rows to be left out as asked: ungradable, or without a valid grade. No bad images.
        ids: int64 (N,), what each row is called for ever. notes: what must be said about how labels and folder were read.
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
    left_out: Mapping[int, LeftOut]
    ids: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        """ "file, line n" of a 0-based row, for messages."""
        return place(self.source, int(self.lines[row]))

    @property
    def patients(self) -> list[str | None] | None:
        """Of each row, None where unknown; None for all where nobody's is known."""
        found = self.columns.get(PATIENT)
        return [text or None for text in found] if found else None

    @property
    def packed_patients(self) -> list[str | None]:
        """Of the rows that are not left out, None where unknown."""
        patients = self.patients or [None] * len(self)
        return [patient for row, patient in enumerate(patients) if row not in self.left_out]

    def noted(self, note: str) -> LabelTable:
        """The same, with one more thing to say."""
        return replace(self, notes=(*self.notes, note))

    def select(self, rows: Sequence[int]) -> LabelTable:
        """These rows alone, in this order, under the ids that they had."""
        at = list(rows)

        def moved(reasons: Mapping[int, _Reason]) -> dict[int, _Reason]:
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


@dataclass(frozen=True)
class Layout:
    """A layout of labels. Fields are those of PackConfig that only say where labels and images are.

    Attributes:
        name: what the file's provenance calls it. usage: the flags that it needs, as a user would type them.
        field: the one that means this layout; `needs` go with it, `takes` may.
        read: the table; missing images are errors, or, where the second argument is true, its `problems`. LabelError, UsageError.
        other_patients: of the images in the other split, to look for patients in both; None where there is none. LabelError.
    """

    name: str
    usage: str
    field: str
    needs: tuple[str, ...]
    read: Callable[[PackConfig, bool], LabelTable]
    takes: tuple[str, ...] = ()
    other_patients: Callable[[PackConfig], Sequence[str | None] | None] = lambda config: None

    @property
    def fields(self) -> frozenset[str]:
        """All that it may be given."""
        return frozenset({self.field, *self.needs, *self.takes})
