"""Files made to mislead the reader of .beton files: each is refused with our error, and nothing is allocated for it.

They are files of another maker (no block, no checksum), so that each check of the reader stands alone.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_reader import stub_jpeg

from fastretina.beton import format as fmt
from fastretina.beton.reader import Beton
from fastretina.errors import BetonError


def foreign(count: int = 3, size: int = 100, page: int = 1 << 21) -> dict[str, np.ndarray]:
    """The parts of a valid file as FFCV writes it: one image field, one int field."""
    header, fields = np.zeros(1, fmt.HEADER), np.zeros(2, fmt.DESCRIPTOR)
    fields["type_id"], fields["name"] = [2, 1], [b"image", b"label"]
    metadata = np.zeros(count, fmt.metadata_dtype([2, 1]))
    table = np.zeros(count, fmt.ALLOCATION)
    pointers = page + size * np.arange(count)
    metadata["f0"]["width"] = metadata["f0"]["height"] = 8
    metadata["f0"]["data_ptr"] = table["ptr"] = pointers
    table["size"], table["sample_id"] = size, np.arange(count)
    header[0] = (2, 2, page, count, page + size * count)
    return {"header": header, "fields": fields, "metadata": metadata, "table": table}


def save(path: Path, parts: dict[str, np.ndarray], page: int = 1 << 21) -> Path:
    head = b"".join(parts[key].tobytes() for key in ("header", "fields", "metadata"))
    body = stub_jpeg(0, 100, 8, 8) * len(parts["metadata"])
    table = int(parts["header"]["alloc_table_ptr"][0])
    path.write_bytes(head.ljust(page, b"\0") + body + parts["table"].tobytes())
    if page < table < 1 << 32:  # a sparse file
        with path.open("r+b") as file:
            file.truncate(table)
            file.seek(table)
            file.write(parts["table"].tobytes())
    return path


def test_a_file_of_another_maker_is_read(tmp_path: Path) -> None:
    with Beton(save(tmp_path / "f.beton", foreign())) as beton:
        assert len(beton) == 3
        assert beton.crcs is None
        assert beton.ids.tolist() == [0, 1, 2]
        assert list(beton.names) == ["sample 0", "sample 1", "sample 2"]
        assert beton.provenance == {}
        beton.verify(2)


def edit(
    part: str, field: str, value: object, index: int | slice = 0, inner: str | None = None
) -> Callable[[dict[str, np.ndarray]], None]:
    def change(parts: dict[str, np.ndarray]) -> None:
        array = parts[part] if inner is None else parts[part][inner]
        array[field][index] = value

    return change


def malicious_gibibyte(parts: dict[str, np.ndarray]) -> None:
    """The last sample, in a sparse file."""
    parts["header"]["page_size"], parts["table"]["size"][2] = 1 << 31, 1 << 30
    parts["header"]["alloc_table_ptr"] = parts["table"]["ptr"][2] + (1 << 30)


MALICIOUS: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
    "2^63 samples": edit("header", "num_samples", 1 << 63),
    "2^64 - 1 samples": edit("header", "num_samples", (1 << 64) - 1),
    "no samples": edit("header", "num_samples", 0),
    "more samples than rows": edit("header", "num_samples", 4),
    "page size 0": edit("header", "page_size", 0),
    "page size no power of two": edit("header", "page_size", (1 << 21) + 1),
    "page size tiny": edit("header", "page_size", 4096),
    "table at 0": edit("header", "alloc_table_ptr", 0),
    "table past the end": edit("header", "alloc_table_ptr", 1 << 40),
    "table at 2^64 - 1": edit("header", "alloc_table_ptr", (1 << 64) - 1),
    "no fields": edit("header", "num_fields", 0),
    "65,535 fields": edit("header", "num_fields", 65_535),
    "version 1": edit("header", "version", 1),
    "version 3": edit("header", "version", 3),
    "unknown field type": edit("fields", "type_id", 77),
    "custom field type": edit("fields", "type_id", 255),
    "no image field": edit("fields", "type_id", 1),
    "no int field": edit("fields", "type_id", 0, 1),
    "pointer past the end": edit("table", "ptr", 1 << 40, 1),
    "pointer wraps": edit("table", "ptr", (1 << 64) - 50, 1),
    "pointer into the header": edit("table", "ptr", 10, 0),
    "size past the end": edit("table", "size", 1 << 20, 2),
    "size wraps": edit("table", "size", (1 << 64) - 100, 2),
    "size 0": edit("table", "size", 0, 1),
    "overlap": edit("table", "size", 101, 1),
    "two samples share their bytes": edit("table", "ptr", 1 << 21, 1),
    "metadata points elsewhere": edit("metadata", "data_ptr", (1 << 21) + 1, 1, "f0"),
    "width 65,535": edit("metadata", "width", 65_535, 1, "f0"),
    "width 0": edit("metadata", "width", 0, 1, "f0"),
    "mode 2": edit("metadata", "mode", 2, 1, "f0"),
    "a JPEG of 1 GiB": malicious_gibibyte,
    "raw pixels of the wrong size": edit("metadata", "mode", 1, 1, "f0"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_files_are_refused_without_allocating(name: str, tmp_path: Path) -> None:
    parts = foreign()
    MALICIOUS[name](parts)
    path = save(tmp_path / "malicious.beton", parts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BetonError, match=r"malicious\.beton: "):
        Beton(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_sample_across_pages_is_refused(tmp_path: Path) -> None:
    parts = foreign(count=3)
    parts["header"]["page_size"] = 1 << 21
    head = b"".join(parts[key].tobytes() for key in ("header", "fields", "metadata"))
    start = (2 << 21) - 150
    parts["header"]["alloc_table_ptr"] = start + 300
    parts["metadata"]["f0"]["data_ptr"] = parts["table"]["ptr"] = start + 100 * np.arange(3)
    head = b"".join(parts[key].tobytes() for key in ("header", "fields", "metadata"))
    path = tmp_path / "straddle.beton"
    path.write_bytes(head.ljust(start + 300, b"\0") + parts["table"].tobytes())
    with pytest.raises(BetonError, match="straddles"):
        Beton(path)


def test_a_sparse_file_of_tables_without_end_is_refused_before_they_are_read(tmp_path: Path) -> None:
    parts, count = foreign(), 10**10
    start = 24 + 2 * fmt.DESCRIPTOR.itemsize
    parts["header"][0] = (2, 2, 1 << 21, count, start + 25 * count)
    path = save(tmp_path / "sparse.beton", parts)
    os.truncate(path, start + 49 * count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BetonError, match=r"sparse\.beton: its tables of 480,000,002,106 bytes do not fit in memory"):
        Beton(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
