"""Kaggle's layout: one CSV of `image,level`; further columns are ignored where a header names them."""

from __future__ import annotations

from fastretina.packing.config import PackConfig
from fastretina.packing.labels.csv_file import GRADE_WORDS, IMAGE_WORDS, CsvFile
from fastretina.packing.labels.images import ImageIndex
from fastretina.packing.labels.table import LabelTable, Layout, parse_grades


def _read(config: PackConfig, missing_ok: bool) -> LabelTable:
    assert config.labels is not None
    assert config.images is not None
    file = CsvFile.read(config.labels)
    lines, (names, cells) = file.columns(IMAGE_WORDS, GRADE_WORDS)
    grades, digests = parse_grades(file.source, lines, cells), {file.source.name: file.digest}
    return LabelTable.build(file.source, lines, names, grades, ImageIndex(config.images), LAYOUT.name, digests, missing_ok)


LAYOUT = Layout(name="kaggle", usage="--images DIR --labels CSV", field="labels", needs=("images",), read=_read)
