"""What labels mean: the five grades, two classes, or others, as the command line or the labels say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from label_cases import OUT, images, read_table, rows

from fastretina.errors import LabelError, UsageError
from fastretina.grading import RETINOPATHY, Classes
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.classes import Labels, graded, known_grade, whole
from fastretina.packing.labels.registry import layout_of


def classes_of(*labels: str, folders: bool = False, **flags: Any) -> tuple[Classes, list[int]]:
    config = PackConfig(OUT, **flags)
    found = graded(Labels(Path("all.csv"), range(1, len(labels) + 1), labels, folders=folders), config, {})
    return found.classes, found.numbers.tolist()


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (["0", "1", "2", "3", "4"], [0, 1, 2, 3, 4]),
        (["0", "0"], [0, 0]),
        (["1", "4"], [1, 4]),
        (["2.0", "2", "2,0", "2."], [2, 2, 2, 2]),
        (["No DR", "Mild", "Moderate", "Severe", "Proliferative DR"], [0, 1, 2, 3, 4]),
        (["No_DR", "mild-npdr", "Moderate NPDR", "SEVERE", "Proliferate_DR"], [0, 1, 2, 3, 4]),
        (["Healthy", "pdr", "moderate non proliferative retinopathy"], [0, 4, 2]),
    ],
)
@pytest.mark.parametrize("folders", [False, True])
def test_grades_and_known_words_for_them_are_retinopathy(labels: list[str], numbers: list[int], folders: bool) -> None:
    assert classes_of(*labels, folders=folders) == (RETINOPATHY, numbers)
    assert classes_of(*labels, classes="0,1,2,3,4") == (RETINOPATHY, numbers)


@pytest.mark.parametrize(("text", "number"), [("2", "2"), ("2.00", "2"), ("10,0", "10"), ("0", "0")])
def test_whole_numbers(text: str, number: str) -> None:
    assert whole(text) == number


@pytest.mark.parametrize("text", ["", "02", "+2", "-0", "2e0", "2.5", "2,", "٣", "2 0", "2.0.0"])
def test_what_is_no_whole_number_is_no_grade(text: str) -> None:
    assert whole(text) is None
    assert known_grade(text) is None


def test_no_grade_is_made_of_another_scale() -> None:
    assert [known_grade(word) for word in ("R0", "R2", "5", "DR", "M1", "nonproliferative")] == [None] * 6


def test_labels_that_are_all_0_or_1_are_two_classes_and_said(tmp_path: Path) -> None:
    images(tmp_path)
    table = read_table(tmp_path, "image,level\n0_left,0\n1_left,1\n")
    assert table.classes == Classes(("0", "1"), referable=(1,), ordinal=False)
    assert table.grades.tolist() == [0, 1]
    assert "two classes, since all labels are 0 or 1; --classes 0,1,2,3,4 if they are grades of retinopathy" in table.notes
    table = read_table(tmp_path, "image,level\n0_left,0\n1_left,1\n", classes="0,1,2,3,4")
    assert table.classes == RETINOPATHY
    assert not any("two classes" in note for note in table.notes)


def test_grades_of_a_set_whose_gradable_images_are_0_or_1_stay_grades(tmp_path: Path) -> None:
    images(tmp_path)
    assert read_table(tmp_path, "0_left,0\n1_left,1\n2_left,5\n", ungradable="5").classes == RETINOPATHY


@pytest.mark.parametrize(("other", "classes"), [("0\n1\n", ("0", "1")), ("0\n2\n", RETINOPATHY.names), (None, ("0", "1"))])
def test_both_splits_of_the_lab_say_what_the_classes_are(tmp_path: Path, other: str | None, classes: tuple[str, ...]) -> None:
    for n in range(2):
        (tmp_path / f"{n}_left.jpeg").touch()
    (tmp_path / "train_img.csv").write_text("0_left\n1_left\n")
    (tmp_path / "train_label.csv").write_text("0\n1\n")
    if other:
        (tmp_path / "test_label.csv").write_text(other)
    config = PackConfig(OUT, root=tmp_path, split="train")
    assert layout_of(config).read(config, False).classes.names == classes


def test_other_labels_of_a_table_are_an_error_that_names_row_value_and_flags() -> None:
    with pytest.raises(LabelError, match=r"all.csv, line 2: grade must be .* not 'glaucoma'.*--classes auto") as caught:
        classes_of("0", "glaucoma")
    assert "--ungradable glaucoma" in str(caught.value)


def test_other_labels_in_a_first_row_may_be_classes_or_a_header(tmp_path: Path) -> None:
    images(tmp_path)
    with pytest.raises(LabelError, match=r"all.csv, line 1: .* not 'yes'; if there are other classes.*Or is line 1 a header"):
        read_table(tmp_path, "0_left,yes\n1_left,no\n")
    assert rows(read_table(tmp_path, "0_left,yes\n1_left,no\n", classes="auto")) == {"0_left": 1, "1_left": 0}


def test_auto_takes_the_labels_as_they_are_in_order() -> None:
    assert classes_of("10", "2", "9", classes="auto") == (Classes(("2", "9", "10")), [2, 0, 1])
    assert classes_of("2", "1", "3", classes="auto") == (Classes(("1", "2", "3"), ordinal=True), [1, 0, 2])
    assert classes_of("yes", "no", classes="auto") == (Classes(("no", "yes"), referable=(1,)), [1, 0])
    assert classes_of("glaucoma", "AMD", "normal", classes="auto") == (Classes(("AMD", "glaucoma", "normal")), [1, 0, 2])
    assert classes_of("3", "0", "1", "2", "4", classes="auto") == (RETINOPATHY, [3, 0, 1, 2, 4])
    for labels in (("1", "1.0"), tuple(map(str, range(101)))):
        with pytest.raises(LabelError, match=rf"all.csv: {1 if len(labels) == 2 else 101} different labels"):
            classes_of(*labels, classes="auto")


def test_folders_that_are_no_grades_are_classes_of_their_own() -> None:
    assert classes_of("glaucoma", "normal", "cataract", folders=True)[0].names == ("cataract", "glaucoma", "normal")
    assert classes_of("R0", "R1", folders=True)[0] == Classes(("R0", "R1"), referable=(1,))


def test_named_classes_are_given_by_name_or_by_number_where_no_name_is_one() -> None:
    two = Classes(("no", "yes"), referable=(1,))
    assert classes_of("No", "1", "YES", "0", classes="no,yes") == (two, [0, 1, 1, 0])
    assert classes_of("1", "2", classes="1,2") == (Classes(("1", "2"), referable=(1,)), [0, 1])
    for labels, names, line in ((("no", "2"), "no,yes", 2), (("0", "1"), "1,2", 1), (("no", ""), "no,yes", 2)):
        with pytest.raises(LabelError, match=rf"all.csv, line {line}: label must be one of"):
            classes_of(*labels, classes=names)


def test_what_is_referable_and_whether_there_is_an_order_can_be_said() -> None:
    assert classes_of("0", "2", referable="3,4")[0] == Classes(RETINOPATHY.names, (3, 4), True)
    assert classes_of("0", "2", referable="severe, Proliferative")[0].referable == (3, 4)
    assert classes_of("0", "2", class_order="nominal")[0] == Classes(RETINOPATHY.names, (2, 3, 4), False)
    assert classes_of("a", "c", classes="a,b,c", class_order="ordinal", referable="c,b")[0] == Classes(
        ("a", "b", "c"), (1, 2), True
    )
    assert classes_of("no", "yes", classes="no,yes", referable="none")[0].referable == ()
    assert classes_of("none", "some", classes="none,some", referable="none")[0].referable == (0,)
    assert classes_of("5", "6", "7", classes="auto", class_order="nominal")[0].ordinal is False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"classes": "yes"}, "two or more different names"),
        ({"classes": "no,yes,no"}, "two or more different names"),
        ({"classes": "no,,yes"}, "two or more different names"),
        ({"classes": "No DR,no_dr"}, "the same but for case"),
        ({"classes": "no,yes", "referable": "maybe"}, "--referable maybe: no such class; they are no, yes"),
        ({"referable": "5"}, "--referable 5: no such class"),
        ({"referable": ""}, "no such class"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        classes_of("0", "2", **flags)


def test_the_same_label_in_two_spellings_is_one_class(tmp_path: Path) -> None:
    images(tmp_path)
    assert rows(read_table(tmp_path, "0_left,7\n1_left,7.0\n2_left,8\n", classes="auto")) == {"0_left": 0, "1_left": 0, "2_left": 1}
