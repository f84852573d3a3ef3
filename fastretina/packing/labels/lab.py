"""The lab's layout: `{split}_img.csv` and `{split}_label.csv`, one column each and usually no header.

Row n of one file belongs to row n of the other. Images lie in --images, or in or below the folder of the CSV files.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastretina.errors import LabelError, UsageError
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.csv_file import GRADE_WORDS, IMAGE_WORDS, CsvFile
from fastretina.packing.labels.images import ImageIndex, image_stem
from fastretina.packing.labels.table import LabelTable, Layout, fail, parse_grades

_OTHER_SPLIT = {"train": "test", "test": "train"}


def _read(config: PackConfig, missing_ok: bool) -> LabelTable:
    root, split = config.root, config.split
    assert root is not None
    assert split is not None
    if not split or os.sep in split or "\0" in split:
        raise UsageError(f"--split {split!r}: give what stands before _img.csv, like train")
    source, grade_file = root / f"{split}_img.csv", root / f"{split}_label.csv"
    lines, names, digest = _only_column(source, IMAGE_WORDS)
    grade_lines, cells, grade_digest = _only_column(grade_file, GRADE_WORDS)
    if len(lines) != len(grade_lines):
        raise LabelError(
            f"{grade_file}, line {grade_lines[-1]}: {len(grade_lines)} grades for the {len(lines)} names of {source}; "
            "row n of one file must belong to row n of the other"
        )
    grades = parse_grades(grade_file, grade_lines, cells)
    digests = {source.name: digest, grade_file.name: grade_digest}
    index = ImageIndex(config.images or root)
    return LabelTable.build(source, lines, names, grades, index, LAYOUT.name, digests, missing_ok)


def _only_column(source: Path, words: tuple[str, ...]) -> tuple[list[int], list[str], str]:
    """Lines and cells of a file that must have no other column, and its digest."""
    file = CsvFile.read(source)
    if (count := len(file.rows[0])) != 1:
        fail(source, 1, f"{count} columns where one is expected; one CSV of image,level is given by --images and --labels")
    lines, (cells,) = file.columns(words)
    return lines, cells, file.digest


def _other_names(config: PackConfig) -> tuple[str, ...] | None:
    assert config.root is not None
    other = _OTHER_SPLIT.get(config.split or "")
    if other is None or not (source := config.root / f"{other}_img.csv").exists():
        return None
    return tuple(map(image_stem, _only_column(source, IMAGE_WORDS)[1]))


LAYOUT = Layout(
    name="lab",
    usage="--root DIR --split train",
    field="root",
    needs=("split",),
    takes=("images",),
    read=_read,
    other_names=_other_names,
)
