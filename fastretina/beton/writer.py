"""Writes a .beton that appears under its final name only when it is complete, on the disk and readable.

Everything goes to `.NAME.tmp` in the same folder, which is removed on any error (see `fastretina.system.files.AtomicFile`).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastretina.beton import format as fmt
from fastretina.beton.format import DESCRIPTOR, FOOTER, HEADER, MARKER, OUR_FIELDS
from fastretina.beton.reader import Beton
from fastretina.beton.shards import packing_id
from fastretina.errors import ConvertError
from fastretina.system.files import AtomicFile, unfinished

_BUFFER = 8 << 20  # bytes; large enough that the system calls cost nothing


class BetonWriter:
    """Samples in order, then `finish`; leaving the `with` block before that leaves nothing.

    Args:
        path: the final name. capacity: the most samples that will come (room for their metadata comes first in the file).
        columns: names of the columns of text that each sample has beside its name (see `Beton.columns`); None: nothing is said of
            what is known, and readers look at the names.
        page: bytes, a power of two; grows by itself where a sample needs it.
    """

    def __init__(
        self, path: str | os.PathLike[str], capacity: int, columns: Sequence[str] | None = None, page: int = fmt.DEFAULT_PAGE
    ) -> None:
        if not (fmt.MIN_PAGE <= page <= fmt.MAX_PAGE and page & (page - 1) == 0):
            raise ConvertError(f"page size {page}: a power of two from {fmt.MIN_PAGE} to {fmt.MAX_PAGE} is needed")
        self._row = fmt.metadata_dtype([type_id for _, type_id in OUR_FIELDS])
        self._page, self._capacity = page, capacity
        self._tables_start = HEADER.itemsize + len(OUR_FIELDS) * DESCRIPTOR.itemsize
        self._position = -(-(self._tables_start + capacity * self._row.itemsize) // page) * page
        self._metadata, self._table = np.zeros(capacity, self._row), np.zeros(capacity, fmt.ALLOCATION)
        self._names: list[str] = []
        self._columns, self._texts = columns, list[Sequence[str]]()
        self._buffer, self._buffer_start = bytearray(), self._position
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConvertError(f"{path}: cannot be written: {error.strerror}") from error
        self._file = AtomicFile(path, ConvertError)

    def __len__(self) -> int:
        return len(self._names)

    def add(
        self, payload: bytes, crc: int, *, name: str, label: int, id: int, width: int, height: int, text: Sequence[str] = ()
    ) -> None:
        """One sample: the bytes of a JPEG of `width` x `height` pixels and their zlib.crc32. text: of each column. ConvertError."""
        size = len(payload)
        if not 0 < size <= fmt.MAX_PAGE:
            raise ConvertError(f"{self._file.path}: image {name!r} has {size} bytes; the format allows 1 to {fmt.MAX_PAGE}")
        if len(text) != len(self._columns or ()):
            raise ValueError(f"{len(text)} texts for the columns {self._columns}")
        if len(self) >= self._capacity or "\n" in name or (text and "\n" in "".join(text)):
            raise ConvertError(f"{self._file.path}: image {name!r} is one too many, or its name or another text holds a line break")
        # Pages only say where no sample may straddle, so a larger one never invalidates what is already there.
        while self._page < size:
            self._page *= 2
        room = -self._position % self._page
        if size > room > 0:
            self._put(bytes(room))
        self._metadata[len(self)] = (fmt.MODE_JPEG, width, height, self._position), label, id, crc
        self._table[len(self)] = len(self), self._position, size
        self._names.append(name)
        self._texts.append(text)
        self._put(payload)

    def _put(self, data: bytes) -> None:
        self._buffer += data
        self._position += len(data)
        if len(self._buffer) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        self._file.write(self._buffer, self._buffer_start)
        self._buffer_start += len(self._buffer)
        self._buffer = bytearray()

    def finish(self, provenance: Mapping[str, Any], publish: bool = True) -> int:
        """Write block and tables, check the result with the reader, publish now or later. Returns the file's size in bytes.

        `provenance` must be JSON, and the same for the same input: no times, no absolute paths. Raises ConvertError.
        """
        count = len(self)
        if count == 0:
            raise ConvertError(f"{self._file.path}: no image was left to pack")
        columns = [self._names, *zip(*self._texts, strict=True)]
        names = "".join(f"{value}\n" for column in columns for value in column).encode("utf-8", "surrogateescape")
        noted = provenance if self._columns is None else {**provenance, "columns": list(self._columns)}
        text = json.dumps(noted, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()
        self._put(bytes(-self._position % 8))
        payload = names + text
        payload += bytes(-len(payload) % 8)
        alloc = self._position + len(payload) + FOOTER.itemsize
        head, table = self._tables(alloc)
        footer = self._footer = np.zeros(1, dtype=FOOTER)
        self._footer_at = alloc - FOOTER.itemsize
        footer["magic"], footer["revision"] = fmt.FOOTER_MAGIC, fmt.REVISION
        footer["block_size"] = len(payload) + FOOTER.itemsize
        footer["names_size"], footer["json_size"] = len(names), len(text)
        footer["block_crc"] = zlib.crc32(payload)
        regions = np.frombuffer(head, np.uint8), np.frombuffer(table, np.uint8)
        footer["tables_sum"], footer["tables_crc"] = fmt.tables_sum(*regions), fmt.tables_crc(*regions)
        self._put(payload + self._signed() + table)
        self._flush()
        self._file.write(head, 0)
        Beton(unfinished(self._file.path)).close()
        # A set of many shards is published together: until then each need hold no more than its open file.
        self._names, self._texts = [], []
        self._metadata, self._table = self._metadata[:0], self._table[:0]
        if publish:
            self.publish()
        return self._position

    def _signed(self) -> bytes:
        self._footer["footer_crc"] = zlib.crc32(self._footer.tobytes()[:-4])
        return self._footer.tobytes()

    def digest(self) -> str:
        """`Beton.digest` of the finished file, which has not been published yet. Raises BetonError."""
        with Beton(unfinished(self._file.path)) as written:
            return written.digest

    def mark(self, packing: bytes) -> None:
        """Write the id of the packing (fmt.PACKING_BYTES) that it is a shard of into the finished file. Raises ConvertError."""
        self._footer["packing"] = np.frombuffer(packing, np.uint8)
        self._file.write(self._signed(), self._footer_at)

    def publish(self) -> None:
        """Give the finished file its name. Raises ConvertError."""
        self._file.publish()

    def _tables(self, alloc: int) -> tuple[bytes, bytes]:
        """Header, descriptors and metadata; and the allocation table."""
        count = len(self)
        header = np.zeros(1, dtype=HEADER)
        header[0] = (fmt.VERSION, len(OUR_FIELDS), self._page, count, alloc)
        descriptors = np.zeros(len(OUR_FIELDS), dtype=DESCRIPTOR)
        for descriptor, (name, type_id) in zip(descriptors, OUR_FIELDS, strict=True):
            descriptor["name"], descriptor["type_id"] = name, type_id
        descriptors["arguments"][0, : len(MARKER)] = np.frombuffer(MARKER, np.uint8)
        head = header.tobytes() + descriptors.tobytes() + self._metadata[:count].tobytes()
        return head, self._table[:count].tobytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.discard()


def mark_as_one(shards: Sequence[BetonWriter]) -> None:
    """Write into these finished shards of one packing, given in order, the id of it. Raises BetonError and ConvertError."""
    packing = packing_id(shard.digest() for shard in shards)
    for shard in shards:
        shard.mark(packing)
