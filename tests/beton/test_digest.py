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
