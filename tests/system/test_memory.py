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


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a\n", {"a/memory.max": "9000", "a/memory.current": "1000"}, 8000),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "1000"}, 12 * 1024),
        ("0::/a\n", {"a/memory.max": "nonsense", "a/memory.current": "1000"}, 12 * 1024),
        ("0::/a\n", {}, 12 * 1024),
        ("", {}, 12 * 1024),
        # The job is limited, its task is not; or both are.
        ("0::/job/task\n", {"job/task/memory.max": "max", "job/memory.max": "9000", "job/memory.current": "2000"}, 7000),
        (
            "0::/job/task\n",
            {"job/task/memory.max": "900", "job/task/memory.current": "0", "job/memory.max": "700", "job/memory.current": "1"},
            699,
        ),
        # Pages of files that were read are no reason to have no room.
        ("0::/a\n", {"a/memory.max": "9000", "a/memory.current": "8000", "a/memory.stat": "anon 1\ninactive_file 5000\n"}, 6000),
        # Version 1; and as a container sees it, whose own group is at the root.
        ("9:memory:/a\n0::/a\n", {"memory/a/memory.limit_in_bytes": "5000", "memory/a/memory.usage_in_bytes": "100"}, 4900),
        (
            "9:cpu,memory:/docker/x\n",
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "100",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            4950,
        ),
        (
            "9:memory:/a\n",
            {"memory/a/memory.limit_in_bytes": "9223372036854771712", "memory/a/memory.usage_in_bytes": "1"},
            12 * 1024,
        ),
        (
            "9:cpuset:/a\n1:name=systemd:/a\n",
            {"memory/a/memory.limit_in_bytes": "5", "memory/a/memory.usage_in_bytes": "0"},
            12 * 1024,
        ),
    ],
)
def test_the_tightest_limit_of_all_control_groups_around_counts(
    groups: str, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {Path("/proc/meminfo"): PAGES, Path("/proc/self/cgroup"): groups}
    known |= {Path("/sys/fs/cgroup") / name: text for name, text in files.items()}

    def read(path: Path) -> str:
        if path not in known:
            raise FileNotFoundError(2, "No such file or directory")
        return known[path]

    monkeypatch.setattr(Path, "read_text", read)
    assert available_bytes() == expected
