"""Every command of docs/data.md, run as it stands there on a small imitation of the public set that it is for."""

from __future__ import annotations

import csv
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_pack import jpeg, picture

from fastretina import cli, open_beton
from fastretina.grading import RETINOPATHY, Classes

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
COMMANDS = {
    match[1]: match[2]
    for match in re.finditer(r"^(\w[^\n]*):\n\n```sh\n([^\n]*)\n```$", PAGE.partition("## Public sets")[2], re.MULTILINE)
}


@dataclass(frozen=True)
class Imitation:
    """A set's label file, its images by the path below --images, and what should be in the .beton."""

    labels: str
    images: tuple[str, ...]
    packed: dict[str, int]  # names and numbers of classes
    patients: list[str | None] | None = None
    left_out: tuple[str, ...] = ()
    classes: Classes = RETINOPATHY
    columns: tuple[str, ...] = ()  # beside patient and eye


EYEPACS = ("10_left.jpeg", "10_right.jpeg", "13_left.jpeg")
SETS = {
    "EyePACS": Imitation(
        "image,level\n10_left,0\n10_right,2\n13_left,4\n", EYEPACS, {"10_left": 0, "10_right": 2, "13_left": 4}, ["10", "10", "13"]
    ),
    "APTOS 2019": Imitation(
        "id_code,diagnosis\n000c1434d8d7,2\n0024cdab0c1e,1\n1e5,0\n",
        ("000c1434d8d7.png", "0024cdab0c1e.png", "1e5.png"),
        {"000c1434d8d7": 2, "0024cdab0c1e": 1, "1e5": 0},
    ),
    'IDRiD, "B. Disease Grading"': Imitation(
        "Image name,Retinopathy grade,Risk of macular edema ,,,,,,,,,\r\nIDRiD_001,3,2,,,,,,,,,\r\nIDRiD_002,0,0,,,,,,,,,\r\n",
        ("IDRiD_001.jpg", "IDRiD_002.jpg"),
        {"IDRiD_001": 3, "IDRiD_002": 0},
    ),
    "Messidor-2, with the adjudicated grades": Imitation(
        "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable\n"
        "20051020_43808_0100_PP.png,0,0,1\nIM002806.jpg,,,0\nIM004832.jpg,2.0,1,1\n",
        ("20051020_43808_0100_PP.png", "IM002806.JPG", "IM004832.JPG"),
        {"20051020_43808_0100_PP": 0, "IM004832": 2},
        left_out=("IM002806",),
        columns=("quality",),
    ),
    "DDR": Imitation(
        "007-0004-000.jpg 0\n007-0007-000.jpg 2\n007-0009-100.jpg 5\n",
        ("007-0004-000.jpg", "007-0007-000.jpg", "007-0009-100.jpg"),
        {"007-0004-000": 0, "007-0007-000": 2},
        left_out=("007-0009-100",),
    ),
    "DeepDRiD, regular fundus images": Imitation(
        "patient_id,image_id,image_path,Overall quality,left_eye_DR_Level,right_eye_DR_Level,patient_DR_Level,Clarity,Artifact\n"
        "1,1_l1,\\regular-fundus-training\\1\\1_l1.jpg,1,0.0,,2.0,10,0\n"
        "1,1_r1,\\regular-fundus-training\\1\\1_r1.jpg,1,,2.0,2.0,8,1\n"
        "2,2_l1,\\regular-fundus-training\\2\\2_l1.jpg,0,4.0,,4.0,1,8\n",
        ("1/1_l1.jpg", "1/1_r1.jpg", "2/2_l1.jpg"),
        {"1_l1": 0, "1_r1": 2},
        ["1", "1"],
        left_out=("2_l1",),
        columns=("quality",),
    ),
    "ODIR-5K, diabetes (D) or none, by patient": Imitation(
        "ID,Patient Age,Patient Sex,Left-Fundus,Right-Fundus,Left-Diagnostic Keywords,Right-Diagnostic Keywords,N,D,G,C,A,H,M,O\n"
        "0,69,Female,0_left.jpg,0_right.jpg,cataract,normal fundus,0,0,0,1,0,0,0,0\n"
        "1,57,Male,1_left.jpg,1_right.jpg,moderate non proliferative retinopathy，drusen,normal fundus,0,1,0,0,0,0,0,1\n",
        ("0_left.jpg", "0_right.jpg", "1_left.jpg", "1_right.jpg"),
        {"0_left": 0, "0_right": 0, "1_left": 1, "1_right": 1},
        ["0", "0", "1", "1"],
        classes=Classes(("no", "diabetes"), referable=(1,)),
        columns=("group Patient Sex",),
    ),
    "EyeQ, over EyePACS' images": Imitation(
        ",image,quality,DR_grade\n0,10_left.jpeg,0,0\n1,10_right.jpeg,2,2\n2,13_left.jpeg,1,4\n",
        EYEPACS,
        {"10_left": 0, "13_left": 4},
        ["10", "13"],
        left_out=("10_right",),
        columns=("quality",),
    ),
    "BRSET": Imitation(
        "image_id,patient_id,camera,patient_age,patient_sex,exam_eye,diabetes,DR_SDRG,DR_ICDR,focus,quality\n"
        "img00001,1,Canon CR,48,1,1,no,0,0,1,Adequate\nimg00002,1,Canon CR,48,1,2,no,3,4,2,Adequate\n"
        "img00003,2,NIKON NF5050,18,2,1,yes,0,0,2,Inadequate\n",
        ("img00001.jpg", "img00002.jpg", "img00003.jpg"),
        {"img00001": 0, "img00002": 4},
        ["1", "1"],
        left_out=("img00003",),
        columns=("quality", "group camera", "group patient_sex"),
    ),
    "RFMiD, diabetic retinopathy or none": Imitation(
        "ID,Disease_Risk,DR,ARMD,MH\n1,1,1,0,0\n2,1,0,1,0\n3,0,0,0,0\n",
        ("1.png", "2.png", "3.png"),
        {"1": 1, "2": 0, "3": 0},
        classes=Classes(("no", "DR"), referable=(1,)),
    ),
}


def test_every_set_of_the_page_has_its_command_and_its_imitation() -> None:
    table = re.findall(r"^\| ([A-Z][\w \-]+) \| ", PAGE.partition("## Public sets")[2], re.MULTILINE)
    assert list(COMMANDS) == list(SETS)
    assert [name.partition(",")[0] for name in SETS] == table


@pytest.mark.parametrize("name", SETS)
def test_the_command_packs_the_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(COMMANDS[name])
    given = dict(zip(words[1::2], words[2::2], strict=True))
    imitation = SETS[name]
    for number, image in enumerate(imitation.images):
        path = Path(given["--images"]) / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture(512, 512, seed=number)))
    Path(given["--labels"]).parent.mkdir(parents=True, exist_ok=True)
    Path(given["--labels"]).write_bytes(imitation.labels.encode())
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    assert (program, done.value.code) == ("fastretina", 0)
    with open_beton(given["--out"]) as beton:
        assert dict(zip(beton.names, beton.labels.tolist(), strict=True)) == imitation.packed
        assert beton.classes == imitation.classes
        assert beton.patients == imitation.patients
        assert tuple(column for column in beton.columns if column not in ("patient", "eye")) == imitation.columns
    listed = Path(given["--out"] + ".skipped.csv")
    rows = csv.DictReader(listed.read_text().splitlines() if listed.exists() else [])
    assert tuple(row["name"] for row in rows) == imitation.left_out
