"""Whose image it is, and which eye: a column, a pattern or the name, and "" where nobody knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_cases import dicom_of
from label_cases import images, read_table, rows

from fastretina.errors import LabelError, UsageError

NAMES = ["a_L.jpg", "a_R.jpg", "IM3.jpg"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    images(tmp_path, NAMES)
    return tmp_path


def test_names_tell_what_they_can(place: Path) -> None:
    table = read_table(place, "a_L,0\na_R,1\nIM3,2\n")
    assert table.columns == {"patient": ("a", "a", ""), "eye": ("left", "right", "")}
    assert table.patients == ["a", "a", None]


def test_nothing_known_is_no_column(place: Path) -> None:
    assert read_table(place, "IM3,2\n").columns == {}


@pytest.mark.parametrize(("header", "flags"), [("patient_id", {}), ("MRN", {"patient_column": "mrn"})])
def test_a_column_wins_over_names_and_an_empty_cell_is_unknown(place: Path, header: str, flags: dict[str, str]) -> None:
    table = read_table(place, f"image,level,{header},eye\na_L,0,P1,R\na_R,1,,OS\nIM3,2,P2,\n", **flags)
    assert table.columns == {"patient": ("P1", "", "P2"), "eye": ("right", "left", "")}
    assert ("patients: from the column 'patient_id'" in table.notes) == (not flags)
    assert "eyes: from the column 'eye'" in table.notes


def test_two_columns_of_patients_are_none_and_said(place: Path) -> None:
    table = read_table(place, "image,level,patient,subject\na_L,0,P1,S1\n")
    assert table.columns["patient"] == ("a",)
    assert any("patients: not from a column, since 2 could be meant; choose one with --patient-column" in n for n in table.notes)


def test_groups_and_quality_are_kept_as_text(place: Path) -> None:
    table = read_table(
        place, "image,level,Sex,camera,q\na_L,0,F,0012,ok\nIM3,2,,Topcon 3,bad\n", group_columns="sex,camera", quality_column="q"
    )
    assert table.columns["group sex"] == ("F", "")
    assert table.columns["group camera"] == ("0012", "Topcon 3")
    assert table.columns["quality"] == ("ok", "bad")


def test_an_eye_of_another_word_is_an_error_by_row(place: Path) -> None:
    with pytest.raises(LabelError, match="line 3: eye '2': left, right, L, R, OS or OD"):
        read_table(place, "image,level,which\na_L,0,OD\na_R,1,2\n", eye_column="which")


def test_a_column_of_eyes_in_other_words_is_taken_when_asked_only(place: Path) -> None:
    table = read_table(place, "image_id,level,exam_eye\na_L,0,1\nIM3,2,2\n")
    assert table.columns["eye"] == ("left", "")
    assert "eyes: not from the column 'exam_eye', where '1' is neither left nor right" in table.notes


def test_a_pattern_finds_patients_and_eyes_in_names_with_their_folder(tmp_path: Path) -> None:
    images(tmp_path, ["s1/P7-OD-1.jpg", "s2/P7-OS-1.jpg", "s2/X.jpg"])
    text = "image,level,patient\ns1/P7-OD-1,0,A\nP7-OS-1,1,B\nX,2,C\n"
    table = read_table(tmp_path, text, patient_pattern=r"P(?P<patient>\d+)-(?P<eye>O[DS])")
    assert table.columns == {"patient": ("7", "7", ""), "eye": ("right", "left", "")}
    table = read_table(tmp_path, text, patient_pattern=r"^(s\d/P\d+)")
    assert table.columns == {"patient": ("s1/P7", "", "")}


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"patient_pattern": "("}, UsageError, r"--patient-pattern \(: no regular expression"),
        ({"patient_pattern": "a_"}, UsageError, "put what is the patient in parentheses"),
        ({"patient_pattern": "(?P<eye>L|R)"}, UsageError, "put what is the patient in parentheses"),
        ({"patient_pattern": r"(\d{5})_"}, LabelError, "matches no name, like 'a_L'"),
        ({"patient_pattern": "(.)_", "patient_column": "p"}, UsageError, "two ways to say who the patient is"),
        ({"patient_column": "nobody"}, LabelError, "no column 'nobody'"),
    ],
)
def test_what_cannot_tell_the_patient_is_refused(place: Path, flags: dict[str, str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_table(place, "image,level,p\na_L,0,1\na_R,1,1\n", **flags)


def test_a_column_of_a_group_may_also_be_the_patient_or_the_eye(place: Path) -> None:
    table = read_table(place, "image,level,patient,eye\na_L,0,P1,R\n", group_columns="eye,patient")
    assert table.columns == {"patient": ("P1",), "eye": ("right",), "group eye": ("R",), "group patient": ("P1",)}


def test_a_dicom_file_says_who_it_is_where_nothing_else_does(tmp_path: Path) -> None:
    folder = images(tmp_path, ["a_L.jpg", "broken.dcm"])
    pixels = np.zeros((8, 8, 3), np.uint8)
    (folder / "1.2.3").write_bytes(dicom_of(pixels, PatientID="P7", ImageLaterality="R"))
    (folder / "b_L.dcm").write_bytes(dicom_of(pixels, PatientID="P8", ImageLaterality="R"))
    (folder / "c.dcm").write_bytes(dicom_of(pixels, PatientID="P9", Laterality="B"))
    text = "a_L,0\n1.2.3,2\nb_L,2\nc,2\nbroken,2\n"
    table = read_table(tmp_path, text)
    assert table.columns == {"patient": ("a", "P7", "b", "P9", ""), "eye": ("left", "right", "left", "", "")}
    assert "patients or eyes from the headers of DICOM files: 2" in table.notes
    table = read_table(tmp_path, "image,level,patient\n1.2.3,2,X\nc,2,\n")
    assert table.columns == {"patient": ("X", ""), "eye": ("right", "")}
    assert read_table(tmp_path, text, patient_pattern="([ab])_").columns["patient"] == ("a", "", "b", "", "")


TWO = "ID,Left,Right,left_dr,right_dr\n7,7_left.jpg,7_right.jpg,0,3\n8,8_left.jpg,,1,\n"


def test_a_row_a_patient_is_an_image_for_each_eye(tmp_path: Path) -> None:
    images(tmp_path, ["7_left.jpg", "7_right.jpg", "8_left.jpg"])
    table = read_table(tmp_path, TWO, image_column="Left,Right", grade_column="left_dr,right_dr")
    assert rows(table) == {"7_left": 0, "7_right": 3, "8_left": 1}
    assert table.columns == {"patient": ("7", "7", "8"), "eye": ("left", "right", "left")}
    assert table.lines.tolist() == [2, 2, 3]
    assert {"patients: from the column 'ID'", "eyes without an image in their row: 1"} <= set(table.notes)


def test_without_a_column_of_patients_a_row_is_a_person(tmp_path: Path) -> None:
    images(tmp_path, ["7_left.jpg", "7_right.jpg", "a.jpg", "b.jpg"])
    text = "l;r;dl;dr\n7_left;7_right;0;3\na;b;1;2\n"
    table = read_table(tmp_path, text, image_column="l,r", grade_column="dl,dr")
    assert table.columns == {"patient": ("7", "7", "a", "a"), "eye": ("left", "right", "left", "right")}


def test_one_label_for_both_eyes_is_said(tmp_path: Path) -> None:
    images(tmp_path, ["7_left.jpg", "7_right.jpg", "8_left.jpg"])
    table = read_table(tmp_path, "ID,l,r,D\n7,7_left,7_right,1\n8,8_left,,0\n", image_column="l,r", grade_column="D")
    assert (rows(table), table.classes.names) == ({"7_left": 1, "7_right": 1, "8_left": 0}, ("0", "1"))
    assert "one label, of the column 'D', for both images of a row" in table.notes


def test_a_row_an_image_with_a_grade_for_each_eye_takes_the_one_that_is_filled(tmp_path: Path) -> None:
    images(tmp_path, ["1_l1.jpg", "1_r1.jpg", "2_l1.jpg", "x.jpg"])
    head = "patient_id,image_id,left_eye_DR_Level,right_eye_DR_Level\n"
    flags = {"image_column": "image_id", "grade_column": "left_eye_DR_Level,right_eye_DR_Level"}
    table = read_table(tmp_path, head + "1,1_l1,2,\n1,1_r1,,4\n2,2_l1,0,\n", **flags)
    assert rows(table) == {"1_l1": 2, "1_r1": 4, "2_l1": 0}
    assert table.columns == {"patient": ("1", "1", "2"), "eye": ("left", "right", "left")}
    with pytest.raises(LabelError, match=r"line 2: a grade for each eye, and nothing says which eye .*--eye-column"):
        read_table(tmp_path, head + "1,x,2,3\n", **flags)
    table = read_table(tmp_path, head.strip() + ",eye\n1,x,2,3,OD\n", eye_column="eye", **flags)
    assert rows(table) == {"x": 3}


def test_flags_that_contradict_two_columns_of_images_are_refused(tmp_path: Path) -> None:
    images(tmp_path, ["7_left.jpg", "7_right.jpg"])
    for flags, words in (
        ({"eye_column": "ID"}, "the column says which it is"),
        ({"grade_column": "left_dr,right_dr,ID"}, "one column, or two, LEFT,RIGHT"),
        ({"grade_column": "Left,right_dr"}, "each names another column"),
        ({"image_column": "Left,Left"}, "each names another column"),
    ):
        with pytest.raises(UsageError, match=words):
            read_table(tmp_path, TWO, **{"image_column": "Left,Right", "grade_column": "left_dr,right_dr", **flags})
