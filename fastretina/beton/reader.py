"""Reader of .beton files (layout: `fastretina.beton.format`), in numpy only."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fastretina.beton import format as fmt
from fastretina.beton.file import OpenFile
from fastretina.beton.jpeg import check_claims
from fastretina.beton.names import Names, chosen
from fastretina.beton.tables import read_tables
from fastretina.errors import BetonError, JpegError, SampleError
from fastretina.grading import RETINOPATHY, Classes, Side, all_known, eye_of, side_of
from fastretina.system.json_text import parse_json

UNLABELLED = -1  # the label of an image that was packed without one, for prediction
PATIENT, EYE, QUALITY, GROUP = "patient", "eye", "quality", "group "  # columns of text; GROUP begins the name of one for subgroups


class Beton:
    """A .beton file, opened for reading: labels, ids and names at once, the samples' bytes when asked for.

    Reads what fastretina writes and what FFCV's DatasetWriter writes with an RGBImageField and an IntField. Threads may
    share one; it pickles as its path. A file replaced (renamed over) while open goes on as the old one.

    Attributes:
        path: of the file, as given.
        labels: int64 (N,). The field `label`, or the only IntField; UNLABELLED (-1) for an image packed without a grade.
        ids: int64 (N,). The 0-based row in the label table at packing, which stays unique when rows are left out;
            0 to N - 1 for files of other makers.
        crcs: uint32 (N,), zlib.crc32 of each sample's bytes; None for files of other makers.
        names: N strings, the image's file name without extension ("10_left"); "sample 17" for files of other makers.
        widths, heights: uint16 (N,), pixels, 1 to 16,384.
        modes: uint8 (N,), 0 JPEG, 1 raw pixels.
        stored: samples in the file, of which these may be a selection.
        packing: hexadecimal digits that all shards of one packing share; "" where unknown, as of a file that is no shard.

    Raises:
        BetonError: naming the path, where the file cannot be opened, is truncated, corrupt, malicious or not version 2.
    """

    _columns: tuple[str, ...] = ("labels", "ids", "crcs", "widths", "heights", "modes", "_pointers", "_sizes")
    _indices: NDArray[np.int64] | None = None  # of the samples in the file, where these are a selection
    _digest: str | None = None  # once it was asked for
    _whole: Beton | None = None  # of a selection

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: OpenFile | None = self._opened()
        self._provenance: Mapping[str, Any] | None = None
        tables = read_tables(self._file, self.path)
        self.labels, self.ids, self.crcs, text = tables.labels, tables.ids, tables.crcs, tables.text
        self.names: Names = text.column(0) if text else Names(len(self), "sample {}".format, f"{self.path}: ")
        self._text = text
        self.widths, self.heights, self.modes = tables.widths, tables.heights, tables.modes
        self._pointers, self._sizes, self._json = tables.pointers, tables.sizes, tables.provenance
        self.packing = tables.packing
        self.stored = len(self)
        self._walked = bytearray(len(self))  # whether a sample's claims were checked

    def _opened(self) -> OpenFile:
        return OpenFile(self.path)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Beton({str(self.path)!r}: {len(self)} samples)"

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The samples at these indices (N,), in this order, as a Beton of its own over the same open file; closing either
        leaves the other open. The index that a SampleError names stays that in the file."""
        part = copy.copy(self)
        part._whole = self.whole
        for name in self._columns:
            column = getattr(self, name)
            setattr(part, name, None if column is None else column[indices])
        part.names = chosen(self.names, indices)
        part._indices = indices if self._indices is None else self._indices[indices]
        part._digest, part._walked = None, bytearray(len(indices))
        return part

    @property
    def whole(self) -> Beton:
        """What this was selected from by `select`, in one step or several; itself where it was not."""
        return self._whole or self

    @property
    def digest(self) -> str:
        """What tells this data set from every other, 32 hexadecimal digits: of its samples in order, and of all that is said of
        each, their checksums among it. The same for one file and for the shards of the same table. Raises BetonError.

        The pixels of files of other makers, which have no checksums, have no part in it; the sizes of their samples do.
        """
        if self._digest is None:
            found = hashlib.blake2b(json.dumps([len(self), self.classes.as_dict(), list(self.columns)]).encode(), digest_size=16)
            for numbers in (self.labels, self.ids, self.crcs, self.widths, self.heights, self.modes, self.sizes):
                found.update(b"none" if numbers is None else numbers.astype("<i8").tobytes())
            for text in (self.names, *self.columns.values()):
                found.update(text.lines() + b"\n")
            self._digest = found.hexdigest()
        return self._digest

    @property
    def extents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offsets and sizes, int64 (N,) each, of the samples' bytes in the file."""
        return self._pointers.astype(np.int64), self._sizes.astype(np.int64)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Of the samples' bytes, int64 (N,)."""
        return self._sizes.astype(np.int64)

    @property
    def mean_bytes(self) -> float:
        """Mean size of the samples' bytes; of a set of several files or a selection of it: in all of its files."""
        return float(self._sizes.mean())

    @property
    def side(self) -> int | None:
        """Of its images in pixels, where all are squares of one size; else None."""
        first = int(self.widths[0]) if len(self) else None
        return first if bool((self.widths == first).all() and (self.heights == first).all()) else None

    def at(self, index: int) -> tuple[Beton, int]:
        """The file that holds this sample, and its index there: this one, unless it is a set of several. Raises as `jpeg` does."""
        return self, index

    def sample_error(self, index: int, reason: str) -> SampleError:
        """The error to raise for a sample, naming its index in the file."""
        row = index if self._indices is None else int(self._indices[index])
        return SampleError(self.path, row, self.names[index], reason)

    def __iter__(self) -> Iterator[memoryview]:
        return (self.jpeg(i) for i in range(len(self)))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the packer noted: sources, size, counts, versions; empty for files of other makers. Raises BetonError."""
        if self._provenance is None:
            try:
                found = parse_json(self._json) if self._json else {}
            except ValueError as error:
                raise BetonError(f"{self.path}: its provenance is not JSON ({error})") from None
            self._provenance = found if isinstance(found, dict) else {}
        return self._provenance

    @property
    def classes(self) -> Classes:
        """What its labels mean, as the packer noted; the grades of retinopathy where it did not. Raises BetonError."""
        found = self.provenance.get("classes")
        try:
            return RETINOPATHY if found is None else Classes.stored(found)
        except ValueError as error:
            raise BetonError(f"{self.path}: its classes cannot be read ({error})") from None

    @property
    def columns(self) -> Mapping[str, Names]:
        """Text about each sample (N,) by name of the column, as the packer noted; "" where it knew none. Raises BetonError."""
        match self.provenance.get("columns"):
            case [*names] if all(isinstance(name, str) for name in names):
                return {name: self._chosen(self._column(number)) for number, name in enumerate(names, start=1)}
        return {}

    def _chosen(self, text: Names) -> Names:
        return text if self._indices is None else chosen(text, self._indices)

    def _column(self, number: int) -> Names:
        """A column of text of all samples, of a selection too; number 0: the names."""
        assert self._text is not None  # with provenance there is text
        return self._text.column(number)

    @property
    def patients(self) -> list[str | None] | None:
        """Whose photograph each sample (N,) is, None where that is unknown; None for all where nobody's is known.

        As the packer noted. Of a file from before it did, by names (`fastretina.grading.eye_of`). Raises BetonError.
        """
        return self._known(PATIENT, lambda text: text or None, 0)

    @property
    def eyes(self) -> list[Side | None] | None:
        """Which eye each sample (N,) shows, "left" or "right"; None as for `patients`. Raises BetonError."""
        return self._known(EYE, side_of, 1)

    def _known(self, column: str, read: Callable[[str], Any], part: Literal[0, 1]) -> list[Any] | None:
        if "columns" in self.provenance:
            found = [read(text) for text in self.columns.get(column, ())]
        else:
            found = [eye and eye[part] for eye in map(eye_of, self.names)] if self.crcs is not None else []
        return found if any(found) else None

    @property
    def known_as(self) -> frozenset[str] | None:
        """What its patients are called, to look for the same people in another set; None where one is unknown. BetonError."""
        known = all_known(self.patients)
        return None if known is None else frozenset(known)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The packings that it is made of; the number of a sample's is its id >> `fastretina.beton.joined.SOURCE_BIT`."""
        return (self.path,)

    def patients_of(self, ids: NDArray[np.int64]) -> list[str] | None:
        """The patients of the samples with these ids (n,) where all are known, else None. BetonError where a sample is not here."""
        known = self.patients
        return None if known is None else all_known([known[index] for index in self.index_of(ids)])

    def index_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the samples with these ids (n,) are, int64 (n,) in 0 to N - 1. BetonError where one is not here."""
        order = np.argsort(self.ids, kind="stable")  # a selection's ids need not ascend
        if not (known := np.isin(ids, self.ids)).all():
            raise BetonError(f"{self.path}: holds no sample of id {ids[~known][0]}")
        return order[np.searchsorted(self.ids, ids, sorter=order)]

    def names_of(self, ids: NDArray[np.int64]) -> list[str]:
        """The names of the samples with these ids (n,). BetonError where one is not here."""
        return [self.names[index] for index in self.index_of(ids)]

    def jpeg(self, index: int) -> memoryview:
        """The JPEG bytes of sample `index` (0 to N - 1), read-only, to be decoded without fear.

        They match their checksum (files of other makers have none), and claim to be an image of the size in the table that takes a
        decoder a bounded time (`fastretina.beton.jpeg.check_claims`).

        Raises:
            IndexError: no such sample.
            SampleError: it holds raw pixels, cannot be read, does not match its checksum, or claims what it must not.
            BetonError: closed, or truncated while open.
        """
        data = self._payload(index)
        if self.modes.item(index) != fmt.MODE_JPEG:
            raise self.sample_error(index, "holds raw pixels, not a JPEG; use pixels()")
        return data.data.toreadonly()

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """The raw pixels of sample `index`: uint8 (height, width, 3), RGB. They match their checksum, and raises as `jpeg` does."""
        data = self._payload(index)
        if self.modes[index] != fmt.MODE_RAW:
            raise self.sample_error(index, "holds a JPEG, not raw pixels; use jpeg()")
        return data.reshape(int(self.heights[index]), int(self.widths[index]), 3)

    def verify(self, index: int) -> None:
        """Read sample `index` with all the checks of `jpeg` and `pixels`. Raises as they do."""
        (self.jpeg if self.modes[index] == fmt.MODE_JPEG else self.pixels)(index)

    def _payload(self, index: int) -> NDArray[np.uint8]:
        """The bytes of a sample, checked: the one place where they are read.

        The checksum takes 20 microseconds for 43 KB, without the GIL. The claims of a JPEG take 2, and are checked when it is read
        first: from then on the checksum says that these are the bytes whose claims were checked.
        """
        index = operator.index(index)
        if not 0 <= index < len(self.labels):
            raise IndexError(f"{self.path}: no sample {index} among {len(self)}")
        file = self._file  # held while it is read: another thread may close()
        if file is None:
            raise BetonError(f"{self.path}: already closed")
        try:
            data = file.read(self._pointers.item(index), self._sizes.item(index))
        except OSError as error:
            raise self.sample_error(index, f"cannot be read: {error.strerror}") from None
        if self.crcs is not None and zlib.crc32(data.data) != self.crcs.item(index):
            raise self.sample_error(index, "its bytes do not match their checksum; the file is corrupt")
        if not self._walked[index]:
            if self.modes[index] == fmt.MODE_JPEG:
                try:
                    check_claims(data.data, int(self.widths[index]), int(self.heights[index]))
                except JpegError as error:
                    raise self.sample_error(index, f"cannot be decoded: {error}") from None
            self._walked[index] = self.crcs is not None
        return data

    # ---- life ----------------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Have reads that wait for a server fail soon; nothing for local files. What is to be closed is told so first."""

    def close(self) -> None:
        """Close the file, once no thread reads from it any more. What was read before stays. Twice is fine."""
        self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _opener(self) -> Callable[[], Beton]:
        """What opens the same data set again, in another process too."""
        return partial(type(self), str(self.path))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _reopen, (self._opener, self._indices)


def _reopen(opener: Callable[[], Beton], indices: NDArray[np.int64] | None) -> Beton:
    return opener() if indices is None else opener().select(indices)
