"""One table of names and grades: how it is divided into cells, which columns are meant, and what is refused with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from label_cases import images, read_table, rows

from fastretina.beton.reader import UNLABELLED
from fastretina.errors import LabelError, UsageError
from fastretina.grading import RETINOPATHY
from fastretina.packing.labels.table import LeftOut

GRADES = {f"{n}_left": n for n in range(5)}


def lines(separator: str, header: str = "image{}level", row: str = "{}_left{}{}") -> str:
    head = [header.format(separator)] if header else []
    return "\n".join([*head, *(row.format(n, separator, n) for n in range(5))]) + "\n"


def refused(root: Path, text: str | bytes, line: int, words: str, **flags: Any) -> str:
    with pytest.raises(LabelError, match=words) as caught:
        read_table(root, text, **flags)
    assert f"{root / 'all.csv'}, line {line}: " in str(caught.value)
    return str(caught.value)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    images(tmp_path)
    return tmp_path


@pytest.mark.parametrize("separator", [",", ";", "\t", " ", "  ", " ; ", ", "])
@pytest.mark.parametrize("header", ["image{}level", ""])
def test_the_separator_is_found_with_a_header_and_without(place: Path, separator: str, header: str) -> None:
    assert rows(read_table(place, lines(separator, header))) == GRADES


@pytest.mark.parametrize("separator", [";", ",", "\t", "|", ":", "^"])
def test_a_line_that_states_the_separator_is_obeyed_and_counted(place: Path, separator: str) -> None:
    text = f"sep={separator}\n{lines(separator)}"
    assert rows(read_table(place, text)) == GRADES
    assert read_table(place, text).lines.tolist() == [3, 4, 5, 6, 7]
    refused(place, text.replace(f"3_left{separator}3", f"3_left{separator}x"), 6, "grade must be .* not 'x'")


def test_commas_within_cells_of_a_semicolon_table_are_text(place: Path) -> None:
    text = "image;level;comment\n0_left;0;red, round\n1_left;1;none\n2_left;2,0;a, b, c\n"
    assert rows(read_table(place, text)) == {"0_left": 0, "1_left": 1, "2_left": 2}


def test_where_two_separators_divide_alike_the_header_tells_or_the_file_must(place: Path) -> None:
    assert rows(read_table(place, "image;level;a,b\n0_left;3;c,d\n1_left;4;e,f\n")) == {"0_left": 3, "1_left": 4}
    bare = "0_left;2,0\n1_left;4,0\n"
    refused(place, bare, 1, "semicolons or commas may separate.*say which by a line before it, sep=; or sep=,")
    assert rows(read_table(place, "sep=;\n" + bare)) == {"0_left": 2, "1_left": 4}


@pytest.mark.parametrize(
    "text",
    [
        "Image Name;Retinopathy-grade\n0_left;2\n1_left;4\n",
        "ID_CODE,diagnosis\n0_left,2\n1_left,4\n",
        ",image,level\n0,0_left,2\n1,1_left,4\n",
        "level,age,image\n2,33,0_left.jpeg\n4,41,1_left.jpeg\n",
        "Image name,Retinopathy grade,Risk of macular edema ,,,\r\n0_left,2,1,,,\r\n1_left,4,2,,,\r\n",
        "image,level\n0_left,2,,\n1_left,4,,\n,,\n",
        "image,level,comment\n0_left,2\n1_left,4,seen\n",
        '"image","level"\n"0_left","2"\n"1_left","4"\n',
        "image,level\n0_left,2.0\n1_left,4.\n",
        "0_left,2,,\n1_left,4,,\n",
        "0_left.jpeg 2\n1_left.jpeg 4\n\n \n",
        "image,level\r0_left,2\r1_left,4\r",
        "image,level\n0_left,moderate\n1_left,Proliferate_DR\n",
    ],
)
def test_tables_of_the_field_read_as_a_person_reads_them(place: Path, text: str) -> None:
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        assert rows(read_table(place, data)) == {"0_left": 2, "1_left": 4}


def test_letters_of_cp1252_are_read_and_said(tmp_path: Path) -> None:
    images(tmp_path, ["Müller_left.jpeg"])
    table = read_table(tmp_path, "image,level,site\nMüller_left,2,Köln\n".encode("cp1252"), group_columns="site")
    assert (rows(table), table.columns["group site"]) == ({"Müller_left": 2}, ("Köln",))
    assert "all.csv is not UTF-8; read as cp1252 (Western Windows)" in table.notes


@pytest.mark.parametrize(
    ("text", "columns", "flag"),
    [
        ("image,label,level\n0_left,1,2\n", "'label' and 'level'", "--grade-column label or --grade-column level"),
        ("image,class,grade\n0_left,1,2\n", "'class' and 'grade'", "--grade-column class or --grade-column grade"),
        ("image,quality,DR_grade\n0_left,1,2\n", "'DR_grade' and 'quality'", "--quality-column quality"),
        (
            "image,file name,level\n0_left,1_left,2\n",
            "'image' and 'file name'",
            "--image-column image or --image-column 'file name'",
        ),
        (
            "Left-Fundus,Right-Fundus,level\n0_left,1_left,2\n",
            "'Left-Fundus' and 'Right-Fundus'",
            "--image-column Left-Fundus,Right-Fundus",
        ),
        ("image,level,Level\n0_left,1,2\n", "'level' and 'Level'", "--grade-column"),
    ],
)
def test_two_columns_that_could_be_meant_are_named_with_the_flag_that_chooses(
    place: Path, text: str, columns: str, flag: str
) -> None:
    message = refused(place, text, 1, f"the columns {columns} could both hold")
    assert flag in message


@pytest.mark.parametrize(("column", "grade"), [("label", 1), ("level", 2), ("LEVEL", 2), ("Le vel", 2)])
def test_the_flag_chooses_whatever_its_spelling(place: Path, column: str, grade: int) -> None:
    assert rows(read_table(place, "image,label,level\n0_left,1,2\n", grade_column=column)) == {"0_left": grade}


def test_a_quality_in_words_is_no_second_grade(place: Path) -> None:
    assert rows(read_table(place, "image,quality,level\n0_left,good,2\n")) == {"0_left": 2}


def test_columns_of_a_table_without_header_are_chosen_by_number(place: Path) -> None:
    text = "3,0_left,A\n4,1_left,B\n"
    refused(place, text, 1, "3 columns and no header: which is which.*--image-column 1 --grade-column 2")
    table = read_table(place, text, image_column="2", grade_column="1", group_columns="3")
    assert (rows(table), table.columns["group 3"]) == ({"0_left": 3, "1_left": 4}, ("A", "B"))
    assert rows(read_table(place, "3,0_left\n4,1_left\n", grade_column="1")) == {"0_left": 3, "1_left": 4}
    refused(place, text, 1, "no column 'level' .*columns are counted from 1", image_column="2", grade_column="level")


def test_a_table_that_is_not_understood_is_shown_as_it_was_read(place: Path) -> None:
    message = refused(place, "photo;opinion;x\n0_left;2;1\n", 1, "3 columns and no header")
    for word in ("read as UTF-8", "semicolons between", "'photo|opinion|x'", "'0_left|2|1'", "line 1 taken for data"):
        assert word in message
    message = refused(place, "photo,level\n0_left.jpeg,2\n", 1, "no column is known to hold images")
    assert "--image-column NAME, like --image-column 'photo'" in message
    assert "its columns are 'photo', 'level'" in message
    assert rows(read_table(place, "photo;opinion\n0_left;2\n", image_column="photo", grade_column="opinion")) == {"0_left": 2}


def test_a_header_of_unknown_words_is_never_taken_for_a_missing_image(place: Path) -> None:
    text = "photo,opinion\n" + "".join(f"{n}_left,no\n" for n in range(5))
    words = "Or is line 1 a header.*--image-column photo --grade-column opinion.*read as UTF-8, commas between"
    refused(place, text, 1, words, classes="auto", on_bad="skip", max_bad="90%")
    for flags in ({}, {"on_bad": "skip"}):
        refused(place, "photo,opinion\n" + "".join(f"{n}_left,{n}\n" for n in range(5)), 1, words, **flags)
    refused(place, "photo\n0_left\n", 1, "Or is line 1 a header.*--image-column photo --grade-column none", grade_column="none")


def test_a_table_without_grades_names_the_ways_out_and_is_packed_when_asked(place: Path) -> None:
    text = "id_code\n0_left\n1_left\n"
    message = refused(place, text, 1, "--grade-column none")
    assert "fastretina predict" in message
    table = read_table(place, text, grade_column="none")
    assert rows(table) == {"0_left": UNLABELLED, "1_left": UNLABELLED}
    assert table.classes == RETINOPATHY
    assert rows(read_table(place, "0_left\n1_left\n", grade_column="none")) == rows(table)


@pytest.mark.parametrize(
    ("text", "line", "cell"),
    [
        ("image,level\n0_left,0\n1_left,\n2_left,2\n", 3, "an empty cell"),
        ("0_left.jpeg 0\n1_left.jpeg 5\n2_left.jpeg 2\n", 2, "'5'"),
        ("sep=;\nimage;level\n0_left;0\n1_left;?\n2_left;2\n", 4, "'\\?'"),
    ],
)
def test_a_row_without_a_valid_grade_is_an_error_or_left_out_as_asked(place: Path, text: str, line: int, cell: str) -> None:
    message = refused(place, text, line, f"grade must be an integer from 0 to 4 or a word for one, not {cell}")
    assert "--on-bad skip" in message
    table = read_table(place, text, on_bad="skip")
    assert table.grades.tolist() == [0, UNLABELLED, 2]
    assert list(table.left_out) == [1]
    assert table.problems == {}


def test_a_column_of_something_else_is_not_left_out_row_by_row(place: Path) -> None:
    refused(place, "image,level\n0_left,0\n1_left,71\n2_left,55\n3_left,60\n", 3, "and so are most rows", on_bad="skip")
    with pytest.raises(LabelError, match="no row is left to pack"):
        read_table(place, "image,level\n0_left,\n1_left,\n", on_bad="skip")


def test_images_of_rows_that_are_left_out_may_be_missing(place: Path) -> None:
    table = read_table(place, "image,level\n0_left,0\nabsent,5\n", ungradable="5")
    assert table.left_out == {1: LeftOut("ungradable", "grade '5'")}
    assert table.problems == {}


def test_ungradable_values_are_those_of_the_quality_column_or_of_the_grade(place: Path) -> None:
    text = "image,quality,level\n0_left,Good,0\n1_left,poor,1\n2_left,2,2\n3_left,,3\n"
    table = read_table(place, text, quality_column="quality", ungradable="Poor,2.0,awful")
    assert table.left_out == {row: LeftOut("ungradable", f"quality {cell}") for row, cell in ((1, "'poor'"), (2, "'2'"))}
    assert table.grades.tolist() == [0, UNLABELLED, UNLABELLED, 3]
    assert table.columns["quality"] == ("Good", "poor", "2", "")
    assert "--ungradable awful: no row has that quality" in table.notes
    assert read_table(place, "0_left,0\n1_left,9\n", ungradable="9").left_out == {1: LeftOut("ungradable", "grade '9'")}
    for value, flags in (("0", {}), ("no", {"classes": "no,yes"})):
        with pytest.raises(UsageError, match=f"--ungradable {value}: that is one of the classes"):
            read_table(place, "0_left,0\n1_left,1\n", ungradable=value, **flags)


def test_a_table_that_says_which_images_cannot_be_graded_is_believed(place: Path) -> None:
    text = "image_id,adjudicated_dr_grade,adjudicated_gradable\n0_left,2,1\n1_left,,0\n2_left,3,0\n"
    message = refused(place, text, 3, r"ungradable \(adjudicated_gradable is '0'\)")
    assert "--on-bad skip or --quality-column adjudicated_gradable --ungradable 0" in message
    for flags in ({"on_bad": "skip"}, {"quality_column": "adjudicated_gradable", "ungradable": "0"}):
        table = read_table(place, text, **flags)
        assert list(table.left_out) == [1, 2]
        assert table.grades.tolist() == [2, UNLABELLED, UNLABELLED]
    with pytest.raises(UsageError, match="of the grades or of the quality"):
        read_table(place, text, ungradable="0")


def test_names_that_other_programs_read_as_numbers_dates_or_nothing_stay_text(tmp_path: Path) -> None:
    names = ["nan", "None", "NA", "0001", "1e5", "2021-03-04", "True"]
    images(tmp_path, [f"{name}.png" for name in names])
    text = "image,level,patient\n" + "".join(f"{name},{n % 5},{name}\n" for n, name in enumerate(names))
    table = read_table(tmp_path, text)
    assert rows(table) == {name: n % 5 for n, name in enumerate(names)}
    assert table.columns["patient"] == tuple(names)


def test_what_else_the_folder_holds_is_counted(place: Path) -> None:
    for name in ("Thumbs.db", ".DS_Store"):
        (place / "img" / name).write_bytes(b"x")
    notes = read_table(place, "image,level\n0_left,0\n1_left,2\n").notes
    assert "images of the folder that no row names: 3" in notes
    assert "beside images the folder holds 1 .db, 1 hidden" in notes


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('image,level\n0_left,0\n"1_left"x,1\n', 3, "text after a closing quote"),
        ('image,level,note\n0_left,0,"a\nb"\n1_left,1,\n', 2, "line break inside a cell"),
        ("image,level\n0_left,0\n1_left,1,2\n", 3, "3 columns, more than the 2 of line 1"),
        ("sep=;\nimage;level\n0_left;0\n\n1_left;1\n", 4, "blank line between rows"),
        ("image,level\n", 1, "a header and no rows"),
        ("image,level\n0_left,0\n1_left\n", 3, "an empty cell"),
    ],
)
def test_malformed_rows_are_named_by_their_line(place: Path, text: str, line: int, words: str) -> None:
    refused(place, text, line, words)
