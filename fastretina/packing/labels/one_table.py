"""One table of names and grades, with any further columns: Kaggle's, the public sets', a clinic's export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastretina.grading import eye_of, side_of
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.classes import Labels
from fastretina.packing.labels.columns import NONE, Columns, asked_names, columns_of, is_header, shown
from fastretina.packing.labels.csv_file import WINDOWS, CsvFile
from fastretina.packing.labels.images import ImageIndex, image_stem
from fastretina.packing.labels.listing import Listing, build
from fastretina.packing.labels.table import LabelTable, Layout, LeftOut, fail
from fastretina.packing.labels.words import GRADABLE, loose

_SIDES = ("left", "right")


def _read(config: PackConfig, missing_ok: bool) -> LabelTable:
    assert config.labels is not None
    assert config.images is not None
    asked = asked_names(config)
    file = CsvFile.read(config.labels, lambda row: is_header(row, asked))
    columns = columns_of(file, config)
    index = ImageIndex(config.images, config.follow_links)
    table = build(_Rows(file, columns).listing(config), index, config, missing_ok)
    if (unnamed := len(index.images) - sum(map(bool, table.paths))) > 0:
        note = f"images of the folder that no row names: {unnamed:,}"
        return table.noted(note)
    return table


@dataclass
class _Rows:
    """The images of a table's rows: one each, or one for each eye. Lists of N, an item for each image."""

    file: CsvFile
    columns: Columns
    at: list[int] = field(default_factory=list)  # row of the data
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    eyes: list[str] | None = None
    absent: int = 0  # eyes without an image, of rows that have room for two

    def __post_init__(self) -> None:
        self.data = self.file.rows[1:] if self.columns.header else self.file.rows
        self.start = self.file.first + self.columns.header

    def listing(self, config: PackConfig) -> Listing:
        """What the table says. LabelError, UsageError."""
        images, grades = self.columns.images, self.columns.grades
        if len(images) == 2:
            self._two_images(images, grades)
        elif len(grades) == 2:
            self._two_grades(images[0], grades)
        else:
            self.at = list(range(len(self.data)))
            self.names, self.labels = self._cells(images[0]), self._cells(grades[0]) if grades else []
        lines = [self.start + row for row in self.at]
        return Listing(
            source=self.file.source,
            layout=LAYOUT.name,
            digests={self.file.source.name: self.file.digest},
            lines=lines,
            names=self.names,
            labels=Labels(self.file.source, lines, self.labels, hint=self._hint()) if grades else None,
            patients=self._patients(config),
            eyes=self.eyes or self._eyes(),
            quality=self._spread(self.columns.quality),
            groups={name: self._cells_at(column) for name, column in self.columns.groups.items()},
            ungradable=self._ungradable(),
            way_out=f"--quality-column {self._name(self.columns.quality)} --ungradable 0",
            hint=self._hint(),
            encoding=self.file.encoding,
            notes=self._notes(),
        )

    # ---- rows to images --------------------------------------------------------------------------------------------

    def _two_images(self, images: tuple[int, ...], grades: tuple[int, ...]) -> None:
        """A row a patient: the left image, then the right one."""
        self.eyes = []
        for row, cells in enumerate(self.data):
            found = [(side, name) for side, n in enumerate(images) if (name := _cell(cells, n))]
            if not found:
                fail(self.file.source, self.start + row, "neither eye has an image")
            self.absent += 2 - len(found)
            for side, name in found:
                self.at.append(row)
                self.names.append(name)
                self.eyes.append(_SIDES[side])
                if grades:
                    self.labels.append(_cell(cells, grades[side % len(grades)]))

    def _two_grades(self, image: int, grades: tuple[int, ...]) -> None:
        """A row an image, and a column of grades for each eye: the one that is filled, or that of the eye that the row names."""
        self.at, self.names, self.eyes = list(range(len(self.data))), self._cells(image), []
        stated = self._eyes() or [(eye_of(image_stem(name)) or ("", ""))[1] for name in self.names]
        for row, cells in enumerate(self.data):
            both = [_cell(cells, n) for n in grades]
            filled = [side for side, cell in enumerate(both) if cell]
            if stated[row]:
                side = _SIDES.index(stated[row])
            elif len(filled) == 2:
                fail(
                    self.file.source,
                    self.start + row,
                    "a grade for each eye, and nothing says which eye the image shows (--eye-column)",
                )
            else:
                side = filled[0] if filled else -1
            self.labels.append(both[side] if side >= 0 else "")
            self.eyes.append(_SIDES[side] if side >= 0 else "")

    # ---- columns ---------------------------------------------------------------------------------------------------

    def _name(self, column: int | None) -> str:
        if column is None:
            return ""
        return self.file.rows[0][column] if self.columns.header else str(column + 1)

    def _cells(self, column: int) -> list[str]:
        return [_cell(row, column) for row in self.data]

    def _cells_at(self, column: int) -> list[str]:
        return [_cell(self.data[row], column) for row in self.at]

    def _spread(self, column: int | None) -> list[str] | None:
        return None if column is None else self._cells_at(column)

    def _eyes(self) -> list[str] | None:
        column = self.columns.eye
        if column is None:
            return None
        cells = self._cells(column)
        sides = {cell: side_of(cell) or "" for cell in set(cells)}
        for row, cell in enumerate(cells):
            if cell and not sides[cell]:
                what = f"eye {cell[:40]!r}: left, right, L, R, OS or OD are known; without --eye-column names tell"
                fail(self.file.source, self.start + row, what)
        return [sides[cell] for cell in cells]

    def _patients(self, config: PackConfig) -> list[str] | None:
        """Of the column; of rows with an image for each eye, without one: each row is a person."""
        if self.columns.patient is not None:
            return self._cells_at(self.columns.patient)
        if len(self.columns.images) == 1 or config.patient_pattern is not None:
            return None
        persons: dict[int, list[str]] = {}
        for row, name in zip(self.at, self.names, strict=True):
            persons.setdefault(row, []).append(image_stem(name))
        return [_person(persons[row]) for row in self.at]

    def _ungradable(self) -> dict[int, LeftOut]:
        column = self.columns.quality
        if column is None or loose(self._name(column)) not in GRADABLE:
            return {}
        cells = enumerate(self._cells_at(column))
        no = ("0", "0.0", "no", "false")
        return {row: LeftOut("ungradable", f"{self._name(column)} is {cell!r}") for row, cell in cells if cell.lower() in no}

    def _hint(self) -> str:
        """Of a first row that was taken for data: how to say that it is a header."""
        if self.columns.header:
            return ""
        images, grades = (
            ",".join(_cell(self.file.rows[0], n) for n in numbers) for numbers in (self.columns.images, self.columns.grades)
        )
        named = f"--image-column {shown(images)} --grade-column {shown(grades or NONE)}"
        return f". Or is line {self.start} a header? Then name its columns, {named[:200]}. The table was {self.file}"

    def _notes(self) -> tuple[str, ...]:
        notes = [*self.columns.notes]
        if self.file.encoding == WINDOWS:
            notes.append(f"{self.file.source.name} is not UTF-8; read as {WINDOWS} (Western Windows)")
        if self.absent:
            notes.append(f"eyes without an image in their row: {self.absent:,}")
        if len(self.columns.images) == 2 and len(self.columns.grades) == 1:
            notes.append(f"one label, of the column {self._name(self.columns.grades[0])!r}, for both images of a row")
        return tuple(notes)


def _cell(row: Sequence[str], column: int) -> str:
    return row[column] if column < len(row) else ""


def _person(names: Sequence[str]) -> str:
    """What to call a patient of whom only the images are known; no other row has it, in no table of the same names."""
    patients = {eye[0] if (eye := eye_of(name)) else name for name in names}
    return patients.pop() if len(patients) == 1 else names[0]


LAYOUT = Layout(
    name="table",
    usage="--images DIR --labels FILE",
    field="labels",
    needs=("images",),
    takes=("image_column", "grade_column", "patient_column", "eye_column", "group_columns", "quality_column"),
    read=_read,
)
