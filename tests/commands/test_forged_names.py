"""Names that strangers chose to be more than names: nothing of them moves a cursor or looks like a line of ours."""

from __future__ import annotations

import csv
import io
import sys
import zlib
from pathlib import Path

import pytest
from test_checkpoint import grader
from test_pack import jpeg, picture

from fastretina import cli
from fastretina.beton.writer import BetonWriter
from fastretina.models.checkpoint import save_checkpoint
from fastretina.models.resnet import build_model

FORGED = "a\x1b[2J\x9b2J\r\nOK: all is well\u202e"
SHOWN = r"a\x1b[2J\x9b2J\r\nOK: all is well\u202e"


def ended(words: list[object]) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return int(end.value.code or 0)


def test_a_bad_samples_name_is_one_cell_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jpeg(picture(64, 64))
    with BetonWriter(tmp_path / "a.beton", 1) as writer:
        writer.add(data, zlib.crc32(data) ^ 1, name=FORGED.replace("\r\n", "") + "\t1", label=0, id=0, width=64, height=64)
        writer.finish({})
    assert ended(["verify", tmp_path / "a.beton"]) == 1
    bad, total = capsys.readouterr().out.splitlines()
    assert bad.split("\t")[:2] == ["0", SHOWN.replace(r"\r\n", "") + r"\t1"]
    assert total.startswith(str(tmp_path))


def test_what_lies_beside_the_photographs_adds_no_line_to_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1_left.jpeg", "1_right.jpeg", f"x.{FORGED}"):
        (tmp_path / name).write_bytes(jpeg(picture(64, 64)) if name.endswith(".jpeg") else b"text")
    (tmp_path / "labels.csv").write_text("image,level\n1_left,0\n1_right,1\n")
    flags = ["--labels", tmp_path / "labels.csv", "--size", "64", "--workers", "1", "--out", tmp_path / "a.beton"]
    assert ended(["pack", "--images", tmp_path, *flags]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(str(tmp_path / "a.beton"))
    assert all(line.startswith("  ") for line in others)
    assert any(SHOWN.lower() in line for line in others)


def test_a_class_is_not_called_by_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("well", "a\x1b[2J\nOK: all is well"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpeg").write_bytes(jpeg(picture(64, 64)))
    assert ended(["pack", "--class-folders", tmp_path / "in", "--size", "64", "--workers", "1", "--out", tmp_path / "a.beton"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert r"a\x1b[2J\nOK" in line


def test_a_table_is_data_in_a_pipe_and_printable_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = FORGED.replace("\r\n", "")
    (tmp_path / f"{name}.jpeg").write_bytes(jpeg(picture(64, 64)))
    (tmp_path / f"b{FORGED}.jpeg").write_bytes(b"no photograph")
    save_checkpoint(tmp_path / "best.safetensors", build_model("resnet18", 5), grader(1))
    words = ["predict", "--checkpoint", tmp_path / "best.safetensors", tmp_path]
    assert ended(words) == 1
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert [row["path"] for row in rows] == [
        str(tmp_path / f"{name}.jpeg"),
        str(tmp_path / f"b{FORGED}.jpeg").replace("\r\n", "  "),
    ]
    assert [line for line in said.err.splitlines() if line.startswith("OK")] == []
    assert f"error: {tmp_path}/b{SHOWN}.jpeg: " in said.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ended(words) == 1
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 3
    assert shown.replace("\n", "").isprintable()
