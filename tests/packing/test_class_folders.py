"""One folder a class: the folder's name is the label, and no part of who the patient is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from label_cases import read_folders, rows

from fastretina.errors import LabelError
from fastretina.grading import RETINOPATHY
from fastretina.packing.labels.table import LeftOut


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_each_image_has_the_class_of_its_folder(tmp_path: Path) -> None:
    table = read_folders(tree(tmp_path, "0/0_left.jpeg", "2/0_right.png", "4/site/7_left.JPG", "4/x.tif"))
    assert rows(table) == {"0/0_left": 0, "2/0_right": 2, "4/site/7_left": 4, "4/x": 4}
    assert table.classes == RETINOPATHY
    assert [os.path.relpath(path, tmp_path) for path in table.paths] == [
        "0/0_left.jpeg",
        "2/0_right.png",
        "4/site/7_left.JPG",
        "4/x.tif",
    ]
    assert table.where(0) == str(tmp_path)


def test_the_folder_of_the_class_is_no_part_of_the_patient_and_that_of_a_site_is(tmp_path: Path) -> None:
    table = read_folders(tree(tmp_path, "0/10_left.jpg", "2/10_right.jpg", "2/site/10_right.jpg", "2/IM7.jpg"))
    assert table.names == ("0/10_left", "2/10_right", "2/IM7", "2/site/10_right")
    assert table.columns == {"patient": ("10", "10", "", "site/10"), "eye": ("left", "right", "", "right")}
    table = read_folders(tmp_path, patient_pattern=r"^(?P<patient>.*\d+)_(?P<eye>l|r)")
    assert table.columns["patient"] == ("10", "10", "", "site/10")
    assert table.columns["eye"] == ("left", "right", "", "right")


def test_images_that_differ_in_extension_or_folder_stay_apart(tmp_path: Path) -> None:
    table = read_folders(tree(tmp_path, "a/10_left.jpeg", "a/10_left.png", "b/10_left.png"))
    assert table.names == ("a/10_left.jpeg", "a/10_left.png", "b/10_left")
    assert table.columns["patient"] == ("10", "10", "10")


def test_other_names_are_classes_in_alphabetical_order_or_as_given(tmp_path: Path) -> None:
    tree(tmp_path, "normal/1.jpg", "cataract/2.jpg", "glaucoma/3.jpg")
    assert read_folders(tmp_path).classes.names == ("cataract", "glaucoma", "normal")
    table = read_folders(tmp_path, classes="normal,cataract,glaucoma", referable="glaucoma")
    assert (rows(table)["cataract/2"], table.classes.referable) == (1, (2,))


def test_a_folder_can_be_called_ungradable(tmp_path: Path) -> None:
    table = read_folders(tree(tmp_path, "0/1.jpg", "3/2.jpg", "Ungradable/3.jpg"), ungradable="ungradable")
    assert table.classes == RETINOPATHY
    assert table.left_out == {2: LeftOut("ungradable", "grade 'Ungradable'")}


def test_what_lies_beside_the_folders_and_what_is_no_image_is_counted(tmp_path: Path) -> None:
    tree(tmp_path, "no/1.jpg", "yes/2.jpg", "montage.jpg", "no/notes.txt", ".git/x.jpg")
    notes = read_folders(tmp_path).notes
    assert "images beside the folders of the classes, left out: 1" in notes
    assert "beside images the folder holds 1 .txt, 1 hidden" in notes


def test_links_are_followed_when_asked_also_in_circles(tmp_path: Path) -> None:
    store = tree(tmp_path / "store", "9_left.jpg", "more/8_left.jpg")
    (tmp_path / "train" / "0").mkdir(parents=True)
    (tmp_path / "train" / "0" / "9_left.jpg").symlink_to(store / "9_left.jpg")
    with pytest.raises(LabelError, match=r"'0/9_left.jpg' is a link that leaves the image folder .*--follow-links"):
        read_folders(tmp_path / "train")
    (tmp_path / "train" / "2").symlink_to(store / "more")
    (store / "more" / "back").symlink_to(tmp_path / "train")
    assert rows(read_folders(tmp_path / "train", follow_links=True)) == {"0/9_left": 0, "2/8_left": 2}


def test_a_folder_without_class_folders_is_refused_and_linked_ones_are_told(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="1 images, none of them in a folder of its class"):
        read_folders(tree(tmp_path / "flat", "1.jpg"))
    store = tree(tmp_path / "store", "1.jpg")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "0").symlink_to(store)
    with pytest.raises(LabelError, match=r"no image; .* entered with --follow-links"):
        read_folders(tmp_path / "linked")
    with pytest.raises(LabelError, match="nowhere: cannot list"):
        read_folders(tmp_path / "nowhere")
