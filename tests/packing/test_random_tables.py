"""A thousand tables as programs and people write them: each is read as it was meant, or refused, and never read otherwise."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import images, read_table, rows

from fastretina.beton.reader import UNLABELLED
from fastretina.errors import LabelError, UsageError

NAMES = (
    "10_left", "10_right", "0001", "nan", "None", "1e5", "2021-03-04", "True", "a b_left", "x,y_left", "p;q_right", "it's", "=1+1",
    "Müller_left", "Zoë_right", "10:30_left", "s1/3_left", "s2/4_right", 'say "ah"', "NA", "-", "5,6", "7;8", "image 12", "no 1",
)  # fmt: skip
SURPLUS = ("", "33", "0", "1", "M", "n/a", "a, b", "c; d", "e f", 'so "so"', "Köln", "2.5", "no DR", "left eye")
IMAGE_HEADS = ("image", "Image name", "ID_CODE", "image-id", "Filename", "IMAGE_PATH")
GRADE_HEADS = ("level", "Retinopathy grade", "diagnosis", "DR_grade", "adjudicated_dr_grade", "Grade")
SURPLUS_HEADS = ("age", "Risk of macular edema ", "camera model", "", "Usage", "remark, if any", "x;y")
WORDS = (("No DR", "no_dr"), ("Mild", "mild NPDR"), ("moderate",), ("SEVERE", "severe npdr"), ("Proliferative DR", "PDR"))
ENDS = ("\n", "\r\n", "\r")


@dataclass(frozen=True)
class Drawn:
    """A table's text as bytes; what a person reads in it; the flags that say which columns are meant."""

    data: bytes
    meant: dict[str, int]
    flags: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("random")
    images(root, [f"{name}.jpeg" for name in NAMES])
    return root


def written(draw: st.DrawFn, grade: int) -> str:
    if grade == UNLABELLED:
        return draw(st.sampled_from(("", "5", "n/a", "-1", "ungradable", "02")))
    return draw(st.sampled_from((str(grade), f"{grade}.0", f" {grade} ", f"{grade},0", *WORDS[grade])))


def quoted(cells: Sequence[str], separator: str, quoting: int) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, quoting=quoting, lineterminator="").writerow(cells)
    return out.getvalue()


@st.composite
def tables(draw: st.DrawFn, clean: bool) -> Drawn:
    """clean: such that there is one way to read it; else quotes, headers and encodings may be missing, wrong or in doubt."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    left_out = draw(st.booleans())  # rows without a valid grade
    grades = [draw(st.integers(-1 if left_out and number % 2 else 0, 4)) for number in range(len(names))]
    columns = [["image", *names], ["grade", *(written(draw, grade) for grade in grades)]]
    headed = clean or draw(st.booleans())
    chosen = draw(st.booleans())
    columns[0][0] = draw(st.sampled_from(("photograph",) if chosen else IMAGE_HEADS))
    columns[1][0] = draw(st.sampled_from(("opinion",) if chosen else GRADE_HEADS))
    flags = {"image_column": "photograph", "grade_column": "Opinion"} if chosen else {}
    flags |= {"on_bad": "skip"} if left_out else {}
    heads = draw(st.lists(st.sampled_from(SURPLUS_HEADS if clean else (*SURPLUS_HEADS, "label", "quality")), max_size=3))
    if chosen and clean and draw(st.booleans()):
        heads.append("level")  # no doubt is left by the flags
    columns += [[head, *(draw(st.sampled_from(SURPLUS)) for _ in names)] for head in heads]
    columns = draw(st.permutations(columns)) if headed else columns
    columns += [[""] * (len(names) + 1)] * draw(st.integers(0, 2))
    separator = draw(st.sampled_from((",", ";", "\t", " ") if clean else (",", ";", "\t", " ", "|")))
    quoting = csv.QUOTE_ALL if separator == " " else draw(st.sampled_from((csv.QUOTE_ALL, csv.QUOTE_MINIMAL)))
    lines = [quoted(cells, separator, quoting) for cells in zip(*columns, strict=True)]
    if not clean and draw(st.booleans()):
        # Not of the header: with a separator in a name, and in as many cells of each row, a person would read other columns, too.
        lines[1:] = [separator.join(cells) for cells in list(zip(*columns, strict=True))[1:]]
    if not headed:
        numbers = {"image_column": "1", "grade_column": "2"}
        lines, flags = lines[1:], (flags | numbers if chosen or draw(st.booleans()) else flags)
    stated = (clean and draw(st.booleans())) or (not clean and draw(st.integers(0, 3)) == 0)
    if stated:
        lines.insert(0, f"sep={separator}")
    text = "".join(f"{line}{end}" for end in [draw(st.sampled_from(ENDS))] for line in lines)
    text += draw(st.sampled_from(("", "\n", "\r\n\r\n", " \n")))
    encodings = (
        ("utf-8", "utf-8-sig", "utf-16", "cp1252")
        if clean
        else ("utf-8", "utf-8-sig", "utf-16-le", "gb18030", "mac-roman", "cp1252")
    )
    return Drawn(text.encode(draw(st.sampled_from(encodings))), dict(zip(names, grades, strict=True)), flags)


@settings(max_examples=500, deadline=None)
@given(tables(clean=True))
def test_a_table_that_can_be_read_in_one_way_is_read_in_that_way(place: Path, drawn: Drawn) -> None:
    assert rows(read_table(place, drawn.data, **drawn.flags)) == drawn.meant


@settings(max_examples=500, deadline=None)
@given(tables(clean=False))
def test_a_table_in_doubt_is_read_as_it_was_meant_or_refused(place: Path, drawn: Drawn) -> None:
    try:
        table = read_table(place, drawn.data, **drawn.flags)
    except (LabelError, UsageError):
        return
    packed = {
        table.names[row]: int(table.grades[row]) for row in range(len(table)) if row not in {*table.problems, *table.left_out}
    }
    assert len(table) == len(drawn.meant)
    assert packed.items() <= drawn.meant.items()
    counted = len(packed) + len(table.problems) + len(table.left_out)
    assert counted == len(table)
