"""The digest of a data set: the same for the same samples however they lie in files, another for anything that differs."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from test_reader import PAYLOADS

from fastretina.beton.open import open_beton
from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.packing.pack import write_beton
from tests.conftest import TinyBetons

COUNT = 4


def packed(path: Path, provenance: dict[str, object] | None = None, page: int = 1 << 21, **changes) -> Beton:
    """`COUNT` samples; changes: of the third one's entry."""
    with BetonWriter(path, COUNT, ["patient"], page) as writer:
        for n in range(COUNT):
            entry = {"name": f"{n}_left", "label": n, "id": n, "width": 9, "height": 9, "text": [f"p{n}"], "payload": PAYLOADS[n]}
            entry |= changes if n == 2 else {}
            payload = entry.pop("payload")
            writer.add(payload, zlib.crc32(payload), **entry)
        writer.finish(provenance or {})
    return Beton(path)


@pytest.mark.parametrize(
    "changes",
    [{"name": "7_left"}, {"label": 4}, {"width": 8}, {"height": 8}, {"text": ["p7"]}, {"payload": PAYLOADS[5]}],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_differs_in_a_sample_is_another_digest(tmp_path, changes):
    assert packed(tmp_path / "a.beton").digest != packed(tmp_path / "b.beton", **changes).digest


def test_letters_that_move_from_one_column_to_the_next_are_another_digest(tmp_path):
    found = set()
    for name, text in (("3_left", "p"), ("3_leftp", "")):
        with BetonWriter(tmp_path / "a.beton", 1, ["patient"]) as writer:
            writer.add(PAYLOADS[0], zlib.crc32(PAYLOADS[0]), name=name, label=0, id=0, width=9, height=9, text=[text])
            writer.finish({})
        found.add(Beton(tmp_path / "a.beton").digest)
    assert len(found) == 2


def test_other_classes_are_another_digest(tmp_path):
    other = packed(tmp_path / "b.beton", {"classes": ["a", "b", "c", "d", "e"]})
    assert packed(tmp_path / "a.beton").digest != other.digest


def test_where_the_file_lies_and_how_it_is_laid_out_have_no_part_in_it(tmp_path):
    other = packed(tmp_path / "b.beton", {"noted": "elsewhere"}, page=1 << 23)
    assert packed(tmp_path / "a.beton").digest == other.digest


def test_a_selection_has_its_own_and_the_whole_in_order_that_of_the_file(tmp_path):
    whole = packed(tmp_path / "a.beton")
    found = {whole.select(np.array(chosen)).digest for chosen in ([0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 2])}
    assert len(found) == 3
    assert whole.digest in found


def test_shards_have_the_digest_of_the_one_file(tiny_betons: TinyBetons, tmp_path: Path):
    images = tiny_betons.train_images
    write_beton(tmp_path / "train.beton", images=images, labels=images / "labels.csv", size=64, workers=1, shards=3)
    assert open_beton(tmp_path / "train-*.beton").digest == open_beton(tiny_betons.train).digest


def test_a_name_that_is_no_text_is_told_apart_by_its_bytes_in_a_selection_and_a_joined_set_too(tmp_path):
    paths = []
    for name in ("1_\udcff", "1_\udcfe"):  # as Python reads the names of files that are not UTF-8
        paths.append(tmp_path / f"{ord(name[-1])}.beton")
        with BetonWriter(paths[-1], 2) as writer:
            for n, text in enumerate(("0_left", name)):
                writer.add(PAYLOADS[n], zlib.crc32(PAYLOADS[n]), name=text, label=0, id=n, width=9, height=9)
            writer.finish({})
    one, other = map(Beton, paths)
    assert one.names[1] == other.names[1] == "1_\ufffd"
    assert one.digest != other.digest
    assert one.select(np.arange(2)).digest == one.digest
    assert one.select(np.array([1])).digest != other.select(np.array([1])).digest
    assert open_beton(f"{paths[0]},{paths[1]}").digest != open_beton(f"{paths[1]},{paths[0]}").digest


def test_columns_that_one_of_two_joined_packings_lacks_are_empty_in_the_digest_as_in_the_columns(tmp_path):
    with_patients = packed(tmp_path / "a.beton")
    with BetonWriter(tmp_path / "b.beton", 1) as writer:
        writer.add(PAYLOADS[0], zlib.crc32(PAYLOADS[0]), name="0_left", label=0, id=0, width=9, height=9)
        writer.finish({})
    both = open_beton(f"{with_patients.path},{tmp_path / 'b.beton'}")
    patients = both.columns["patient"]
    assert patients.lines() == b"p0\np1\np2\np3\n" == "\n".join(patients).encode()
    assert both.select(np.arange(5)).digest == both.digest
