"""Free memory where nobody can say how much there is, as in a sandbox without /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastretina.system.memory import available_bytes

PAGES = "MemTotal: 100 kB\nMemFree: 7 kB\nMemAvailable:  12 kB\n"


@pytest.mark.parametrize("text", [None, "", "MemTotal: 100 kB\n", "MemAvailable:\n", "MemAvailable: much\n"], ids=repr)
def test_without_the_kernels_word_free_pages_count(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, *_: object) -> str:
        if text is None or path != Path("/proc/meminfo"):
            raise FileNotFoundError(2, "No such file or directory")
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_bytes() == 3 * 4096


def test_the_kernels_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {Path("/proc/meminfo"): PAGES, Path("/proc/self/cgroup"): "0::/a\n"}
    limits = {Path("/sys/fs/cgroup/a/memory.max"): "9000", Path("/sys/fs/cgroup/a/memory.current"): "1000"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[path])
    files |= limits
    assert available_bytes() == 8000
    files |= {Path("/sys/fs/cgroup/a/memory.max"): "max"}
    assert available_bytes() == 12 * 1024
