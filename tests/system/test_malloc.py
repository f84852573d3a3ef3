"""What glibc does with memory that is freed, counted in pages that the kernel had to bring."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")

# Three arrays of 24 MB at a time, as a step's activations, ten times; the pages that the first time brings, and the last.
CODE = """
import resource, sys
from fastretina.system.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
else:
    print(None)
for step in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [b"x" * (24 << 20) for _ in range(3)]
    del arrays
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str, **environment: str) -> tuple[str, int, int]:
    """What `keep_freed_memory` said, and the pages of the first and the last step."""
    run = subprocess.run(
        [sys.executable, "-c", CODE, how],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), **environment},
    )
    said, first, *_, last = run.stdout.split()
    return said, int(first), int(last)


def test_what_is_freed_is_kept() -> None:
    said, first, last = pages("keep")
    assert said == "True"
    assert last < first / 10
    assert last < pages("leave")[2] / 10


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072:glibc.malloc.mmap_threshold=131072"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_environment_says_stands(environment: dict[str, str]) -> None:
    said, first, last = pages("keep", **environment)
    assert said == "False"
    assert last > first / 2
