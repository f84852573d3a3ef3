"""Cells that stay what they are, whatever program reads the file, and run nothing in it."""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

import pytest

from fastretina.system.csv_text import csv_line, write_csv

SIGNS = "=+-@＝＋－＠﹦﹢﹣﹫⁼⁺"
BLANKS = ["", " ", "  ", "\xa0", "\u3000", "\u2009"]
UNSEEN = ["\u200b", "\ufeff", "\u202e", "\x1b", "\x01", "\0", "\t", "\r", "\n", "\v", "\u2028"]
NAMES = ["10_left", "Müller, 1 (left)", "图像-1", "a=b", "x; y", "1;2", "é–ü", 'he said "eye"', "'quoted'", "2+2", "n/a"]


def cells(line: str, separator: str = ",") -> list[str]:
    """As a spreadsheet divides a line, whose quotes it believes only at the beginning of a cell, as Python's reader does."""
    (row,) = csv.reader(io.StringIO(line), delimiter=separator)
    return row


def runs(cell: str) -> bool:
    """What the strictest of spreadsheets would take for a formula."""
    shown = "".join(letter for letter in cell if unicodedata.category(letter)[0] not in "CZ")
    return unicodedata.normalize("NFKC", shown)[:1] in ("=", "+", "-", "@")


@pytest.mark.parametrize("before", BLANKS + UNSEEN, ids=ascii)
def test_no_cell_starts_a_formula_wherever_it_is_divided(before: str) -> None:
    for formula in [f"{before}{sign}1+1" for sign in SIGNS]:
        texts = [formula, f"x;{formula}", f";{formula}", f"a,b;{formula}", f"x\t{formula}"]
        for text in [*texts, f'"{formula}', f'a;"{formula}', f'a";"{formula}";']:
            line = csv_line(["10_left", text, 3])
            assert line.count("\n") == 1
            for separator in ",;\t":
                assert not [cell for cell in cells(line, separator) if runs(cell)], (text, line)
            assert len(cells(line)) == 3
            assert "1+1" in cells(line)[1]  # recognisable


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\0", "\t"], ids=ascii)
def test_no_cell_ends_its_row(end: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["name", "more"], [[f"a{end}b", "c"]])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["name,more", f"a{' ' * len(end)}b,c"]


def test_a_header_of_our_own_is_a_cell_like_all_others(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["＝1", "x;=1"], [])
    assert (tmp_path / "a.csv").read_text() == "'＝1,x;'=1\n"


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_as_they_are(name: str) -> None:
    assert cells(csv_line([name, "x"])) == [name, "x"]


def test_numbers_and_undefined_cells_are_plain() -> None:
    assert csv_line([-0.25, None, 3, -4, 1 / 3, "10_left", 'a,"b"']) == '-0.25,,3,-4,0.333333,10_left,"a,""b"""\n'
