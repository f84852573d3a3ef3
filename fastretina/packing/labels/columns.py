"""Which column of a table holds what: as the command line says, else by well-known names, and never where two could be meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fastretina.errors import UsageError
from fastretina.grading import side_of
from fastretina.packing.config import PackConfig
from fastretina.packing.labels import words
from fastretina.packing.labels.classes import known_grade, whole
from fastretina.packing.labels.csv_file import CsvFile
from fastretina.packing.labels.images import EXTENSIONS
from fastretina.packing.labels.table import fail
from fastretina.packing.labels.words import loose

NONE = "none"  # --grade-column none
_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?")


@dataclass(frozen=True)
class Columns:
    """Numbers of columns from 0; None where there is none. header: whether the first row holds names.

    images: one, or left and right. grades: none, one, or left and right. notes: what was recognised without being asked for.
    """

    header: bool
    images: tuple[int, ...]
    grades: tuple[int, ...]
    patient: int | None
    eye: int | None
    quality: int | None
    groups: dict[str, int]
    notes: tuple[str, ...]


def is_header(row: Sequence[str], asked: Collection[str] = ()) -> bool:
    """Whether cells are names of columns: well-known ones, or those `asked` for (in `loose` form).

    A number makes a row data, whatever the image is called, and so does a word for a grade, unless both columns have their names.
    """
    cells = [loose(cell) for cell in row]
    if any(cell in asked for cell in cells):
        return True
    if any(cell in words.IMAGE for cell in cells) and any(cell in words.GRADE for cell in cells):
        return True
    labels = any(_NUMBER.fullmatch(cell) or known_grade(cell) is not None for cell in cells)
    return not labels and any(cell in words.HEADER for cell in cells)


def asked_names(config: PackConfig) -> frozenset[str]:
    """The names of columns on the command line, in `loose` form; numbers of columns are none."""
    flags = (config.image_column, config.grade_column, config.patient_column, config.eye_column, config.quality_column)
    texts = [text for text in (*flags, config.group_columns) if text is not None]
    names = {loose(part) for text in texts for part in (text, *text.split(","))}
    return frozenset(name for name in names if name and not whole(name) and name != NONE)


def columns_of(file: CsvFile, config: PackConfig) -> Columns:
    """The columns of a table.

    Raises:
        LabelError: a column that is asked for is not there, or it cannot be told which one is meant: the message names the flag.
        UsageError: flags that do not go together.
    """
    if config.patient_column is not None and config.patient_pattern is not None:
        raise UsageError("--patient-column and --patient-pattern: two ways to say who the patient is; give one")
    return _Understanding(file, config).columns()


class _Understanding:
    def __init__(self, file: CsvFile, config: PackConfig) -> None:
        self.file, self.config = file, config
        self.header = is_header(file.rows[0], asked_names(config))
        data = file.rows[1:] if self.header else file.rows
        self.data = data
        # Spreadsheets and hand-made tables have columns without a name or without content.
        self.used = [
            n for n in range(len(file.rows[0])) if (self.header and file.rows[0][n]) or any(n < len(r) and r[n] for r in data)
        ]
        self.names = {n: file.rows[0][n] if self.header else str(n + 1) for n in self.used}
        self.notes: list[str] = []

    def columns(self) -> Columns:
        config = self.config
        if self.header and not self.data:
            self.refuse("a header and no rows")
        images = self.asked("image", config.image_column, 2)
        labelled = loose(config.grade_column or "") != NONE
        grades = self.asked("grade", config.grade_column, 2) if labelled else ()
        patient, eye, quality = (
            next(iter(self.asked(what, given, 1)), None)
            for what, given in (("patient", config.patient_column), ("eye", config.eye_column), ("quality", config.quality_column))
        )
        groups = self.groups(config.group_columns)
        if len(images) == 2 and eye is not None:
            raise UsageError(f"--eye-column {config.eye_column}: with a column of images for each eye the column says which it is")
        taken = {n for n in (*images, *grades, patient, eye, quality, *groups.values()) if n is not None}
        if not images or (labelled and not grades):
            chosen = self.by_name if self.header else self.by_place
            images, grades = chosen(images, grades, labelled, taken)
        taken = {
            n for n in (*images, *grades, patient, eye, quality) if n is not None
        }  # a group may also be the patient or the eye
        if config.quality_column is None:
            quality = self.recognised("gradable", words.GRADABLE, taken, "--quality-column")
        if config.patient_column is None and config.patient_pattern is None:
            also = {"id"} if len(images) == 2 else set()
            patient = self.recognised("patients", words.PATIENT | also, taken, "--patient-column")
        if config.eye_column is None and len(images) == len(grades) == 1:
            eye = self.recognised("eyes", words.EYE, taken, "--eye-column")
            if eye is not None and (other := next((cell for cell in self.cells(eye) if cell and not side_of(cell)), None)):
                self.notes[-1] = f"eyes: not from the column {self.names[eye]!r}, where {other[:40]!r} is neither left nor right"
                eye = None
        if len(set(images)) < len(images) or set(images) & set(grades):
            raise UsageError("--image-column and --grade-column: each names another column")
        return Columns(self.header, images, grades, patient, eye, quality, groups, tuple(self.notes))

    # ---- on the command line ---------------------------------------------------------------------------------------

    def asked(self, what: str, given: str | None, most: int) -> tuple[int, ...]:
        """The columns that a flag names: one, or two with a comma between."""
        if given is None:
            return ()
        if self.matches(given):
            return (self.one(what, given),)
        parts = given.split(",")
        if len(parts) > most:
            few = "one column, or two, LEFT,RIGHT" if most == 2 else "one column"
            raise UsageError(f"--{what}-column {given}: {few}")
        return tuple(self.one(what, part.strip()) for part in parts)

    def groups(self, given: str | None) -> dict[str, int]:
        if given is None:
            return {}
        names = [given] if self.matches(given) else [part.strip() for part in given.split(",")]
        return {name: self.one("group", name, "--group-columns") for name in names}

    def matches(self, name: str) -> list[int]:
        exact = [n for n, cell in self.names.items() if cell == name]
        return exact or [n for n, cell in self.names.items() if loose(cell) == loose(name)]

    def one(self, what: str, name: str, flag: str = "") -> int:
        flag = flag or f"--{what}-column"
        found = self.matches(name)
        if not found:
            self.refuse(f"no column {name!r} ({flag}){'' if self.header else '; without a header columns are counted from 1'}")
        if len(found) > 1:
            self.refuse(f"{len(found)} columns are called {name!r} ({flag}); rename one")
        return found[0]

    # ---- by itself -------------------------------------------------------------------------------------------------

    def by_name(
        self, images: tuple[int, ...], grades: tuple[int, ...], labelled: bool, taken: Collection[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        free = [n for n in self.used if n not in taken]
        images = images or self.only("image", [n for n in free if self.loose(n) in words.IMAGE])
        if labelled and not grades:
            found = [n for n in free if self.loose(n) in words.GRADE and n not in images]
            # A number for the quality looks like a grade, and has been taken for one.
            found += [n for n in free if found and self.loose(n) in words.QUALITY and all(whole(c) for c in self.cells(n) if c)]
            grades = self.only("grade", found)
        return images, grades

    def by_place(
        self, images: tuple[int, ...], grades: tuple[int, ...], labelled: bool, taken: Collection[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        free = [n for n in self.used if n not in taken]
        missing = 1 if images or grades or not labelled else 2
        if len(self.used) < missing:
            self.refuse(f"{len(self.used)} column where two are expected, image and grade; {self.without_grades()}")
        if len(free) != missing:
            grade = 2 if labelled else NONE
            self.refuse(
                f"{len(self.used)} columns and no header: which is which? Give their numbers, like --image-column 1 --grade-column "
                f"{grade}; or their names, if line {self.file.first} is a header of words that are not known"
            )
        return images or (free[0],), grades or ((free[-1],) if labelled else ())

    def only(self, what: str, found: list[int]) -> tuple[int, ...]:
        if len(found) == 1:
            return (found[0],)
        flag = f"--{what}-column"
        if not found:
            other = [self.names[n] for n in self.used if n < len(self.data[0]) and _looks_like_image(self.data[0][n])]
            if what == "image":
                pair = ",".join(other[:2])
                like = f", like {flag} {pair!r}, {'one for each eye' if len(other) > 1 else 'which holds names'}" if other else ""
                self.refuse(f"no column is known to hold images; say which with {flag} NAME{like}")
            self.refuse(
                f"no column 'level' or of a like name is known to hold grades; say which with {flag} NAME; {self.without_grades()}"
            )
        named = " and ".join(repr(self.names[n]) for n in found)
        flags = " or ".join(f"{flag} {shown(self.names[n])}" for n in found)
        if what == "image" and len(found) == 2:
            flags += f", or {flag} {shown(','.join(self.names[n] for n in found))} where they are left and right eye"
        if quality := [self.names[n] for n in found if self.loose(n) in words.QUALITY]:
            flags += f" (and --quality-column {shown(quality[0])} where that tells whether an image can be graded)"
        self.refuse(f"the columns {named} could both hold the {what}{'s' * (what == 'image')}; say which with {flags}")

    def recognised(self, what: str, known: Collection[str], taken: Collection[int], flag: str) -> int | None:
        """A column of a well-known name that nobody asked for; a note says so, or that two could be meant and none is taken."""
        found = [n for n in self.used if self.loose(n) in known and n not in taken] if self.header else []
        if len(found) == 1:
            self.notes.append(f"{what}: from the column {self.names[found[0]]!r}")
            return found[0]
        if found:
            self.notes.append(f"{what}: not from a column, since {len(found)} could be meant; choose one with {flag}")
        return None

    def loose(self, number: int) -> str:
        return loose(self.names[number])

    def cells(self, number: int) -> list[str]:
        return [row[number] if number < len(row) else "" for row in self.data]

    def without_grades(self) -> str:
        return f"or pack images without grades with --grade-column {NONE}, or grade them with fastretina predict"

    def refuse(self, reason: str) -> NoReturn:
        names = f"; its columns are {', '.join(map(repr, self.names.values()))[:400]}" if self.header else "; line 1 taken for data"
        fail(self.file.source, self.file.first, f"{reason}. The table was {self.file}{names}")


def shown(name: str) -> str:
    """As a shell takes it."""
    return name if re.fullmatch(r"[\w,.\-]+", name) else f"'{name}'"


def _looks_like_image(cell: str) -> bool:
    return cell.lower().endswith(EXTENSIONS)
