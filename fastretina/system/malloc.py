"""The C library's allocator, where it gives memory back to the kernel too soon. Imports no torch: the packing workers come here."""

from __future__ import annotations

import ctypes
import os
import platform

# Of glibc's malloc.h. Both are set: setting one ends glibc's own adjustment of the other.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = (1 << 31) - 1  # an int in C
_LARGEST = 1 << 30  # what is larger, such as a data set, has pages of its own, and leaves no hole
_ENVIRONMENT = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_"}


def keep_freed_memory(largest: int = _LARGEST, most: int = _MOST) -> bool:
    """From now on this process keeps what it frees, for its next arrays. Returns whether it does: where malloc is glibc's, and the
    environment says nothing of its thresholds.

    By itself glibc gives large arrays back, and the kernel clears all pages anew: of the activations of every step and every batch.
    ResNet18 in bfloat16, two threads of an AMD EPYC, images a second with over without, by interleaved runs: training in batches of
    16 1.17 and 1.38 at 96 px, 1.07 and 1.07 at 224 px; evaluation in batches of 16 and 64 1.03 to 1.33.

    Args:
        largest: bytes of an array that is kept. most: bytes that are kept at the heap's end.
    """
    told = _ENVIRONMENT & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or told:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, most) and mallopt(_M_MMAP_THRESHOLD, largest))
