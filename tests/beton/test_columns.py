"""What a .beton says beside its samples: classes, patients, eyes; and of several packings as one."""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from test_reader import PAYLOADS

from fastretina.beton.joined import SOURCE_BIT, JoinedBeton
from fastretina.beton.open import open_beton
from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import BetonError, ConvertError, UsageError
from fastretina.grading import RETINOPATHY, Classes


def one_sample(path: Path, provenance: dict[str, object]) -> Beton:
    with BetonWriter(path, 1) as writer:
        writer.add(PAYLOADS[0], zlib.crc32(PAYLOADS[0]), name="1_left", label=0, id=0, width=512, height=400)
        writer.finish(provenance)
    return Beton(path)


AMD = Classes(("none", "dry", "wet"), referable=(2,))


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        ({}, RETINOPATHY),
        ({"classes": list(RETINOPATHY)}, RETINOPATHY),  # as older files have them
        ({"classes": ["no", "yes"]}, Classes(("no", "yes"))),
        ({"classes": AMD.as_dict()}, AMD),
        ({"classes": RETINOPATHY.as_dict()}, RETINOPATHY),
    ],
)
def test_classes_are_those_noted_and_without_a_note_the_grades_of_retinopathy(
    tmp_path: Path, noted: dict[str, object], expected: Classes
) -> None:
    with one_sample(tmp_path / "a.beton", noted) as beton:
        assert beton.classes == expected


@pytest.mark.parametrize(
    "noted",
    [
        [],
        "no",
        ["no", 1],
        ["no"],
        ["no", "no"],
        {"no": 0},
        {"names": ["no", "yes"], "referable": [2], "ordinal": False},
        {"names": ["no", "yes"], "referable": [True], "ordinal": False},
        {"names": ["no", "yes"], "referable": [1], "ordinal": 1},
    ],
)
def test_classes_that_cannot_be_are_our_error_and_name_the_file(tmp_path: Path, noted: object) -> None:
    with one_sample(tmp_path / "a.beton", {"classes": noted}) as beton, pytest.raises(BetonError, match=r"a\.beton: its classes"):
        _ = beton.classes


def with_columns(path: Path, count: int = 4) -> Beton:
    with BetonWriter(path, count, columns=["patient", "eye", "group camera"]) as writer:
        for i in range(count):
            text = (f"P{i // 2}" if i else "", ("left", "OD", "", "x")[i % 4], "Gerät A" if i % 2 else "")
            payload = PAYLOADS[i]
            writer.add(payload, zlib.crc32(payload), name=f"{i}_left", label=0, id=i, width=512, height=400, text=text)
        writer.finish({})
    return Beton(path)


def test_columns_of_text_are_read_back_and_what_is_empty_is_unknown(tmp_path: Path) -> None:
    with with_columns(tmp_path / "a.beton") as beton:
        assert list(beton.names) == ["0_left", "1_left", "2_left", "3_left"]
        assert beton.patients == [None, "P0", "P1", "P1"]  # not those that the names would tell
        assert beton.eyes == ["left", "right", None, None]
        assert {name: list(text) for name, text in beton.columns.items()} == {
            "patient": ["", "P0", "P1", "P1"],
            "eye": ["left", "OD", "", "x"],
            "group camera": ["", "Gerät A", "", "Gerät A"],
        }
        assert beton.known_as is None
        assert beton.patients_of(np.array([3, 1])) == ["P1", "P0"]
        assert beton.patients_of(np.array([3, 0])) is None
        part = beton.select(np.array([3, 1]))
        assert part.patients == ["P1", "P0"]
        assert part.known_as == {"P0", "P1"}
        assert part.select(np.array([1])).patients == ["P0"]
        assert list(part.columns["group camera"]) == ["Gerät A", "Gerät A"]


def test_a_file_from_before_columns_tells_patients_by_names(tmp_path: Path) -> None:
    with one_sample(tmp_path / "old.beton", {}) as beton:
        assert (beton.patients, beton.eyes, dict(beton.columns)) == (["1"], ["left"], {})
    with BetonWriter(tmp_path / "new.beton", 1, columns=[]) as writer:
        writer.add(PAYLOADS[0], zlib.crc32(PAYLOADS[0]), name="1_left", label=0, id=0, width=512, height=400)
        writer.finish({})
    with Beton(tmp_path / "new.beton") as beton:  # its maker looked, and knew none
        assert (beton.patients, beton.eyes, beton.known_as) == (None, None, None)


def test_text_with_a_line_break_is_refused(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", 1, columns=["patient"]) as writer, pytest.raises(ConvertError, match="line break"):
        writer.add(PAYLOADS[0], zlib.crc32(PAYLOADS[0]), name="1", label=0, id=0, width=512, height=400, text=["a\nb"])


def clinic(path: Path, first: int, provenance: dict[str, object], patients: bool = True) -> Path:
    """Three images of two patients, 0 and 1."""
    with BetonWriter(path, 3, columns=["patient"] if patients else []) as writer:
        for i in range(3):
            payload = PAYLOADS[first + i]
            text = [str(i // 2)] if patients else []
            writer.add(payload, zlib.crc32(payload), name=f"{i}", label=i, id=2 * i, width=512, height=400, text=text)
        writer.finish(provenance)
    return path


def test_several_packings_are_one_set_with_ids_and_patients_of_their_own(tmp_path: Path) -> None:
    paths = [
        clinic(tmp_path / "a.beton", 0, {"size": 1, "classes": AMD.as_dict()}),
        clinic(tmp_path / "b, c.beton", 3, {"size": 2, "classes": AMD.as_dict()}),
    ]
    for given in (f"{paths[0]},{tmp_path}/b, c.beton",):
        with pytest.raises(BetonError):  # a comma in a name that is not that of one file divides
            open_beton(given)
    paths[1].rename(tmp_path / "b.beton")
    with open_beton(f"{tmp_path}/a.beton, {tmp_path}/b.beton") as beton:
        assert isinstance(beton, JoinedBeton)
        assert beton.sources == (tmp_path / "a.beton", tmp_path / "b.beton")
        assert [bytes(beton.jpeg(i)) for i in range(6)] == PAYLOADS[:6]
        assert beton.ids.tolist() == [0, 2, 4, 1 << SOURCE_BIT, (1 << SOURCE_BIT) + 2, (1 << SOURCE_BIT) + 4]
        assert beton.labels.tolist() == [0, 1, 2] * 2
        assert beton.classes == AMD
        assert beton.patients == ["0:0", "0:0", "0:1", "1:0", "1:0", "1:1"]
        assert beton.known_as == {"0", "1"}
        assert list(beton.columns["patient"]) == ["0", "0", "1"] * 2
        part = beton.select(np.array([5, 0]))
        assert (part.patients, list(part.columns["patient"])) == (["1:1", "0:0"], ["1", "0"])
        error = beton.sample_error(4, "is a test")
        assert (error.path, error.index) == (tmp_path / "b.beton", 1)
        again = pickle.loads(pickle.dumps(part))
        assert bytes(again.jpeg(0)) == PAYLOADS[5]
        again.close()


def test_packings_of_other_classes_or_preparation_are_refused_naming_both(tmp_path: Path) -> None:
    one = clinic(tmp_path / "a.beton", 0, {"classes": AMD.as_dict()})
    for provenance, words in (({}, "classes"), ({"classes": AMD.as_dict(), "preparation": {"crop": "fundus"}}, "preparation")):
        other = clinic(tmp_path / "b.beton", 3, provenance)
        with pytest.raises(UsageError, match=rf"a\.beton and .*b\.beton differ in their {words}"):
            open_beton(f"{one},{other}")


def test_where_one_packing_knows_no_patients_those_are_unknown(tmp_path: Path) -> None:
    one, other = clinic(tmp_path / "a.beton", 0, {}), clinic(tmp_path / "b.beton", 3, {}, patients=False)
    with open_beton(f"{one},{other}") as beton:
        assert beton.patients == ["0:0", "0:0", "0:1", None, None, None]
        assert beton.known_as is None
        assert list(beton.columns["patient"]) == ["0", "0", "1", "", "", ""]
