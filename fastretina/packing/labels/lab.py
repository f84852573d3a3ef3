"""The lab's layout: `{split}_img.csv` and `{split}_label.csv`, one column each and usually no header.

Row n of one file belongs to row n of the other. Images lie in --images, or in or below the folder of the CSV files.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fastretina.errors import LabelError, UsageError
from fastretina.packing.config import PackConfig
from fastretina.packing.labels import words
from fastretina.packing.labels.classes import Labels, whole
from fastretina.packing.labels.csv_file import CsvFile
from fastretina.packing.labels.images import ImageIndex, image_stem
from fastretina.packing.labels.listing import Listing, build
from fastretina.packing.labels.people import by_name
from fastretina.packing.labels.table import LabelTable, Layout, fail

_OTHER_SPLIT = {"train": "test", "test": "train"}


@dataclass(frozen=True)
class _Column:
    """The only column of a file, without a header. lines: 1-based."""

    source: Path
    lines: list[int]
    cells: list[str]
    digest: str
    encoding: str

    @classmethod
    def read(cls, source: Path, known: Collection[str]) -> _Column:
        """known: what a header may say. LabelError."""
        file = CsvFile.read(source, lambda row: False, blanks=False)
        if (count := len(file.rows[0])) != 1:
            fail(
                source,
                file.first,
                f"{count} columns where one is expected; one table of image,level is given by --images and --labels",
            )
        cells = [row[0] for row in file.rows]
        start = int(words.loose(cells[0]) in known)
        if start == len(cells):
            fail(source, file.first, "a header and no rows")
        lines = list(range(file.first + start, file.first + len(cells)))
        return cls(source, lines, cells[start:], file.digest, file.encoding)


def _read(config: PackConfig, missing_ok: bool) -> LabelTable:
    root, split = config.root, config.split
    assert root is not None
    assert split is not None
    if not split or os.sep in split or "\0" in split:
        raise UsageError(f"--split {split!r}: give what stands before _img.csv, like train")
    images = _Column.read(root / f"{split}_img.csv", words.IMAGE)
    grades = _Column.read(root / f"{split}_label.csv", words.GRADE)
    if len(images.lines) != len(grades.lines):
        raise LabelError(
            f"{grades.source}, line {grades.lines[-1]}: {len(grades.lines)} grades for the {len(images.lines)} names of "
            f"{images.source}; row n of one file must belong to row n of the other"
        )
    listing = Listing(
        source=images.source,
        layout=LAYOUT.name,
        digests={column.source.name: column.digest for column in (images, grades)},
        lines=images.lines,
        names=images.cells,
        labels=Labels(grades.source, grades.lines, grades.cells, _other_labels(config, grades.cells)),
        encoding=images.encoding,
    )
    return build(listing, ImageIndex(config.images or root, config.follow_links), config, missing_ok)


def _other_labels(config: PackConfig, labels: Collection[str]) -> frozenset[str]:
    """The labels of the other split, where it takes both splits' to say what the classes are. LabelError."""
    few = config.classes is None and {whole(cell) or cell for cell in labels if cell} <= {"0", "1"}
    found = _other(config, "label", words.GRADE) if few or config.classes == "auto" else None
    return frozenset(found.cells) if found else frozenset()


def _other(config: PackConfig, kind: str, known: Collection[str]) -> _Column | None:
    """A file of the other split; None where there is none. LabelError."""
    assert config.root is not None
    other = _OTHER_SPLIT.get(config.split or "")
    if other is None or not (source := config.root / f"{other}_{kind}.csv").exists():
        return None
    return _Column.read(source, known)


def _other_patients(config: PackConfig) -> list[str | None] | None:
    found = _other(config, "img", words.IMAGE)
    return None if found is None else [patient or None for patient in by_name([*map(image_stem, found.cells)], config)[0]]


LAYOUT = Layout(
    name="lab",
    usage="--root DIR --split train",
    field="root",
    needs=("split",),
    takes=("images",),
    read=_read,
    other_patients=_other_patients,
)
