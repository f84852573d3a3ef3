"""The tables of a .beton file (layout: `fastretina.beton.format`), copied and checked before anything relies on them.

Vectorised (one million samples: under 50 ms), so that no pointer of a corrupt or malicious file is ever followed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastretina.beton import format as fmt
from fastretina.beton.file import OpenFile
from fastretina.beton.jpeg import MAX_SIDE
from fastretina.beton.names import StoredText
from fastretina.errors import BetonError
from fastretina.system.memory import available_bytes

_BLOCK = 1 << 13  # rows of a table, some 300 KB
_EXTRA = 1 << 24  # bytes of a JPEG that need not be pixels: metadata, and what follows its end
_MUCH = 1 << 26  # bytes of tables (a million samples) that nobody need ask the system about


@dataclass(frozen=True)
class Tables:
    """What a file says of its N samples: columns as `Beton` has them, offsets and sizes in bytes; names and other text, None for
    files of other makers; JSON, b"" for none; and the packing's id, "" for none."""

    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    crcs: NDArray[np.uint32] | None
    text: StoredText | None
    widths: NDArray[np.uint16]
    heights: NDArray[np.uint16]
    modes: NDArray[np.uint8]
    pointers: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    provenance: bytes
    packing: str


class _Refused(Exception):
    """What is wrong with a file, without its path."""


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _Refused(reason)


def read_tables(file: OpenFile, path: Path) -> Tables:
    """The tables of the file opened from `path`. Raises BetonError naming the path."""
    try:
        return _read(file, path)
    except _Refused as error:
        raise BetonError(f"{path}: {error}. Pack the images again with tools/write_beton.py") from None
    except MemoryError:
        raise BetonError(f"{path}: its tables do not fit in the memory that this process may take") from None
    except OSError as error:
        raise BetonError(f"{path}: cannot be read: {error.strerror}") from None


def _read(file: OpenFile, path: Path) -> Tables:
    size = file.size
    _require(size > fmt.HEADER.itemsize, f"{size} bytes, too short for a .beton")
    front = file.read(0, min(size, fmt.HEADER.itemsize + fmt.MAX_FIELDS * fmt.DESCRIPTOR.itemsize))
    version, fields, page, count, alloc = (int(value) for value in front[: fmt.HEADER.itemsize].view(fmt.HEADER)[0])
    _require(version == fmt.VERSION, f"not a .beton of version {fmt.VERSION} (version field {version})")
    _require(1 <= fields <= fmt.MAX_FIELDS, f"{fields} fields")
    _require(fmt.MIN_PAGE <= page <= fmt.MAX_PAGE and page & (page - 1) == 0, f"page size {page}")
    # Python's integers do not overflow: counts of 2^63 end here, before anything is allocated for them.
    start = fmt.HEADER.itemsize + fields * fmt.DESCRIPTOR.itemsize
    _require(start <= size, "truncated within the field descriptors")
    descriptors = front[fmt.HEADER.itemsize : start].view(fmt.DESCRIPTOR)
    types = [int(type_id) for type_id in descriptors["type_id"]]
    _require(all(type_id in fmt.METADATA for type_id in types), "a field of a custom type, which only its maker can read")
    row = fmt.metadata_dtype(types)
    end = start + count * row.itemsize
    _require(count > 0, "holds no samples (an interrupted FFCV writer leaves such files)")
    _require(end <= alloc <= size, f"{count} samples and a table at byte {alloc} do not fit in {size} bytes; truncated or corrupt")
    rows, odd = divmod(size - alloc, fmt.ALLOCATION.itemsize)
    _require(odd == 0 and rows >= count, "the allocation table does not fit; the file is truncated or unfinished")
    # A sparse file may claim tables of any size.
    tables = end + size - alloc
    _require(tables < _MUCH or 3 * tables < available_bytes(), f"its tables of {tables:,} bytes do not fit in memory")

    names = [bytes(name) for name in descriptors["name"]]
    arguments = descriptors["arguments"][0].tobytes()
    head, tail = file.read(0, end), file.read(alloc, size - alloc)
    _require(np.array_equal(head[:start], front[:start]), "changed while it was opened")
    named = tuple(zip(names, types, strict=True)) == fmt.OUR_FIELDS
    block = _read_block(file, path, head, tail, alloc, {arguments.startswith(fmt.MARKER), named})
    metadata, table = head[start:].view(row), tail.view(fmt.ALLOCATION)
    if block:
        _require(rows == count, "the allocation table has more rows than there are samples")
    image, label = _pick(names, types, fmt.TYPE_IMAGE, b"image"), _pick(names, types, fmt.TYPE_INT, b"label")
    pixels, integers = metadata[f"f{image}"], [metadata[f"f{label}"], *([metadata["f2"], metadata["f3"]] if block else [])]
    modes, widths, heights, pointers, labels, *rest = _columns(*(pixels[name] for name in fmt.IMAGE.names or ()), *integers)
    starts, sizes = _columns(table["ptr"], table["size"])
    sizes = _check_extents(pointers, starts, sizes, range(end, block.start if block else alloc), page, ordered=block is not None)
    _check_images(modes, widths, heights, sizes)
    if block is None:
        return Tables(labels, np.arange(count), None, None, widths, heights, modes, pointers, sizes, b"", "")
    ids, crcs = rest
    _require(bool((ids[1:] > ids[:-1]).all()) and ids[0] >= 0, "sample ids are not ascending")
    _require(int(crcs.min()) >= 0 and int(crcs.max()) < 1 << 32, "checksums out of range")
    text = StoredText(block.names, count, path)
    return Tables(
        labels, ids, crcs.astype(np.uint32), text, widths, heights, modes, pointers, sizes, block.provenance, block.packing
    )


@dataclass(frozen=True)
class _Block:
    """Our block, which begins at byte `start`."""

    start: int
    names: NDArray[np.uint8]
    provenance: bytes
    packing: str


def _read_block(
    file: OpenFile, path: Path, head: NDArray[np.uint8], tail: NDArray[np.uint8], alloc: int, signs: set[bool]
) -> _Block | None:
    """Our block, after a check of it, and by its checksums of the tables `head` and `tail`; None for a file of another maker.

    signs: whether the descriptors say that the file is ours, with the footer's magic all or none of them: corruption of two of the
    three must not make it another maker's, whose tables nothing protects.
    """
    floor = len(head)
    footer = file.read(alloc - fmt.FOOTER.itemsize, fmt.FOOTER.itemsize if alloc - fmt.FOOTER.itemsize >= floor else 0)
    signs = signs | {bool(len(footer)) and footer[:8].tobytes() == fmt.FOOTER_MAGIC}
    if not any(signs):
        return None
    _require(all(signs) and alloc % 8 == 0, "the name block is corrupt")
    fields = footer.view(fmt.FOOTER)[0]
    _require(zlib.crc32(footer[:-4].tobytes()) == int(fields["footer_crc"]), "the name block's footer is corrupt")
    block, names, text = (int(fields[name]) for name in ("block_size", "names_size", "json_size"))
    start = alloc - block
    payload = block - fmt.FOOTER.itemsize
    _require(start >= floor and 0 <= payload - names - text < 8 and text <= fmt.MAX_JSON, "the name block does not fit")
    held = file.read(start, payload)
    _require(zlib.crc32(held.data) == int(fields["block_crc"]), "the name block is corrupt")
    revision = int(fields["revision"])
    if revision > fmt.REVISION:
        raise BetonError(f"{path}: written by a newer fastretina (footer revision {revision}), which is needed to read it")
    stored = fields["tables_crc"] if revision else fields["tables_sum"]
    found = (fmt.tables_crc if revision else fmt.tables_sum)(head, tail)
    _require(found == int(stored), "the sample tables are corrupt (checksum)")
    packing = fields["packing"].tobytes().hex() if fields["packing"].any() else ""
    return _Block(start, held[:names], held[names : names + text].tobytes(), packing)


def _check_extents(
    pointers: NDArray[np.uint64], starts: NDArray[np.uint64], sizes: NDArray[np.uint64], data: range, page: int, *, ordered: bool
) -> NDArray[np.uint64]:
    """The sizes of the samples at `pointers`, after a check that each lies inside its page and `data` (bytes), alone."""
    if not ordered and not bool((starts[1:] >= starts[:-1]).all()):
        order = np.argsort(starts, kind="stable")
        starts, sizes = starts[order], sizes[order]
    low, high = np.uint64(data.start), np.uint64(data.stop)
    _require(bool((starts >= low).all() and (starts < high).all()), "a sample lies outside the file's data")
    _require(int(sizes.min()) > 0 and bool((sizes <= high - starts).all()), "a sample is empty or reaches past the data")
    ends = starts + sizes
    _require(bool((ends[:-1] <= starts[1:]).all()), "samples overlap")
    ends -= np.uint64(1)
    ends ^= starts  # of the first and the last byte: below the page size where they are in one page
    _require(int(ends.max()) < page, "a sample straddles a page")
    if len(starts) != len(pointers) or not np.array_equal(starts, pointers):
        _require(not ordered, "metadata and allocation table disagree")
        rows = np.minimum(np.searchsorted(starts, pointers), len(starts) - 1)
        _require(bool((starts[rows] == pointers).all()), "a sample's pointer is not in the allocation table")
        sizes = sizes[rows]
    return sizes


def _check_images(
    modes: NDArray[np.uint8], widths: NDArray[np.uint16], heights: NDArray[np.uint16], sizes: NDArray[np.uint64]
) -> None:
    widest = int(max(widths.max(), heights.max()))
    _require(int(modes.max()) <= fmt.MODE_RAW, "an image of unknown mode")
    _require(int(min(widths.min(), heights.min())) > 0, "an image without pixels")
    _require(widest <= MAX_SIDE, f"an image of {widest} pixels a side; the limit is {MAX_SIDE}")
    raw = np.flatnonzero(modes == fmt.MODE_RAW)
    expected = widths[raw].astype(np.uint64) * heights[raw] * np.uint64(3)
    _require(bool((sizes[raw] == expected).all()), "raw pixels of the wrong size")
    # A sparse file may claim 2 GiB a sample, which each thread would allocate. Noise of quality 100 takes 4 bytes a pixel.
    large = np.flatnonzero(sizes > _EXTRA)
    most = widths[large].astype(np.uint64) * heights[large] * np.uint64(8) + np.uint64(_EXTRA)
    _require(bool((sizes[large] <= most).all()), "a JPEG of more bytes than its pixels can need")


def _pick(names: list[bytes], types: list[int], wanted: int, name: bytes) -> int:
    """Number of the field called `name`, or of the only one of its type."""
    found = [i for i, type_id in enumerate(types) if type_id == wanted]
    named = [i for i in found if names[i] == name]
    kind = "RGBImageField" if wanted == fmt.TYPE_IMAGE else "IntField"
    _require(bool(named) or len(found) == 1, f"{len(found)} fields of type {kind}, none of them called {name.decode()}")
    return (named or found)[0]


def _columns(*views: NDArray[Any]) -> list[NDArray[Any]]:
    """Contiguous copies of columns of one table, made block by block: its rows come from memory once, not once a column."""
    copies = [np.empty(len(view), view.dtype) for view in views]
    for begin in range(0, len(views[0]), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        for column, view in zip(copies, views, strict=True):
            column[block] = view[block]
    return copies
