"""The .beton format: what is written is read back, and no truncated, flipped or malicious file gets past the open."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastretina.beton import format as fmt
from fastretina.beton.names import StoredText
from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import BetonError, ConvertError, SampleError
from fastretina.system.files import AtomicFile


def stub_jpeg(fill: int, size: int, width: int = 512, height: int = 400) -> bytes:
    """`size` bytes that claim to be a grey JPEG, and would not decode: its image data are all `fill`."""
    frame = b"\xff\xc0\0\x0b\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\0"
    start = b"\xff\xd8" + frame + bytes.fromhex("ffda0008010100003f00")
    return start + bytes([fill]) * (size - len(start) - 2) + b"\xff\xd9"


PAYLOADS = [stub_jpeg(i, 40 + 7 * i) for i in range(1, 13)]
NAMES = [f"{i // 2}_{'left' if i % 2 else 'right'}" for i in range(12)]


def pack(path: Path, payloads: list[bytes] = PAYLOADS, capacity: int | None = None) -> Path:
    with BetonWriter(path, capacity or len(payloads)) as writer:
        for i, payload in enumerate(payloads):
            writer.add(
                payload,
                zlib.crc32(payload),
                name=f"{i // 2}_{'left' if i % 2 else 'right'}",
                label=i % 5,
                id=3 * i,
                width=512,
                height=400,
            )
        writer.finish({"made": "by a test"})
    return path


def listing(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("beton") / "a.beton")


@pytest.fixture
def tampered(packed: Path, tmp_path: Path) -> Callable[[Callable[[bytearray], None]], Path]:
    """A copy with some bytes changed."""

    def make(change: Callable[[bytearray], None]) -> Path:
        data = bytearray(packed.read_bytes())
        change(data)
        path = tmp_path / "tampered.beton"
        path.write_bytes(data)
        return path

    return make


def alloc_ptr(data: bytes | bytearray) -> int:
    return int(struct.unpack_from("<Q", data, 16)[0])


def test_what_is_written_is_read_back(packed: Path) -> None:
    with Beton(packed) as beton:
        assert len(beton) == 12
        assert [bytes(beton.jpeg(i)) for i in range(12)] == PAYLOADS
        assert list(beton.names) == NAMES
        assert beton.labels.tolist() == [i % 5 for i in range(12)]
        assert beton.ids.tolist() == [3 * i for i in range(12)]
        assert beton.crcs is not None
        assert beton.crcs.tolist() == [zlib.crc32(payload) for payload in PAYLOADS]
        assert (beton.labels.dtype, beton.ids.dtype, beton.crcs.dtype) == (np.int64, np.int64, np.uint32)
        assert (beton.widths.dtype, beton.heights.dtype, beton.modes.dtype) == (np.uint16, np.uint16, np.uint8)
        assert set(beton.widths.tolist()) == {512}
        assert set(beton.heights.tolist()) == {400}
        assert beton.provenance == {"made": "by a test"}
        for i in range(12):
            beton.verify(i)


def test_the_same_samples_give_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    assert pack(tmp_path / "b.beton").read_bytes() == packed.read_bytes()


def test_samples_outside_are_index_errors_and_raw_reads_are_refused(packed: Path) -> None:
    with Beton(packed) as beton:
        for index in (-1, 12, 1 << 70):
            with pytest.raises(IndexError):
                beton.jpeg(index)
        with pytest.raises(IndexError):
            _ = beton.names[12]
        assert beton.names[-1] == NAMES[-1]
        assert beton.names[2:4] == NAMES[2:4]
        with pytest.raises(SampleError, match="holds a JPEG"):
            beton.pixels(0)


def test_fewer_samples_than_planned_are_fine(tmp_path: Path) -> None:
    with Beton(pack(tmp_path / "few.beton", capacity=500_000)) as beton:
        assert bytes(beton.jpeg(11)) == PAYLOADS[11]


def test_no_sample_straddles_a_page_and_large_samples_get_larger_pages(tmp_path: Path) -> None:
    payloads = [stub_jpeg(i + 1, size) for i, size in enumerate((3_000_000, 3_000_000, 5_000_000, 9_000_000, 100, 16_000_000))]
    path = pack(tmp_path / "large.beton", payloads)
    data = path.read_bytes()
    page = struct.unpack_from("<I", data, 4)[0]
    assert page == 16 << 20
    table = np.frombuffer(data, fmt.ALLOCATION, offset=alloc_ptr(data))
    assert (table["ptr"] // page == (table["ptr"] + table["size"] - 1) // page).all()
    with Beton(path) as beton:
        assert [bytes(beton.jpeg(i)) for i in range(6)] == payloads


def test_views_outlive_close_and_nothing_else_does(packed: Path) -> None:
    beton = Beton(packed)
    view = beton.jpeg(3)
    beton.close()
    beton.close()
    assert bytes(view) == PAYLOADS[3]
    with pytest.raises(BetonError, match="closed"):
        beton.jpeg(3)


def test_opening_leaves_no_descriptor_after_close(packed: Path) -> None:
    before = len(listing("/proc/self/fd"))
    for _ in range(20):
        Beton(packed).close()
    assert len(listing("/proc/self/fd")) == before


def test_it_pickles_as_its_path(packed: Path) -> None:
    with Beton(packed) as beton:
        text = pickle.dumps(beton)
        with pickle.loads(text) as again:
            assert bytes(again.jpeg(5)) == PAYLOADS[5]
    assert len(text) < 1000


def test_every_truncation_is_rejected_at_open(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    path = tmp_path / "truncated.beton"
    path.write_bytes(data)
    places = (
        set(range(len(data) - 1, len(data) - 800, -1)) | set(random.Random(0).sample(range(len(data)), 100)) | {0, 1, 23, 24, 1000}
    )
    for length in sorted(places, reverse=True):
        os.truncate(path, length)
        with pytest.raises(BetonError, match=r"truncated\.beton"):
            Beton(path)


def test_appended_bytes_are_rejected(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.beton"
    for extra in (1, 23, 24, 48):
        path.write_bytes(packed.read_bytes() + bytes(extra))
        with pytest.raises(BetonError):
            Beton(path)


def test_every_flipped_bit_of_the_tables_is_found_at_open(packed: Path, tmp_path: Path) -> None:
    """Header, metadata, name block and allocation table exhaustively; the descriptors, which are long, by sample."""
    data = bytearray(packed.read_bytes())
    table, metadata = alloc_ptr(data), 24 + 4 * 1041
    end = metadata + 12 * 40
    block = table - struct.unpack_from("<Q", data, table - 64 + 8)[0]
    chosen = random.Random(1)
    places = [*range(24 * 8), *range(metadata * 8, end * 8), *range(block * 8, len(data) * 8)]
    places += [chosen.randrange(24 * 8, metadata * 8) for _ in range(1000)]
    path = tmp_path / "flip.beton"
    path.write_bytes(data)
    missed = []
    with path.open("r+b", buffering=0) as file:
        for place in places:
            byte, bit = divmod(place, 8)
            os.pwrite(file.fileno(), bytes([data[byte] ^ 1 << bit]), byte)
            try:
                Beton(path).close()
                missed.append(place)
            except BetonError:
                pass
            os.pwrite(file.fileno(), data[byte : byte + 1], byte)
    assert missed == []
    Beton(path).close()


def test_every_flipped_bit_of_a_payload_is_found_by_verify(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    start = data.index(PAYLOADS[0])
    path = tmp_path / "flip.beton"
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file, Beton(path) as beton:
        for place in range(start * 8, (start + len(PAYLOADS[0])) * 8):
            byte, bit = divmod(place, 8)
            os.pwrite(file.fileno(), bytes([data[byte] ^ 1 << bit]), byte)
            with pytest.raises(SampleError, match=r"sample 0 \(0_right\).*checksum"):
                beton.verify(0)
            beton.verify(1)
            os.pwrite(file.fileno(), data[byte : byte + 1], byte)
        beton.verify(0)


def test_swapped_words_change_the_sum_of_older_files() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 62, 2048, dtype=np.uint64)
    before = fmt.tables_sum(words.view(np.uint8))
    for one, other in ((0, 1), (3, 400), (5, 600), (0, 2047)):
        swapped = words.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert fmt.tables_sum(swapped.view(np.uint8)) != before
    assert fmt.tables_sum(words.view(np.uint8)[:-1]) != before


def test_marks_of_our_files_are_believed_only_together(tampered: Callable[[Callable[[bytearray], None]], Path]) -> None:
    def without_marker(data: bytearray) -> None:
        data[24 + 17 : 24 + 17 + len(fmt.MARKER)] = bytes(len(fmt.MARKER))

    def without_footer(data: bytearray) -> None:
        table = alloc_ptr(data)
        data[table - 64 : table] = bytes(64)

    for change in (without_marker, without_footer):
        with pytest.raises(BetonError, match="name block is corrupt"):
            Beton(tampered(change))


def test_wrong_number_of_names_is_our_error(packed: Path) -> None:
    names = StoredText(np.frombuffer(b"one\ntwo\n", np.uint8), 12, packed).column(0)
    with pytest.raises(BetonError, match="2 names for 12 samples"):
        _ = names[0]


def test_what_is_no_file_is_our_error_and_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "empty", "folder", "loop", "fifo", "nul\0"):
        with pytest.raises(BetonError) as caught:
            Beton(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_file_truncated_while_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.beton")
    with Beton(path) as beton:
        os.truncate(path, 5000)
        for call in (beton.jpeg, beton.verify):
            with pytest.raises(BetonError, match="truncated while open"):
                call(3)


def test_a_file_replaced_while_open_goes_on_as_the_old_one(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.beton")
    with Beton(path) as beton:
        pack(path, [b"other" * 20] * 3)
        beton.verify(11)
        assert bytes(beton.jpeg(11)) == PAYLOADS[11]
    assert len(Beton(path)) == 3


# ---- the writer --------------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.beton")
    before = path.read_bytes()

    def interrupted() -> None:
        with BetonWriter(path, 5) as writer:
            writer.add(b"x" * 50, 0, name="a", label=0, id=0, width=8, height=8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["a.beton"]


def test_what_the_reader_would_refuse_is_not_published(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", 5) as writer:
        with pytest.raises(ConvertError, match="no image"):
            writer.finish({})
        writer.add(b"x" * 50, 0, name="a", label=0, id=0, width=0, height=8)
        with pytest.raises(BetonError, match="without pixels"):
            writer.finish({})
    assert listing(tmp_path) == []


def test_a_leftover_of_a_killed_writer_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".a.beton.tmp").write_bytes(b"left behind" * 1_000_000)
    path = pack(tmp_path / "a.beton")
    assert listing(tmp_path) == ["a.beton"]
    assert path.read_bytes() == pack(tmp_path / "b.beton").read_bytes()


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "a.beton", ConvertError) as first:
        with pytest.raises(ConvertError, match="another process is writing"):
            AtomicFile(tmp_path / "a.beton", ConvertError)
        first.write(b"first", 0)
        first.publish()
    assert (tmp_path / "a.beton").read_bytes() == b"first"
    assert listing(tmp_path) == ["a.beton"]


def test_missing_folders_are_made_and_folders_are_not_overwritten(tmp_path: Path) -> None:
    with Beton(pack(tmp_path / "new" / "deep" / "a.beton")) as beton:
        assert len(beton) == 12
    with pytest.raises(ConvertError, match="is a folder"):
        pack(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ConvertError, match="cannot be written"):
        pack(tmp_path / "file" / "a.beton")


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", 1) as writer:
        with pytest.raises(ConvertError, match="0 bytes"):
            writer.add(b"", 0, name="a", label=0, id=0, width=8, height=8)
        with pytest.raises(ConvertError, match="line break"):
            writer.add(b"x", 0, name="a\nb", label=0, id=0, width=8, height=8)
    with pytest.raises(ConvertError, match="power of two"):
        BetonWriter(tmp_path / "a.beton", 1, page=3 << 20)
    assert listing(tmp_path) == []


def test_ids_are_found_in_a_file_and_in_any_selection_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    with BetonWriter(path, 5) as writer:
        for number, sample_id in enumerate((2, 3, 7, 11, 20)):
            writer.add(
                b"\xff\xd8data", zlib.crc32(b"\xff\xd8data"), name=f"eye {sample_id}", label=number, id=sample_id, width=9, height=9
            )
        writer.finish({})
    with Beton(path) as beton:
        assert beton.index_of(np.array([11, 2, 20, 11])).tolist() == [3, 0, 4, 3]
        assert beton.names_of(np.array([20, 3])) == ["eye 20", "eye 3"]
        assert beton.index_of(np.array([], np.int64)).tolist() == []
        chosen = beton.select(np.array([4, 0, 2]))
        assert chosen.index_of(np.array([2, 7, 20])).tolist() == [1, 2, 0]
        for absent in (0, 3, 11, 21):
            with pytest.raises(BetonError, match=f"a.beton: holds no sample of id {absent}"):
                chosen.index_of(np.array([20, absent]))
