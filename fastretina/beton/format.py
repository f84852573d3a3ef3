"""The layout of a .beton file: FFCV's version 2 with a block of our own. Types, magic numbers, limits, the tables' checksum.

    header 24 B | one descriptor of 1,041 B per field | metadata rows | ... pages of samples ... | our block | allocation table

docs/format.md describes every byte.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

VERSION = 2
MODE_JPEG, MODE_RAW = 0, 1
MIN_PAGE, DEFAULT_PAGE, MAX_PAGE = 1 << 21, 1 << 23, 1 << 31  # bytes, powers of two; FFCV's own limits
MAX_FIELDS = 64

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
TYPE_INT, TYPE_IMAGE = 1, 2
# FFCV's type number -> what a metadata row holds of it: float, int, image, bytes, ndarray, JSON, tensor
METADATA = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE, 3: _BYTES, 4: np.dtype("<u8"), 5: _BYTES, 6: np.dtype("<u8")}

OUR_FIELDS = ((b"image", TYPE_IMAGE), (b"label", TYPE_INT), (b"id", TYPE_INT), (b"crc32", TYPE_INT))
# Stands in the first descriptor's arguments, which FFCV ignores: with the footer's magic a second sign that the file is
# ours, so that no single flipped bit can turn it into a foreign file whose tables nothing protects.
MARKER = b"fastretina.beton.1\0"
PACKING_BYTES = 12  # the id of a packing that its shards share; zeros where it is unknown
FOOTER = np.dtype(
    [
        ("magic", "S8"),
        ("block_size", "<u8"),
        ("names_size", "<u8"),
        ("json_size", "<u8"),
        ("block_crc", "<u4"),
        ("tables_sum", "<u4"),
        ("tables_crc", "<u4"),
        ("packing", "u1", (PACKING_BYTES,)),
        ("revision", "<u4"),
        ("footer_crc", "<u4"),
    ]
)
FOOTER_MAGIC = b"FRETINA1"
# Of the footer. 0: its last 20 bytes before the crc are zeros, tables are protected by `tables_sum` alone. 1: by `tables_crc`; the
# older sum is written as well, so that programs from before it read such a file too.
REVISION = 1
MAX_JSON = 1 << 20

_WORDS = 512  # 4 KiB
_WEIGHTS = np.arange(1, 2 * _WORDS, 2, dtype=np.uint64)


def metadata_dtype(type_ids: Sequence[int]) -> np.dtype[np.void]:
    """The dtype of a metadata row for fields of these types, laid out as FFCV does (C alignment; the image is packed)."""
    return np.dtype([(f"f{i}", METADATA[type_id]) for i, type_id in enumerate(type_ids)], align=True)


def tables_crc(*regions: NDArray[np.uint8]) -> int:
    """CRC-32 of byte regions, one after the other: finds any two flipped bits in 512 MB, any change within 32 bits, and all but one
    in 2^32 of other changes. 61 MB (a million samples) take 15 ms."""
    crc = 0
    for region in regions:
        crc = zlib.crc32(region.data, crc)
    return crc


def tables_sum(*regions: NDArray[np.uint8]) -> int:
    """The checksum of files of footer revision 0: CRC-32 over one sum per 4 KiB, of 64-bit words times odd weights.

    Finds one flipped bit, and two words that swap places, but not two flips of the highest bits of words in one block: 2^63 times
    any odd weight is 2^63, and two of those are 0.
    """
    crc = 0
    for region in regions:
        whole = len(region) // (8 * _WORDS) * (8 * _WORDS)
        tail = np.zeros(8 * _WORDS, dtype=np.uint8)
        tail[: len(region) - whole] = region[whole:]
        for part in (region[:whole], tail):
            crc = zlib.crc32((part.view("<u8").reshape(-1, _WORDS) @ _WEIGHTS).astype("<u8", copy=False).tobytes(), crc)
    return crc
