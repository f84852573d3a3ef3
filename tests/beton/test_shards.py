"""Shards: the same bytes however they are packed, and together the same data set as one file."""

from __future__ import annotations

import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastretina.beton.open import open_beton
from fastretina.beton.paths import shard_path, shard_rows
from fastretina.beton.reader import Beton
from fastretina.beton.shards import ShardedBeton
from fastretina.beton.verify import verify_beton
from fastretina.errors import BetonError, ConvertError, SampleError, UsageError
from fastretina.loading.loader import Loader
from fastretina.packing.pack import write_beton
from fastretina.training.config import TrainConfig, check
from tests.conftest import TinyBetons

SHARDS = 7  # of 40 images: runs of 5 and 6


def pack(out: Path, betons: TinyBetons, **options) -> None:
    images = betons.train_images
    write_beton(out, images=images, labels=images / "labels.csv", size=64, workers=1, **options)


@pytest.fixture(scope="session")
def packed(tiny_betons: TinyBetons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    pack(folder / "train.beton", tiny_betons, shards=SHARDS)
    return folder


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_rows_are_dealt_in_runs_that_cover_the_table():
    for rows, of in ((40, 7), (40, 40), (1_000_000, 64), (5, 1)):
        runs = [shard_rows(rows, number, of) for number in range(of)]
        assert [row for run in runs for row in run] == list(range(rows))
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def unmarked(path: Path) -> tuple[bytes, bytes]:
    """All bytes of a file before the id of its packing, and all behind the footer."""
    data = path.read_bytes()
    table = struct.unpack_from("<Q", data, 16)[0]
    return data[: table - 20], data[table:]


def test_shards_packed_twice_have_the_same_bytes(packed, tiny_betons, tmp_path):
    pack(tmp_path / "train.beton", tiny_betons, shards=SHARDS)
    for number in range(SHARDS):
        path = shard_path("train.beton", number, SHARDS)
        assert (tmp_path / path).read_bytes() == (packed / path).read_bytes()


def test_a_shard_packed_alone_has_the_bytes_of_the_same_one_packed_with_all_but_for_the_packings_id(packed, tiny_betons, tmp_path):
    assert sorted(path.name for path in packed.iterdir()) == [f"train-{number:05d}-of-00007.beton" for number in range(SHARDS)]
    ids = set()
    for number in range(SHARDS):
        pack(tmp_path / "train.beton", tiny_betons, shard=f"{number}/{SHARDS}")
        path = shard_path("train.beton", number, SHARDS)
        assert unmarked(tmp_path / path) == unmarked(packed / path)
        ids.add((Beton(tmp_path / path).packing, len(Beton(packed / path).packing)))
    assert ids == {("", 24)}
    assert open_beton(tmp_path / "train-*.beton").digest == open_beton(packed / "train-*.beton").digest


def test_a_machine_needs_only_the_images_of_its_own_shard(tiny_betons, packed, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    names = [line.split(",")[0] for line in (tiny_betons.train_images / "labels.csv").read_text().splitlines()[1:]]
    for row in shard_rows(40, 3, SHARDS):
        shutil.copy(tiny_betons.train_images / f"{names[row]}.jpeg", images)
    labels = tiny_betons.train_images / "labels.csv"
    write_beton(tmp_path / "train.beton", images=images, labels=labels, size=64, workers=1, shard="3/7")
    path = shard_path("train.beton", 3, SHARDS)
    assert unmarked(tmp_path / path) == unmarked(packed / path)
    with pytest.raises(ConvertError, match=r"labels.csv, line 24: .*no image '11_left'"):
        write_beton(tmp_path / "train.beton", images=images, labels=labels, size=64, workers=1, shard="4/7")


def test_the_set_is_the_one_file_that_the_same_table_gives(packed, tiny_betons):
    with Beton(tiny_betons.train) as one, open_beton(packed / "train-*.beton") as many:
        assert isinstance(many, ShardedBeton)
        assert len(many) == 40
        for column in ("labels", "ids", "crcs", "widths", "heights", "modes"):
            np.testing.assert_array_equal(getattr(many, column), getattr(one, column))
            assert getattr(many, column).dtype == getattr(one, column).dtype
        assert list(many.names) == list(one.names)
        assert [bytes(many.jpeg(i)) for i in range(40)] == [bytes(jpeg) for jpeg in one]
        assert many.names[-1] == one.names[-1]
        assert many.names[3:9] == one.names[3:9]
        for i in (-1, 40):
            with pytest.raises(IndexError):
                many.jpeg(i)
    with pytest.raises(BetonError, match="closed"):
        many.jpeg(0)


@pytest.mark.parametrize("options", [{"train": True}, {"train": False}, {"train": True, "sampling": "balanced", "resident": "on"}])
def test_batches_are_those_of_the_one_file_to_the_bit(packed, tiny_betons, options):
    settings = {"batch_size": 7, "resolution": 48, "workers": 2, "seed": 3} | options
    with Loader(tiny_betons.train, **settings) as one, Loader(packed / "train-*-of-00007.beton", **settings) as many:
        for _ in range(2):
            for a, b in zip(one, many, strict=True):
                assert torch.equal(a.images, b.images)
                assert torch.equal(a.ids, b.ids)
                assert torch.equal(a.labels, b.labels)


def test_it_tells_where_samples_lie(packed):
    with open_beton(packed / "train-*.beton") as many:
        numbers, places = many.shard_of(np.arange(40))
        expected = [(number, place) for number in range(SHARDS) for place in range(len(shard_rows(40, number, SHARDS)))]
        assert list(zip(numbers.tolist(), places.tolist(), strict=True)) == expected
        chosen = many.select(np.array([39, 0, 17]))
        assert [array.tolist() for array in chosen.shard_of(np.arange(3))] == [[6, 0, 3], [5, 0, 0]]


def test_a_selection_is_a_set_of_its_own(packed):
    many = open_beton(packed / "train-*.beton")
    chosen = many.select(np.array([30, 2, 11])).select(np.array([2, 0]))
    expected = [bytes(many.jpeg(i)) for i in (11, 30)]
    assert [chosen.names[0], chosen.names[1]] == [many.names[11], many.names[30]]
    many.close()
    assert [bytes(jpeg) for jpeg in chosen] == expected
    with pickle.loads(pickle.dumps(chosen)) as again:
        assert again.ids.tolist() == [11, 30]
        assert [bytes(jpeg) for jpeg in again] == expected
    chosen.close()
    with pytest.raises(BetonError, match="closed"):
        chosen.jpeg(0)


def test_a_selection_of_what_is_not_there_holds_no_file_open(packed):
    many = open_beton(packed / "train-*.beton")
    with pytest.raises(IndexError):
        many.select(np.array([0, 10**6]))
    many.close()
    with pytest.raises(BetonError, match="closed"):
        many.shards[0].jpeg(0)


def test_the_file_rather_than_its_name_says_which_shard_it_is(folder):
    for number in range(SHARDS):
        (folder / shard_path("train.beton", number, SHARDS)).rename(folder / f"part-{SHARDS - number}.beton")
    with open_beton(folder / "part-*.beton") as many:
        assert many.ids.tolist() == list(range(40))


def test_a_missing_shard_is_named(folder):
    (folder / shard_path("train.beton", 4, SHARDS)).unlink()
    with pytest.raises(BetonError, match=r"train-\*\.beton: 1 of 7 shards missing: train-00004-of-00007\.beton\. .*--shard K/7"):
        open_beton(folder / "train-*.beton")


def test_a_doubled_shard_is_named(folder):
    shutil.copy(folder / shard_path("train.beton", 4, SHARDS), folder / "train-copy.beton")
    with pytest.raises(BetonError, match=r"train-copy\.beton: shard 4 of 7 is in the set twice, also as .*train-00004"):
        open_beton(folder / "train-*.beton")


def test_a_shard_of_another_packing_is_named(folder, tiny_betons):
    images = tiny_betons.test_images
    write_beton(folder / "train.beton", images=images, labels=images / "labels.csv", size=64, workers=1, shard="2/7")
    with pytest.raises(BetonError, match=r"train-00002-of-00007\.beton: shard 2 of 7, of another packing"):
        open_beton(folder / "train-*.beton")
    pack(folder / "train.beton", tiny_betons, shard="2/7")  # alone, and proven to be of the same packing by what it holds
    open_beton(folder / "train-*.beton").close()
    pack(folder / "train.beton", tiny_betons, shard="2/8")
    with pytest.raises(BetonError, match=r"of another packing.*train-\*-of-0000"):
        open_beton(folder / "train-*.beton")


def other_images(betons: TinyBetons, folder: Path) -> Path:
    """The same table, and another photograph under each name."""
    shutil.copytree(betons.train_images, folder)
    paths = sorted(folder.glob("*.jpeg"))
    for path, other in zip(paths, [*paths[1:], paths[0]], strict=True):
        shutil.copy(betons.train_images / other.name, path)
    return folder


@pytest.fixture(scope="session")
def others(tiny_betons: TinyBetons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_images(tiny_betons, tmp_path_factory.mktemp("others") / "images")


def test_shards_of_other_images_under_the_same_table_are_refused_by_name(folder, others, tiny_betons, tmp_path):
    """As a --shards that replaces an older set and is killed between two of its files would leave it."""
    options = {"images": others, "labels": others / "labels.csv", "size": 64, "workers": 1}
    write_beton(tmp_path / "train.beton", shards=SHARDS, **options)
    for number in range(SHARDS - 1):
        shutil.copy(tmp_path / shard_path("train.beton", number, SHARDS), folder)
        with pytest.raises(
            BetonError, match=rf"{number + 1:05d}-of-00007\.beton: shard {number + 1} of 7, of another packing than"
        ):
            verify_beton(folder / "train-*.beton")
    shutil.copy(tmp_path / shard_path("train.beton", SHARDS - 1, SHARDS), folder)
    assert open_beton(folder / "train-*.beton").digest == open_beton(tmp_path / "train-*.beton").digest


@pytest.mark.parametrize("alone", [{2}, {0, 1}, set(range(SHARDS - 1))])
def test_shards_packed_alone_from_other_images_are_refused_beside_those_packed_together(folder, others, tmp_path, alone):
    options = {"images": others, "labels": others / "labels.csv", "size": 64, "workers": 1}
    for number in alone:
        write_beton(folder / "train.beton", shard=f"{number}/{SHARDS}", **options)
    with pytest.raises(
        BetonError, match=rf"{min(alone):05d}-of-00007\.beton: was packed alone \(--shard\), and holds other images"
    ):
        open_beton(folder / "train-*.beton")


def test_each_set_of_a_division_has_an_id_of_its_own(tiny_betons, tmp_path):
    pack(tmp_path / "{split}.beton", tiny_betons, shards=3, splits="train=0.5,test=0.5")
    ids = {name: {Beton(path).packing for path in tmp_path.glob(f"{name}-*.beton")} for name in ("train", "test")}
    assert [len(found) for found in ids.values()] == [1, 1]
    assert ids["train"] != ids["test"]
    for name in ids:
        open_beton(tmp_path / f"{name}-*.beton").close()


def test_shards_appear_when_all_are_complete(folder, others, tiny_betons):
    digest = open_beton(folder / "train-*.beton").digest
    broken = Path(shutil.copytree(others, folder.parent / "broken"))
    (broken / "19_right.jpeg").write_bytes(b"no image")
    with pytest.raises(ConvertError, match="19_right"):
        write_beton(folder / "train.beton", images=broken, labels=others / "labels.csv", size=64, workers=1, shards=SHARDS)
    assert open_beton(folder / "train-*.beton").digest == digest
    assert list(folder.glob(".*")) == []


def test_a_file_that_is_no_shard_is_refused_beside_others_and_opened_alone(folder, tiny_betons):
    shutil.copy(tiny_betons.train, folder / "train-whole.beton")
    with pytest.raises(BetonError, match=r"train-whole\.beton: is no shard"):
        open_beton(folder / "train-*.beton")
    with open_beton(folder / "train-who*.beton") as one:
        assert type(one) is Beton


def test_a_damaged_shard_is_named_and_the_others_are_closed(folder):
    path = folder / shard_path("train.beton", 5, SHARDS)
    path.write_bytes(path.read_bytes()[:-24])
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BetonError, match="train-00005-of-00007"):
        open_beton(folder / "train-*.beton")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_pattern_without_a_match_and_a_name_without_its_file_say_what_to_do(folder):
    with pytest.raises(BetonError, match="no file matches"):
        open_beton(folder / "tests-*.beton")
    with pytest.raises(BetonError, match=r"train\.beton: no such file, but there are shards of it; give '.*/train-\*\.beton'"):
        open_beton(folder / "train.beton")


def test_a_damaged_sample_is_named_by_shard_and_place(folder):
    path = folder / shard_path("train.beton", 3, SHARDS)
    with Beton(path) as shard:
        start, row, name = path.read_bytes().find(bytes(shard.jpeg(2))), int(shard.ids[2]), shard.names[2]
    data = bytearray(path.read_bytes())
    data[start + 100] ^= 1
    path.write_bytes(data)
    with open_beton(folder / "train-*.beton") as many, pytest.raises(SampleError) as caught:
        many.verify(row)
    assert (caught.value.path, caught.value.index, caught.value.name) == (path, 2, name)
    report = verify_beton(folder / "train-*.beton", workers=2)
    assert [(index, found) for index, found, _ in report.bad] == [(row, name)]
    assert f"(sample 2 of {path})" in report.bad[0][2]
    assert report.samples == 40
    with Loader(folder / "train-*.beton", batch_size=8, resolution=64, on_bad="skip", max_bad=0.1, workers=2) as loader:
        for _ in range(2):
            assert sum(len(batch.ids) for batch in loader) == 39
        assert len(loader.skipped) == 1


def test_skipped_rows_leave_gaps_in_the_ids_and_are_listed_by_shard(tiny_betons, tmp_path):
    images = Path(shutil.copytree(tiny_betons.train_images, tmp_path / "images"))
    for name in ("3_left", "15_right"):  # rows 6 and 31, of shards 1 and 5
        (images / f"{name}.jpeg").write_bytes(b"no image")
    options = {"images": images, "labels": images / "labels.csv", "size": 64, "workers": 1, "on_bad": "skip"}
    with pytest.raises(ConvertError, match="more than --max-bad 1"):
        write_beton(tmp_path / "few.beton", shards=SHARDS, max_bad="1", **options)
    summary = write_beton(tmp_path / "train.beton", shards=SHARDS, max_bad="2", **options)
    assert (summary.images, summary.skipped, summary.grades) == (38, 2, (8, 6, 8, 8, 8))
    lists = sorted(path.name for path in tmp_path.glob("train-*.skipped.csv"))
    assert lists == ["train-00001-of-00007.beton.skipped.csv", "train-00005-of-00007.beton.skipped.csv"]
    with open_beton(tmp_path / "train-*.beton") as many:
        assert many.ids.tolist() == [row for row in range(40) if row not in (6, 31)]


def test_training_takes_patterns_and_finds_what_is_wrong_with_them(packed, tmp_path):
    pattern = packed / "train-*.beton"
    check(TrainConfig(train=pattern, test=pattern))
    with pytest.raises(UsageError, match="no such file"):
        check(TrainConfig(train=packed / "absent-*.beton", test=pattern))
    with pytest.raises(UsageError, match="is the test set"):
        check(TrainConfig(train=pattern, test=pattern, val=packed / "train-*-of-00007.beton"))


@pytest.mark.parametrize(
    "options", [{"shards": 41}, {"shards": 0}, {"shard": "7/7"}, {"shard": "x"}, {"shard": "1/3", "shards": 3}]
)
def test_shards_that_cannot_be_are_refused(tiny_betons, tmp_path, options):
    with pytest.raises(UsageError, match="shard"):
        pack(tmp_path / "train.beton", tiny_betons, **options)
    assert list(tmp_path.iterdir()) == []
