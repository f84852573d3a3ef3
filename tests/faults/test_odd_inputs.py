"""Inputs that are no such thing: paths of every odd kind for every argument, and files of the right kind with odd bytes in them."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_checkpoint import grader
from test_pack import jpeg, picture

from fastretina import cli, open_beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import FastretinaError
from fastretina.models.checkpoint import read_info, save_checkpoint
from fastretina.models.resnet import build_model
from fastretina.models.weights import read_weights
from fastretina.packing.config import PackConfig
from fastretina.packing.labels.registry import layout_of
from fastretina.packing.preprocessing import preparation_of
from fastretina.training.config import TrainConfig, as_settings, flags_from

DEEP = b"[" * 100_000
SMALL = ["--size", "64", "--workers", "1"]
ONE_STEP = ["--resolution", "32", "--stop-after-steps", "1", "--workers", "1"]
CALLS = {
    "verify": "verify @",
    "pack --images": "pack --images @ --labels labels.csv --out new.beton",
    "pack --labels": "pack --images photos --labels @ --out new.beton",
    "pack --out": "pack --images photos --labels labels.csv --out @",
    "pack --root": "pack --root @ --split train --out new.beton",
    "pack --class-folders": "pack --class-folders @ --out new.beton",
    "train --config": "train --config @",
    "train --train": "train --train @ --test test.beton --out run",
    "train --val": "train --train train.beton --test test.beton --val @ --out run",
    "predict": "predict --checkpoint best.safetensors @ --csv new.csv",
    "predict --checkpoint": "predict --checkpoint @ photos/15_left.jpeg --csv new.csv",
    "predict --csv": "predict --checkpoint best.safetensors photos/15_left.jpeg --csv @",
    "predict --explain": "predict --checkpoint best.safetensors photos/15_left.jpeg --csv new.csv --explain @",
    "evaluate --checkpoint": "evaluate --checkpoint @ --data test.beton",
    "evaluate --data": "evaluate --checkpoint best.safetensors --data @",
    "evaluate --out": "evaluate --checkpoint best.safetensors --data test.beton --out @",
    "train --weights": "train --train train.beton --test test.beton --weights @ --out run",
    "train --resume": "train --train train.beton --test test.beton --resume @ --out run",
    "compare --config": "compare --config @",
    "export --checkpoint": "export --checkpoint @ --out new.pt2",
    "export --data": "export --checkpoint best.safetensors --out new.pt2 --data @",
}
QUICK = ("verify", "pack --labels", "pack --out", "train --config")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow_faults) for name in CALLS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    save_checkpoint(path, build_model("resnet18", 5), grader(1))
    return path


@pytest.fixture
def odd(tiny_betons, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of every kind that is not what is asked for, in the current folder, beside what is."""
    monkeypatch.chdir(tmp_path)
    targets = {"photos": tiny_betons.test_images, "train.beton": tiny_betons.train, "test.beton": tiny_betons.test}
    for name, target in {**targets, "labels.csv": tiny_betons.test_images / "labels.csv", "best.safetensors": checkpoint}.items():
        Path(name).symlink_to(target)
    strange = [os.fsdecode(b"\xff\xe9.jpg"), "e\x1b[2J\nerror: forged\r"]
    kinds = {"empty": b"", "text": b"hello\n", "noise": random.Random(1).randbytes(5_000), "zeros": bytes(5_000), "deep": DEEP}
    for name, data in {**kinds, "objects": b'{"a":' * 100_000, **dict.fromkeys(strange, b"\0\xff")}.items():
        Path(name).write_bytes(data)
    Path("folder").mkdir()
    os.mkfifo("fifo")
    # Never a device itself: who runs the tests may be root.
    for name, target in {"loop": "loop", "nothing": "absent", "device": "/dev/null"}.items():
        Path(name).symlink_to(target)
    absent = ["absent", "", ".", "*", "[", ",", "text/below", "a" * 5_000, "a/" * 3_000, "a\0b", "http://127.0.0.1:9/x", "~/absent"]
    return [*kinds, "objects", *strange, "folder", "fifo", "loop", "nothing", "device", *absent]


@pytest.mark.parametrize("name", CASES)
def test_every_path_that_is_no_such_thing_is_one_line(name: str, odd: list[str], capsys: pytest.CaptureFixture[str], tried) -> None:
    first, *words = CALLS[name].split()
    extra = {"pack": SMALL, "train": ONE_STEP if "--config" not in name else []}.get(first, [])
    for path in odd:
        with pytest.raises(SystemExit) as end:
            cli.main([first, *(path if word == "@" else word for word in words), *extra])
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said, (path, said)
        assert not set(said) & set("\x1b\r\0"), (path, said)
        if end.value.code:  # some of these can be written to, or are searched in vain
            assert end.value.code in (1, 2)
            assert len(errors) == 1, (path, said)
        tried("odd paths for an argument")


# What breaks parsers, put into files that they know.
PIECES = [b"", b"\0", b'"', b";", b"\t", b"\r", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"=", b"-1", b"1e999", b"NaN", b"9" * 5_000]
PIECES += [b"../", b"\\", b"\x1b[2J", b"\xe2\x80\xae", b"sep=;\n", b"{", b"]", b"null", b"true", b"\xed\xa0\x80", b"A" * 20_000]
PIECES += [DEEP]
TABLES = [
    b"image,level\n15_left,0\n15_right,4\n16_left,2\n",
    b"image;level;patient;eye\n15_left;0;a;left\n15_right;1;a;R\n",
    b"15_left.jpeg 4\n15_right.jpeg 0\n",
    "image\tlevel\té\n15_left\t0\tü\n15_right\t1\tü\n".encode("utf-16"),
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(found) + 1)
        found[at : at + chance.choice([0, 1, 2, 5, 30])] = chance.choice(PIECES)
    return bytes(found)


def read_table(data: bytes, place: Path) -> None:
    (place / "labels.csv").write_bytes(data)
    config = PackConfig(place / "a.beton", images=place / "photos", labels=place / "labels.csv", size=64)
    str(layout_of(config).read(config, False).classes)


def read_settings(data: bytes, place: Path) -> None:
    (place / "config.json").write_bytes(data)
    flags_from(TrainConfig, place / "config.json")


def read_metadata(data: bytes, place: Path) -> None:
    """All of a checkpoint's metadata, the field that the bytes end in being the one that is mutated."""
    field, _, value = data.partition(b"=")
    metadata = {**grader(1).metadata(), field.decode(errors="replace"): value.decode(errors="replace")}
    path = place / "best.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, metadata=metadata))
    found = read_info(path)
    assert found.grading
    assert found.preparation.flags


def read_tensors(data: bytes, place: Path) -> None:
    (place / "a.safetensors").write_bytes(data)
    read_weights(place / "a.safetensors")


def read_provenance(data: bytes, place: Path) -> None:
    path = place / "a.beton"
    if not path.exists():
        payload = jpeg(picture(64, 64))
        with BetonWriter(path, 1) as writer:
            writer.add(payload, zlib.crc32(payload), name="1_left", label=0, id=0, width=64, height=64)
            writer.finish({})
    with open_beton(path) as beton:
        beton._json, beton._provenance = data, None  # behind its checksum
        assert beton.classes
        assert beton.columns is not None
        preparation_of(beton)


def starts(read: Callable[[bytes, Path], None]) -> list[bytes]:
    """Good files to begin with."""
    if read is read_table:
        return TABLES
    if read is read_metadata:
        return [f"{name}={value}".encode() for name, value in grader(1).metadata().items()]
    if read is read_tensors:
        return [safetensors.torch.save({"fc.bias": torch.ones(3)}, metadata={"a": "b"})]
    if read is read_settings:
        return [json.dumps(as_settings(TrainConfig())).encode()]
    return [b'{"classes":{"names":["a","b"],"referable":[1],"ordinal":true},"preparation":{"crop":"none"},"columns":[]}']


@pytest.mark.tries(15, 400)
@pytest.mark.parametrize("read", [read_table, read_settings, read_metadata, read_tensors, read_provenance])
def test_odd_bytes_are_an_error_of_one_line_or_are_read(
    read: Callable[[bytes, Path], None], tiny_betons, tmp_path: Path, tries: int, tried
) -> None:
    (tmp_path / "photos").symlink_to(tiny_betons.test_images)
    chance, known = random.Random(tries), starts(read)
    for data in known:
        read(data, tmp_path)
    for data in [*known, *(mutated(chance.choice(known), chance) for _ in range(tries))]:
        told = ""
        try:
            read(data, tmp_path)
        except FastretinaError as error:
            told = str(error)
        assert "\n" not in told
        tried(f"odd bytes: {read.__name__.replace('_', ' ')}")


@pytest.mark.parametrize("read", [read_settings, read_metadata, read_provenance])
def test_json_of_any_depth_is_an_error_of_its_file(read: Callable[[bytes, Path], None], tmp_path: Path, tried) -> None:
    for data in (DEEP, b'{"a":' * 100_000):
        with pytest.raises(FastretinaError, match="nested"):
            read(b"classes=" + data if read is read_metadata else data, tmp_path)
        tried("JSON of 100,000 levels")


def test_a_header_of_any_depth_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(DEEP)) + DEEP)
    with pytest.raises(FastretinaError, match="not a safetensors file"):
        read_info(tmp_path / "a.safetensors")
