"""One table divided into sets: no patient in two, the same share of every class, always in the same way."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack import SIZE, jpeg, picture

from fastretina.beton.reader import Beton
from fastretina.errors import ConvertError, UsageError
from fastretina.packing.pack import write_beton
from fastretina.packing.splits import divide, parse_shares

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-1, 4)), min_size=1, max_size=120), st.integers(0, 3), st.randoms())
@settings(max_examples=60)
def test_a_division_holds_every_image_once_and_no_group_twice(images: list[tuple[int, int]], seed: int, random) -> None:
    def of(rows: list[tuple[int, int]]) -> dict[str, set[tuple[int, int]]]:
        sets = divide([str(group) for group, _ in rows], np.array([label for _, label in rows]), SHARES, seed)
        assert sorted(np.concatenate(list(sets.values())).tolist()) == list(range(len(rows)))
        return {name: {rows[row] for row in found.tolist()} for name, found in sets.items()}

    sets = of(images)
    groups = [{group for group, _ in found} for found in sets.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    shuffled = list(images)
    random.shuffle(shuffled)
    assert of(shuffled) == sets  # of names alone, not of their order


def test_every_class_is_divided_in_the_same_shares_by_the_worse_eye() -> None:
    labels = np.repeat([0, 0, 0, 0, 0, 0, 0, 1, 2, 3], 200)  # both eyes of 1,000 people, grade 3 in 100 of them
    labels[1::2] = 0  # the other eye is well
    groups = [str(row // 2) for row in range(2000)]
    sets = divide(groups, labels, SHARES)
    assert {name: np.bincount(labels[rows]).tolist() for name, rows in sets.items()} == {
        "train": [1190, 70, 70, 70],
        "val": [170, 10, 10, 10],
        "test": [340, 20, 20, 20],
    }
    other = divide(groups, labels, SHARES, seed=1)
    assert not np.array_equal(other["test"], sets["test"])
    assert len(other["test"]) == len(sets["test"])


@pytest.mark.parametrize(
    "text", ["train=0.7", "train=0.7,test=0.2", "a=0.5,a=0.5", "a=1,b=0", "a=.5;b=.5", "a=-1,b=2", "=0.5,b=0.5", ""]
)
def test_shares_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--splits"):
        parse_shares(text)


def clinic(folder: Path, people: int = 10, names: str = "{person}_{side}") -> dict[str, Path]:
    """Both eyes of some people, one grade each in turn."""
    images = folder / "img"
    images.mkdir(parents=True)
    lines = ["image,level"]
    for person in range(people):
        for side in ("left", "right"):
            name = names.format(person=person, side=side)
            (images / f"{name}.jpg").write_bytes(jpeg(picture(seed=len(lines))))
            lines.append(f"{name},{person % 5}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return {"images": images, "labels": folder / "labels.csv"}


def test_a_table_is_divided_into_files_and_a_csv(tmp_path: Path) -> None:
    where = clinic(tmp_path)
    summary = write_beton(tmp_path / "{split}.beton", **where, size=SIZE, splits="train=0.5,test=0.5")
    with (tmp_path / "splits.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [str(line) for line in range(2, 22)]
    people: dict[str, set[str]] = {}
    for split in ("train", "test"):
        with Beton(tmp_path / f"{split}.beton") as beton:
            listed = [row for row in rows if row["split"] == split]
            assert list(beton.names) == [row["image"] for row in listed]
            assert [beton.classes[label] for label in beton.labels] == [row["class"] for row in listed]
            assert (beton.ids + 2).tolist() == [int(row["row"]) for row in listed]
            assert beton.patients == [row["patient"] for row in listed]
            assert beton.provenance["division"] == {"shares": "train=0.5,test=0.5", "seed": 0, "by": "patient"}
            assert beton.provenance["split"] == split
            assert sorted(set(beton.labels.tolist())) == [0, 1, 2, 3, 4]
            people[split] = set(beton.patients or ())
    assert not people["train"] & people["test"]
    assert (summary.images, summary.patients, dict(summary.splits)) == (20, 10, {"train": (2,) * 5, "test": (2,) * 5})
    for line in ("divided by patient, seed 0", "train: 10 images", "test: 10 images", "patients: 10"):
        assert line in str(summary)


def test_where_patients_are_unknown_images_are_divided_and_it_is_said(tmp_path: Path) -> None:
    where = clinic(tmp_path, names="eye{person}{side}")
    summary = write_beton(tmp_path / "{split}.beton", **where, size=SIZE, splits="train=0.5,test=0.5")
    assert "divided by image, since patients are unknown" in str(summary)
    assert "patients: unknown for 20 of 20 images, like 'eye0left'" in str(summary)
    assert summary.patients is None


def test_a_row_that_is_left_out_need_have_no_patient(tmp_path: Path) -> None:
    where = clinic(tmp_path)
    where["labels"].write_text(where["labels"].read_text() + "strange,5\n")
    summary = write_beton(tmp_path / "{split}.beton", **where, size=SIZE, splits="train=0.5,test=0.5", ungradable="5")
    assert (summary.images, summary.patients, summary.skipped) == (20, 10, 1)
    assert "divided by patient" in str(summary)


def test_of_a_division_that_fails_no_file_appears(tmp_path: Path) -> None:
    where = clinic(tmp_path)
    last = sorted(where["images"].iterdir())[-1]
    last.write_bytes(b"not an image")
    with pytest.raises(ConvertError, match=last.name):
        write_beton(tmp_path / "out" / "{split}.beton", **where, size=SIZE, splits="train=0.5,test=0.5")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("out", "splits", "words"),
    [
        ("all.beton", "train=0.5,test=0.5", r"--out .*\{split\}\.beton"),
        ("{split}.beton", "a=0.98,b=0.02", "leaves no image of 20 for b"),
    ],
)
def test_a_division_without_names_or_images_is_refused(tmp_path: Path, out: str, splits: str, words: str) -> None:
    where = clinic(tmp_path)
    with pytest.raises(UsageError, match=words):
        write_beton(tmp_path / out, **where, size=SIZE, splits=splits)


def test_identical_images_are_counted_within_sets_and_across_and_named_where_their_grades_differ(tmp_path: Path) -> None:
    where = clinic(tmp_path)
    images = where["images"]
    for twin, of in (("1_left", "0_left"), ("5_left", "0_left"), ("2_right", "2_left")):
        (images / f"{twin}.jpg").write_bytes((images / f"{of}.jpg").read_bytes())
    summary = str(write_beton(tmp_path / "all.beton", **where, size=SIZE))
    assert "identical images: 5, in 2 groups\n" in summary
    assert (
        "identical images of different grade: 0_left (line 2) 0 no DR = 1_left (line 4) 1 mild = 5_left (line 12) 0 no DR\n"
        in summary
    )
    summary = str(write_beton(tmp_path / "{split}.beton", **where, size=SIZE, splits="train=0.5,test=0.5"))
    assert "identical images: 5, in 2 groups, 1 of these in more than one set" in summary
