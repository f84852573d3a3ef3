"""From the label table to the evaluation: how many images, how many left out and why, however they were packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_pack import SIZE, jpeg, picture
from test_splits import clinic

from fastretina.beton.open import open_beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import LabelError
from fastretina.metrics.flow import Flow
from fastretina.packing.pack import write_beton

# Line of the table: what becomes of its grade. Of twenty images of ten people, both eyes of each.
GRADES = {2: "9", 5: "9", 8: "9", 9: "", 12: "strange"}
BAD, MISSING, TWINS = 15, 18, (20, 21)
LEFT_OUT = {"bad image": 1, "missing image": 1, "no grade": 1, "no valid grade": 1, "ungradable": 3}
ASKED = {"size": SIZE, "ungradable": "9", "on_bad": "skip", "max_bad": "2", "workers": 1}


def table(folder: Path) -> dict[str, Path]:
    """Twenty rows of which thirteen can be packed, two of them with the same bytes."""
    where = clinic(folder)
    lines = where["labels"].read_text().splitlines()
    names = [line.partition(",")[0] for line in lines]
    for line, grade in GRADES.items():
        lines[line - 1] = f"{names[line - 1]},{grade}"
    where["labels"].write_text("\n".join(lines) + "\n")
    photo = {line: where["images"] / f"{names[line - 1]}.jpg" for line in (BAD, MISSING, *TWINS)}
    photo[BAD].write_bytes(photo[BAD].read_bytes()[:200])
    photo[MISSING].unlink()
    for line in TWINS:
        photo[line].write_bytes(jpeg(picture(seed=99)))
    return where


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The same table as one file, as shards and divided; and an older file of two images beside them."""
    folder = tmp_path_factory.mktemp("flow")
    where = table(folder)
    write_beton(folder / "all.beton", **where, **ASKED)
    write_beton(folder / "parts.beton", **where, **ASKED, shards=3)
    write_beton(folder / "{split}.beton", **where, **ASKED, splits="train=0.5,test=0.5")
    with BetonWriter(folder / "older.beton", 2, columns=[]) as writer:
        for number in range(2):
            image = jpeg(picture(seed=number))
            writer.add(image, 0, name=f"{number}_left", label=0, id=number, width=SIZE, height=SIZE)
        writer.finish({"skipped": 3})
    return folder


def test_what_was_left_out_of_a_file_is_counted_by_reason(packed):
    flow = Flow.of(open_beton(packed / "all.beton"))
    assert flow == Flow(20, LEFT_OUT, 13, 13, {})
    assert flow.rows == sum(flow.left_out.values()) + flow.packed
    assert flow.as_dict() == {"rows": 20, "left_out": LEFT_OUT, "packed": 13, "evaluated": 13, "by_source": {}}
    assert open_beton(packed / "all.beton").provenance["skipped"] == 7


def test_shards_are_summed_and_hold_their_own_counts(packed):
    beton = open_beton(packed / "parts-*.beton")
    assert Flow.of(beton) == Flow.of(open_beton(packed / "all.beton"))
    assert [shard.provenance["rows"] for shard in beton.shards] == [6, 7, 7]
    assert [shard.provenance["left_out"] for shard in beton.shards] == [
        {"ungradable": 2},
        {"no grade": 1, "no valid grade": 1, "ungradable": 1},
        {"bad image": 1, "missing image": 1},
    ]
    assert beton.digest == open_beton(packed / "all.beton").digest


def test_the_sets_of_a_division_have_every_row_once(packed):
    train, test = (Flow.of(open_beton(packed / f"{name}.beton")) for name in ("train", "test"))
    assert train.rows + test.rows == 20
    assert {kind: train.left_out.get(kind, 0) + test.left_out.get(kind, 0) for kind in LEFT_OUT} == LEFT_OUT
    for flow in (train, test):
        assert flow.rows == sum(flow.left_out.values()) + flow.packed


def test_several_packings_are_summed_and_told_apart(packed):
    both = f"{packed / 'train.beton'},{packed / 'parts-*.beton'}"
    train, parts = (Flow.of(open_beton(path)) for path in both.split(","))
    flow = Flow.of(open_beton(both))
    assert flow.by_source == dict(zip(both.split(","), (train, parts), strict=True))
    assert (flow.rows, flow.packed) == (train.rows + 20, train.packed + 13)
    assert flow.left_out == {kind: train.left_out.get(kind, 0) + count for kind, count in LEFT_OUT.items()}


def test_of_a_selection_all_rows_are_known_and_how_many_are_evaluated(packed):
    whole = Flow.of(open_beton(packed / "parts-*.beton"))
    for name in ("all.beton", "parts-*.beton"):
        assert Flow.of(open_beton(packed / name).select(np.array([1, 4, 9]))) == replace(whole, evaluated=3)
    both = open_beton(f"{packed / 'all.beton'},{packed / 'train.beton'}")
    flow = Flow.of(both.select(np.array([0, 2, len(both) - 1])))
    assert [part.evaluated for part in flow.by_source.values()] == [2, 1]
    assert flow.evaluated == 3
    assert flow.packed == len(both)


def test_of_older_files_it_is_unknown_what_was_left_out(packed):
    assert Flow.of(open_beton(packed / "older.beton")) == Flow(None, None, 2, 2, {})
    joined = Flow.of(open_beton(f"{packed / 'all.beton'},{packed / 'older.beton'}"))
    assert (joined.rows, joined.left_out, joined.packed) == (None, None, 15)
    assert [part.rows for part in joined.by_source.values()] == [20, None]


def test_a_row_that_names_an_image_again_is_no_row_left_out_but_an_error(tmp_path):
    where = table(tmp_path)
    with where["labels"].open("a") as file:
        file.write("0_left,1\n")
    with pytest.raises(LabelError, match="named a second time"):
        write_beton(tmp_path / "all.beton", **where, **ASKED)
