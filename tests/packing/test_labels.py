"""Label files: both layouts, recognised headers, and one error with file and line for each way to be wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastretina.errors import LabelError, UsageError
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.images import ImageIndex
from fastretina.packing.labels.registry import layout_of
from fastretina.packing.labels.table import LabelTable

OUT = Path("out.beton")  # not written
NAMES = ["10_left", "10_right", "11_left"]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Three images in the lab layout, in a `data` folder."""
    (tmp_path / "data").mkdir()
    for name in NAMES:
        (tmp_path / "data" / f"{name}.jpeg").touch()
    write(tmp_path)
    return tmp_path


def write(root: Path, names: str | bytes = "10_left\n10_right\n11_left\n", grades: str | bytes = "0\n2\n4\n") -> None:
    for kind, text in (("img", names), ("label", grades)):
        (root / f"train_{kind}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


def read(config: PackConfig, missing_ok: bool = False) -> LabelTable:
    return layout_of(config).read(config, missing_ok)


def read_lab(root: Path, split: str, missing_ok: bool = False) -> LabelTable:
    return read(PackConfig(OUT, root=root, split=split), missing_ok)


def kaggle(root: Path, text: str) -> LabelTable:
    (root / "all.csv").write_text(text)
    return read(PackConfig(OUT, images=root, labels=root / "all.csv"))


def refused(root: Path, file: str, line: int, words: str) -> None:
    with pytest.raises(LabelError, match=words) as caught:
        read_lab(root, "train")
    assert f"{root / file}, line {line}:" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "give either --root DIR --split train, or --images DIR --labels FILE"),
        ({"images": "x"}, "give either"),
        ({"root": "x", "split": "train", "labels": "y"}, "give either"),
        ({"root": "x"}, "--root needs --split: give --root DIR --split train"),
        ({"labels": "y"}, "--labels needs --images: give --images DIR --labels FILE"),
        ({"class_folders": "z", "images": "x"}, "--class-folders takes no --images: give --class-folders DIR"),
        ({"root": "x", "split": "train", "grade_column": "y"}, "--root takes no --grade-column"),
        ({"labels": "y", "images": "x", "split": "train"}, "--labels takes no --split: give --images DIR --labels FILE"),
    ],
)
def test_flags_that_mean_no_layout_are_told_what_is_missing_or_too_much(flags: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        layout_of(PackConfig(OUT, **flags))


def test_the_first_row_is_not_taken_for_a_header(lab: Path) -> None:
    table = read_lab(lab, "train")
    assert table.names == tuple(NAMES)
    assert table.grades.tolist() == [0, 2, 4]
    assert table.grades.dtype == np.int64
    assert table.lines.tolist() == [1, 2, 3]
    assert [Path(path).name for path in table.paths] == [f"{name}.jpeg" for name in NAMES]


def test_a_header_is_recognised(lab: Path) -> None:
    write(lab, "image\n10_left\n10_right\n11_left\n", "level\n0\n2\n4\n")
    table = read_lab(lab, "train")
    assert table.names == tuple(NAMES)
    assert table.lines.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "names",
    [
        b"\xef\xbb\xbf10_left\n10_right\n11_left\n",
        b"10_left\r\n10_right\r\n11_left\r\n",
        b'"10_left"\n"10_right"\n"11_left"\n',
        b"10_left\n10_right\n11_left\n\n\r\n\n",
        b"10_left\n10_right\n11_left",
        b"10_left.jpeg\n10_right\n11_left.jpeg\n",
        b" 10_left \n10_right\n11_left\n",
        b"data/10_left\n10_right\ndata/11_left.jpeg\n",
        b"./data/10_left\n./10_right\ndata//11_left.jpeg\n",
        b"data\\10_left\n10_right\n.\\data\\11_left.jpeg\n",
        b"10_left.jpg\n10_right.png\n11_left.JPEG\n",
        b"10_left\r10_right\r11_left\r",
        "10_left\n10_right\n11_left\n".encode("utf-16"),
        b"sep=,\n10_left\n10_right\n11_left\n",
    ],
    ids=[
        "bom",
        "crlf",
        "quotes",
        "blank-tail",
        "no-last-newline",
        "extensions",
        "spaces",
        "subfolder",
        "dot",
        "backslashes",
        "other-extensions",
        "cr",
        "utf-16",
        "sep",
    ],
)
def test_harmless_variations_read_the_same(lab: Path, names: bytes) -> None:
    write(lab, names, b"0\r\n2\r\n4\r\n\r\n")
    table = read_lab(lab, "train")
    assert [name.removeprefix("data/") for name in table.names] == NAMES
    assert table.grades.tolist() == [0, 2, 4]


@pytest.mark.parametrize("extension", [".jpeg", ".jpg", ".JPG", ".png", ".PNG", ".tif"])
def test_extensions_are_found_by_themselves(tmp_path: Path, extension: str) -> None:
    (tmp_path / f"7_left{extension}").touch()
    write(tmp_path, "7_left\n", "1\n")
    assert read_lab(tmp_path, "train").paths == (str(tmp_path / f"7_left{extension}"),)


@pytest.mark.parametrize(
    "text", ["image,level\n10_left,0\n", "10_left,0\n", "level,image\n0,10_left\n", "image,level,Usage\n10_left,0,Public\n"]
)
def test_kaggle_layout_with_and_without_header(lab: Path, text: str) -> None:
    table = kaggle(lab, text)
    assert table.names == ("10_left",)
    assert table.grades.tolist() == [0]


def test_an_image_called_image_is_data_when_it_has_a_grade(tmp_path: Path) -> None:
    (tmp_path / "image.jpg").touch()
    assert kaggle(tmp_path, "image,3\n").grades.tolist() == [3]


@pytest.mark.parametrize("grade", ["5", "-1", "1.5", "nan", "NaN", "zero", "1e0", "+1", "01", "٣", "R1"])
def test_a_grade_that_is_no_integer_from_0_to_4_is_named(lab: Path, grade: str) -> None:
    write(lab, grades=f"0\n{grade}\n4\n")
    refused(lab, "train_label.csv", 2, "grade must be an integer from 0 to 4")


def test_an_empty_grade_cell_is_named(lab: Path) -> None:
    with pytest.raises(LabelError, match=r"all.csv, line 3: grade must be an integer .* an empty cell"):
        kaggle(lab, "image,level\n10_left,0\n10_right,\n")


def test_a_missing_image_is_named(lab: Path) -> None:
    (lab / "data" / "10_right.jpeg").unlink()
    refused(lab, "train_img.csv", 2, "no image '10_right'")


def test_missing_images_can_be_kept_as_problems(lab: Path) -> None:
    (lab / "data" / "10_right.jpeg").unlink()
    table = read_lab(lab, "train", missing_ok=True)
    assert list(table.problems) == [1]
    assert table.paths[1] == ""


@pytest.mark.parametrize("second", ["10_left", "10_left.jpeg", "data/10_left"])
def test_a_duplicate_is_named_however_it_is_written(lab: Path, second: str) -> None:
    write(lab, f"10_left\n10_right\n{second}\n")
    refused(lab, "train_img.csv", 3, "second time.*line 1")


def test_row_counts_that_differ_are_named(lab: Path) -> None:
    write(lab, grades="0\n2\n")
    refused(lab, "train_label.csv", 2, "2 grades for the 3 names")


@pytest.mark.parametrize(
    "name",
    [
        "../10_left",
        "data/../../x",
        "/etc/passwd",
        "C:\\x",
        "..\\x",
        "a//../b",
        "\\\\server\\x",
    ],
)
def test_names_that_leave_the_folder_are_refused(lab: Path, name: str) -> None:
    write(lab, f"10_left\n{name}\n11_left\n")
    refused(lab, "train_img.csv", 2, "leaves the image folder by" if ".." in name else "is absolute, and leaves the image folder")


def test_an_absolute_name_that_ends_within_the_folder_is_told_how_it_is_called_there(lab: Path) -> None:
    write(lab, f"10_left\n{lab.parent}/elsewhere/data/10_right.jpeg\n11_left\n")
    refused(lab, "train_img.csv", 2, "holds 'data/10_right.jpeg': cut what stands before it")


def test_addresses_are_refused(lab: Path) -> None:
    write(lab, "10_left\nfile:///etc/passwd\n11_left\n")
    refused(lab, "train_img.csv", 2, "is an address")


def test_a_name_with_another_folder_before_it_is_told_where_it_is_found(lab: Path) -> None:
    write(lab, "10_left\nset/10_right.jpeg\n11_left\n")
    refused(lab, "train_img.csv", 2, "there is 'data/10_right.jpeg': give the --images that 'set' lies in")


@pytest.mark.parametrize("name", ["10:30_left", "~x", "$HOME", "a b", "é", "x.y.z"])
def test_odd_characters_in_names_are_ordinary(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.png").touch()
    write(tmp_path, f"{name}\n", "1\n")
    assert read_lab(tmp_path, "train").names == (name,)


def test_composed_and_decomposed_letters_are_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "Mu\u0308ller_left.png").touch()
    (tmp_path / "Mu\u0308ller_right.png").touch()
    write(tmp_path, "M\u00fcller_left\nMu\u0308ller_right\n", "1\n2\n")
    assert [Path(path).name for path in read_lab(tmp_path, "train").paths] == ["Mu\u0308ller_left.png", "Mu\u0308ller_right.png"]


def test_over_long_names_nul_and_control_characters_are_refused(lab: Path) -> None:
    write(lab, "10_left\n" + "a" * 4097 + "\n11_left\n")
    refused(lab, "train_img.csv", 2, "4097 characters")
    write(lab, "10_left\n10\0_right\n11_left\n")
    refused(lab, "train_img.csv", 2, "NUL")
    write(lab, "10_left\n10\x1b_right\n11_left\n")
    refused(lab, "train_img.csv", 2, "control characters")


def test_links_out_of_the_folder_are_refused_and_links_within_are_not(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.jpeg"
    outside.touch()
    image = lab / "data" / "10_right.jpeg"
    image.unlink()
    image.symlink_to(outside)
    refused(lab, "train_img.csv", 2, "link that leaves the image folder.*--follow-links")
    assert len(read(PackConfig(OUT, root=lab, split="train", follow_links=True))) == 3
    image.unlink()
    image.symlink_to(lab / "data" / "10_left.jpeg")
    assert len(read_lab(lab, "train")) == 3
    image.unlink()
    image.symlink_to(lab / "data" / "nowhere.jpeg")
    refused(lab, "train_img.csv", 2, "link to nothing")


def test_a_folder_link_called_data_is_followed_and_other_folder_links_are_not(
    lab: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "disk"
    (lab / "data").rename(elsewhere)
    (lab / "other").symlink_to(elsewhere)
    refused(lab, "train_img.csv", 1, "no image '10_left'.*linked folders are entered with --follow-links")
    assert len(read(PackConfig(OUT, root=lab, split="train", follow_links=True))) == 3
    (lab / "data").symlink_to(elsewhere)
    assert len(read_lab(lab, "train")) == 3


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files_are_named(lab: Path, content: bytes) -> None:
    write(lab, content)
    refused(lab, "train_img.csv", 1, "empty|no rows")


def test_missing_files_folders_and_fifos_are_named_without_waiting(lab: Path) -> None:
    os.mkfifo(lab / "fifo.csv")
    for path in (lab / "none.csv", lab / "data", lab / "fifo.csv", lab / "a\0b"):
        with pytest.raises(LabelError) as caught:
            read(PackConfig(OUT, images=lab, labels=path))
        assert str(path) in str(caught.value)


def test_a_missing_column_is_named(lab: Path) -> None:
    with pytest.raises(LabelError, match=r"all.csv, line 1: no column 'level'"):
        kaggle(lab, "image,quality\n10_left,good\n")
    with pytest.raises(LabelError, match=r"all.csv, line 1: 1 column"):
        kaggle(lab, "10_left\n10_right\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("image,level\n10_left,0\n10_right,1,2\n", 3),
        ('image,level\n10_left,0\n"10_right,1\n', 3),
        ("image,level\n\n10_left,0\n", 2),
        ('image,level\n10_left,0\n"10\n_right",1\n', 3),
        ("image,level\n10_left,0\n" + "x," * 1_000_000 + "\n", 3),
    ],
    ids=["more-columns", "open-quote", "blank-between", "newline-in-cell", "million-columns"],
)
def test_malformed_csv_is_named_by_line(lab: Path, text: str, line: int) -> None:
    with pytest.raises(LabelError, match=rf"all.csv, line {line}: "):
        kaggle(lab, text)


def test_an_image_under_another_extension_is_taken_where_there_is_one_and_said(lab: Path) -> None:
    write(lab, "10_left.tif\n10_right.jpeg\n11_left\n")
    assert any(
        "another extension than the labels give: 1 (like data/10_left.jpeg)" in note for note in read_lab(lab, "train").notes
    )
    (lab / "data" / "10_left.png").touch()
    refused(lab, "train_img.csv", 1, "may be .* or ")


def test_other_encodings_are_read_or_named(lab: Path) -> None:
    write(lab, "10_left\n10_right\n11_left\n".encode("utf-16-le"))
    refused(lab, "train_img.csv", 1, "NUL; if this is UTF-16")
    write(lab, b"10_left\n10_right\n11_l\xe9ft\n")
    refused(lab, "train_img.csv", 3, "no image '11_léft' .*read as cp1252")
    write(lab, "10_left\n10_right\n糖尿病_left\n".encode("gbk"))
    refused(lab, "train_img.csv", 3, "not UTF-8 text.*save the table as UTF-8")
    write(lab, b"\xff\xfe1\0\n\0\xd8")
    refused(lab, "train_img.csv", 2, "not the UTF-16 text")


def test_two_files_that_differ_in_extension_stay_two_names(lab: Path) -> None:
    (lab / "data" / "10_left.png").touch()
    refused(lab, "train_img.csv", 1, "may be .* or ")
    write(lab, "10_left.jpeg\n10_left.png\n11_left.jpeg\n")
    table = read_lab(lab, "train")
    assert table.names == ("10_left.jpeg", "10_left.png", "11_left")
    assert [Path(path).name for path in table.paths] == ["10_left.jpeg", "10_left.png", "11_left.jpeg"]
    assert table.columns == {"patient": ("10", "10", "11"), "eye": ("left", "left", "left")}


def test_only_images_within_the_given_folder_are_found(lab: Path) -> None:
    (lab / "data" / "sub").mkdir()
    (lab / "data" / "sub" / "9_left.jpg").touch()
    index = ImageIndex(lab / "data" / "sub")
    assert index.find("9_left").path.endswith("9_left.jpg")
    with pytest.raises(FileNotFoundError):
        index.find("10_left")


def test_patients_of_the_other_split_need_no_images(tmp_path: Path) -> None:
    (tmp_path / "test_img.csv").write_text("1_left\n2_right.jpeg\nIM3\n")
    config = PackConfig(OUT, root=tmp_path, split="train")
    assert layout_of(config).other_patients(config) == ["1", "2", None]
    assert layout_of(config).other_patients(PackConfig(OUT, root=tmp_path, split="other")) is None
    assert layout_of(config).other_patients(PackConfig(OUT, root=tmp_path, split="train", patient_pattern=r"(\d)")) == [
        "1",
        "2",
        "3",
    ]


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9 _=,'-]{0,20}_(left|right)", fullmatch=True), st.integers(0, 4)),
        min_size=1,
        max_size=20,
        unique_by=lambda row: row[0],
    )
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    root = tmp_path_factory.mktemp("round")
    for name, _ in rows:
        (root / f"{name}.jpg").touch()
    write(root, "".join(f'"{name}"\n' for name, _ in rows), "".join(f"{grade}\n" for _, grade in rows))
    table = read_lab(root, "train")
    assert list(zip(table.names, table.grades.tolist(), strict=True)) == rows
    assert kaggle(root, "".join(f'"{name}",{grade}\n' for name, grade in rows)).names == table.names
