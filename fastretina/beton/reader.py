"""Reader of .beton files (layout: `fastretina.beton.format`), in numpy only.

Everything that `Beton` later relies on is copied and checked when the file is opened, vectorised (one million samples: under
50 ms), so that no pointer of a damaged or hostile file is ever followed.
"""

from __future__ import annotations

import copy
import json
import operator
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from fastretina.beton import format as fmt
from fastretina.beton.file import OpenFile, open_file
from fastretina.beton.jpeg import MAX_SIDE
from fastretina.errors import BetonError, SampleError
from fastretina.system.memory import available_bytes

_BLOCK = 1 << 13  # rows of a table, some 300 KB
_MUCH = 1 << 26  # bytes of tables (a million samples) that nobody need ask the system about


class NameList(Sequence[str]):
    """Names that are made one by one when asked for: what a list does with negative indices, slices and wrong ones."""

    _where = ""  # begins the message of an IndexError

    @abstractmethod
    def _name(self, i: int) -> str:
        """Name `i`, 0 to N - 1."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        count = len(self)
        if isinstance(index, slice):
            return [self._name(i) for i in range(*index.indices(count))]
        i = operator.index(index)
        if not -count <= i < count:
            raise IndexError(f"{self._where}no sample {i} among {count}")
        return self._name(i % count)


class Names(NameList):
    """Names of the samples, decoded one by one when asked for; "sample 17" and so on where the file holds none."""

    def __init__(self, blob: NDArray[np.uint8] | None, count: int, path: Path) -> None:
        self._blob, self._count, self._path = blob, count, path
        self._where = f"{path}: "
        self._ends: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self._count

    def _name(self, i: int) -> str:
        if self._blob is None:
            return f"sample {i}"
        if self._ends is None:
            ends = np.flatnonzero(self._blob == 10).astype(np.int64)
            if len(ends) != self._count:
                raise BetonError(f"{self._path}: holds {len(ends)} names for {self._count} samples")
            self._ends = ends
        start = int(self._ends[i - 1]) + 1 if i else 0
        return self._blob[start : int(self._ends[i])].tobytes().decode("utf-8", "replace")


class Selected(NameList):
    """The names at some positions."""

    def __init__(self, names: Sequence[str], positions: NDArray[np.int64]) -> None:
        self._names, self._positions = names, positions

    def __len__(self) -> int:
        return len(self._positions)

    def _name(self, i: int) -> str:
        return self._names[int(self._positions[i])]


class Beton:
    """A .beton file, opened for reading: labels, ids and names at once, the samples' bytes when asked for.

    Reads what fastretina writes and what FFCV's DatasetWriter writes with an RGBImageField and an IntField. Threads may
    share one; it pickles as its path. A file replaced (renamed over) while open goes on as the old one.

    Attributes:
        path: of the file, as given.
        labels: int64 (N,). The field `label`, or the only IntField.
        ids: int64 (N,). The 0-based row in the label table at packing, which stays unique when rows are left out;
            0 to N - 1 for files of other makers.
        crcs: uint32 (N,), zlib.crc32 of each sample's bytes; None for files of other makers.
        names: N strings, the image's file name without extension ("10_left"); "sample 17" for files of other makers.
        widths, heights: uint16 (N,), pixels, 1 to 16,384.
        modes: uint8 (N,), 0 JPEG, 1 raw pixels.

    Raises:
        BetonError: naming the path, where the file cannot be opened, is cut, damaged, hostile or not version 2.
    """

    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    crcs: NDArray[np.uint32] | None
    names: Sequence[str]
    widths: NDArray[np.uint16]
    heights: NDArray[np.uint16]
    modes: NDArray[np.uint8]
    _positions: NDArray[np.int64] | None = None  # of the samples in the file, where these are a selection

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: OpenFile | None = open_file(self.path)
        self._provenance: Mapping[str, Any] | None = None
        self._json = b""
        try:
            self._read_tables(self._file)
        except OSError as error:
            raise BetonError(f"{self.path}: cannot be read: {error.strerror}") from None

    # ---- opening -------------------------------------------------------------------------------------------------

    def _read_tables(self, file: OpenFile) -> None:
        size = file.size
        self._require(size > fmt.HEADER.itemsize, f"{size} bytes, too short for a .beton")
        front = file.read(0, min(size, fmt.HEADER.itemsize + fmt.MAX_FIELDS * fmt.DESCRIPTOR.itemsize))
        header = front[: fmt.HEADER.itemsize].view(fmt.HEADER)[0]
        version, fields, page, count, alloc = (int(header[name]) for name in fmt.HEADER.names or ())
        self._require(version == fmt.VERSION, f"not a .beton of version {fmt.VERSION} (version field {version})")
        self._require(1 <= fields <= fmt.MAX_FIELDS, f"{fields} fields")
        self._require(fmt.MIN_PAGE <= page <= fmt.MAX_PAGE and page & (page - 1) == 0, f"page size {page}")
        # Python's integers do not overflow: counts of 2^63 end here, before anything is allocated for them.
        start = fmt.HEADER.itemsize + fields * fmt.DESCRIPTOR.itemsize
        self._require(start <= size, "cut within the field descriptors")
        descriptors = front[fmt.HEADER.itemsize : start].view(fmt.DESCRIPTOR)
        types = [int(type_id) for type_id in descriptors["type_id"]]
        self._require(all(type_id in fmt.METADATA for type_id in types), "a field of a custom type, which only its maker can read")
        row = fmt.metadata_dtype(types)
        end = start + count * row.itemsize
        self._require(count > 0, "holds no samples (an interrupted FFCV writer leaves such files)")
        self._require(
            end <= alloc <= size, f"{count} samples and a table at byte {alloc} do not fit in {size} bytes; cut or damaged"
        )
        rows, odd = divmod(size - alloc, fmt.ALLOCATION.itemsize)
        self._require(odd == 0 and rows >= count, "the allocation table does not fit; the file is cut or unfinished")
        # A sparse file may claim tables of any size.
        tables = end + size - alloc
        self._require(tables < _MUCH or 3 * tables < available_bytes(), f"its tables of {tables:,} bytes do not fit in memory")

        names = [bytes(name) for name in descriptors["name"]]
        arguments = descriptors["arguments"][0].tobytes()
        head, tail = file.read(0, end), file.read(alloc, size - alloc)
        self._require(np.array_equal(head[:start], front[:start]), "changed while it was opened")
        ours = self._read_block(file, head, tail, alloc, count, marked=arguments.startswith(fmt.MARKER))
        metadata, table = head[start:].view(row), tail.view(fmt.ALLOCATION)
        if ours:
            self._require(
                tuple(zip(names, types, strict=True)) == fmt.OUR_FIELDS and rows == count, "field descriptors are damaged"
            )
        image, label = self._pick(names, types, fmt.TYPE_IMAGE, b"image"), self._pick(names, types, fmt.TYPE_INT, b"label")
        pixels, integers = metadata[f"f{image}"], [metadata[f"f{label}"], *([metadata["f2"], metadata["f3"]] if ours else [])]
        self.modes, self.widths, self.heights, pointers, self.labels, *rest = _columns(
            *(pixels[name] for name in fmt.IMAGE.names or ()), *integers
        )
        starts, sizes = _columns(table["ptr"], table["size"])
        self._read_samples(pointers, starts, sizes, end, alloc - self._block_size, page, ordered=ours)
        if ours:
            self.ids, crcs = rest
            self._require(bool((self.ids[1:] > self.ids[:-1]).all()) and self.ids[0] >= 0, "sample ids are not ascending")
            self._require(int(crcs.min()) >= 0 and int(crcs.max()) < 1 << 32, "checksums out of range")
            self.crcs = crcs.astype(np.uint32)
        else:
            self.ids, self.crcs, self.names = np.arange(count), None, Names(None, count, self.path)

    def _read_block(
        self, file: OpenFile, head: NDArray[np.uint8], tail: NDArray[np.uint8], alloc: int, count: int, *, marked: bool
    ) -> bool:
        """Check our block, and by its checksums the tables `head` and `tail`; False for a file of another maker."""
        self._block_size = 0
        floor = len(head)
        footer = file.read(alloc - fmt.FOOTER.itemsize, fmt.FOOTER.itemsize if alloc - fmt.FOOTER.itemsize >= floor else 0)
        signed = bool(len(footer)) and footer[:8].tobytes() == fmt.FOOTER_MAGIC
        if not marked and not signed:
            return False
        self._require(marked and signed and alloc % 8 == 0, "the name block is damaged")
        fields = footer.view(fmt.FOOTER)[0]
        self._require(zlib.crc32(footer[:-4].tobytes()) == int(fields["footer_crc"]), "the name block's footer is damaged")
        block, names, text = (int(fields[name]) for name in ("block_size", "names_size", "json_size"))
        start = alloc - block
        payload = block - fmt.FOOTER.itemsize
        self._require(start >= floor and 0 <= payload - names - text < 8 and text <= fmt.MAX_JSON, "the name block does not fit")
        held = file.read(start, payload)
        self._require(zlib.crc32(held.data) == int(fields["block_crc"]), "the name block is damaged")
        self._require(fmt.tables_crc(head, tail) == int(fields["tables_crc"]), "the sample tables are damaged (checksum)")
        self._block_size = block
        self.names = Names(held[:names], count, self.path)
        self._json = held[names : names + text].tobytes()
        return True

    def _read_samples(
        self,
        pointers: NDArray[np.uint64],
        starts: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        floor: int,
        ceiling: int,
        page: int,
        *,
        ordered: bool,
    ) -> None:
        """Keep pointers and sizes after checking that every sample lies inside its page and the data region, alone."""
        if not ordered and not bool((starts[1:] >= starts[:-1]).all()):
            order = np.argsort(starts, kind="stable")
            starts, sizes = starts[order], sizes[order]
        low, high = np.uint64(floor), np.uint64(ceiling)
        self._require(bool((starts >= low).all() and (starts < high).all()), "a sample lies outside the file's data")
        self._require(int(sizes.min()) > 0 and bool((sizes <= high - starts).all()), "a sample is empty or reaches past the data")
        ends = starts + sizes
        self._require(bool((ends[:-1] <= starts[1:]).all()), "samples overlap")
        ends -= np.uint64(1)
        ends ^= starts  # of the first and the last byte: below the page size where they are in one page
        self._require(int(ends.max()) < page, "a sample straddles a page")
        if len(starts) != len(pointers) or not np.array_equal(starts, pointers):
            self._require(not ordered, "metadata and allocation table disagree")
            place = np.minimum(np.searchsorted(starts, pointers), len(starts) - 1)
            self._require(bool((starts[place] == pointers).all()), "a sample's pointer is not in the allocation table")
            sizes = sizes[place]
        self._pointers, self._sizes = pointers, sizes
        widest = int(max(self.widths.max(), self.heights.max()))
        self._require(int(self.modes.max()) <= fmt.MODE_RAW, "an image of unknown mode")
        self._require(int(min(self.widths.min(), self.heights.min())) > 0, "an image without pixels")
        self._require(widest <= MAX_SIDE, f"an image of {widest} pixels a side; the limit is {MAX_SIDE}")
        raw = np.flatnonzero(self.modes == fmt.MODE_RAW)
        expected = self.widths[raw].astype(np.uint64) * self.heights[raw] * np.uint64(3)
        self._require(bool((sizes[raw] == expected).all()), "raw pixels of the wrong size")

    def _pick(self, names: list[bytes], types: list[int], wanted: int, name: bytes) -> int:
        """Place of the field called `name`, or of the only one of its type."""
        places = [i for i, type_id in enumerate(types) if type_id == wanted]
        named = [i for i in places if names[i] == name]
        kind = "RGBImageField" if wanted == fmt.TYPE_IMAGE else "IntField"
        self._require(bool(named) or len(places) == 1, f"{len(places)} fields of type {kind}, none of them called {name.decode()}")
        return named[0] if named else places[0]

    def _require(self, holds: bool, reason: str) -> None:
        if not holds:
            raise BetonError(f"{self.path}: {reason}. Pack the images again with fastretina pack")

    # ---- samples -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Beton({str(self.path)!r}: {len(self)} samples)"

    def select(self, positions: NDArray[np.int64]) -> Self:
        """The samples at these positions (N,), in this order, as a Beton of its own over the same open file; closing either
        leaves the other open. Positions that a SampleError names stay those of the file."""
        chosen = copy.copy(self)
        for name in ("labels", "ids", "widths", "heights", "modes", "_pointers", "_sizes"):
            setattr(chosen, name, getattr(self, name)[positions])
        chosen.crcs = None if self.crcs is None else self.crcs[positions]
        chosen.names = Selected(self.names, positions)
        chosen._positions = positions if self._positions is None else self._positions[positions]
        return chosen

    @property
    def extents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offsets and sizes, int64 (N,) each, of the samples' bytes in the file."""
        return self._pointers.astype(np.int64), self._sizes.astype(np.int64)

    @property
    def mean_bytes(self) -> float:
        """Mean size of the samples' bytes; of a set of several files or a selection of it: in all of its files."""
        return float(self._sizes.mean())

    def at(self, i: int) -> tuple[Beton, int]:
        """The file that holds sample `i`, and its place there: this one, unless it is a set of several. Raises as `jpeg` does."""
        return self, i

    def sample_error(self, i: int, reason: str) -> SampleError:
        """The error to raise for sample `i`, naming its place in the file."""
        place = i if self._positions is None else int(self._positions[i])
        return SampleError(self.path, place, self.names[i], reason)

    def __iter__(self) -> Iterator[memoryview]:
        return (self.jpeg(i) for i in range(len(self)))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the packer noted: sources, size, counts, versions; empty for files of other makers. Raises BetonError."""
        if self._provenance is None:
            try:
                found = json.loads(self._json) if self._json else {}
            except ValueError as error:
                raise BetonError(f"{self.path}: its provenance is not JSON ({error})") from None
            self._provenance = found if isinstance(found, dict) else {}
        return self._provenance

    def jpeg(self, i: int, verify: bool = False) -> memoryview:
        """The JPEG bytes of sample `i` (0 to N - 1), read-only; `verify` compares them with their checksum.

        Raises:
            IndexError: no such sample.
            SampleError: it holds raw pixels, cannot be read, or does not match its checksum.
            BetonError: closed, or cut while open.
        """
        data = self._payload(i, verify)
        if self.modes[i] != fmt.MODE_JPEG:
            raise self.sample_error(i, "holds raw pixels, not a JPEG; use pixels()")
        return data.data.toreadonly()

    def pixels(self, i: int, verify: bool = False) -> NDArray[np.uint8]:
        """The raw pixels of sample `i`: uint8 (height, width, 3), RGB. `verify`, and what it raises, as for `jpeg`."""
        data = self._payload(i, verify)
        if self.modes[i] != fmt.MODE_RAW:
            raise self.sample_error(i, "holds a JPEG, not raw pixels; use jpeg()")
        return data.reshape(int(self.heights[i]), int(self.widths[i]), 3)

    def verify(self, i: int) -> None:
        """Compare the bytes of sample `i` with their checksum; files of other makers have none and pass.

        Some 20 microseconds for 43 KB, without the GIL. Raises SampleError on a mismatch, else as `jpeg` does.
        """
        self._payload(i, verify=True)

    def _payload(self, i: int, verify: bool) -> NDArray[np.uint8]:
        i = operator.index(i)
        if not 0 <= i < len(self.labels):
            raise IndexError(f"{self.path}: no sample {i} among {len(self)}")
        file = self._file  # held while it is read: another thread may close()
        if file is None:
            raise BetonError(f"{self.path}: already closed")
        try:
            data = file.read(int(self._pointers[i]), int(self._sizes[i]))
        except OSError as error:
            raise self.sample_error(i, f"cannot be read: {error.strerror}") from None
        if verify and self.crcs is not None and zlib.crc32(data.data) != self.crcs[i]:
            raise self.sample_error(i, "its bytes do not match their checksum; the file is damaged")
        return data

    # ---- life ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file, once no thread reads from it any more. What was read before stays. Twice is fine."""
        self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _opener(self) -> Callable[[], Beton]:
        """What opens the same data set again, in another process too."""
        return partial(type(self), str(self.path))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _reopen, (self._opener, self._positions)


def _reopen(opener: Callable[[], Beton], positions: NDArray[np.int64] | None) -> Beton:
    return opener() if positions is None else opener().select(positions)


def _columns(*views: NDArray[Any]) -> list[NDArray[Any]]:
    """Contiguous copies of columns of one table, made block by block: its rows come from memory once, not once a column."""
    copies = [np.empty(len(view), view.dtype) for view in views]
    for begin in range(0, len(views[0]), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        for column, view in zip(copies, views, strict=True):
            column[block] = view[block]
    return copies
