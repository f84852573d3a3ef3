"""How much RAM this process may still take. Imports no torch: the packing workers come here."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Free RAM in bytes without swapping: the kernel's MemAvailable, or what the container's limit leaves if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):  # a sandbox without /proc: what is free, caches not counted
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available, _container_headroom())


def _container_headroom() -> int:
    """Bytes left under the memory limit of the innermost control group (version 2), or a huge number where none is set."""
    unlimited = 1 << 62
    try:
        relative = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = _CGROUP / relative.lstrip("/")
        limit = (group / "memory.max").read_text().strip()
        return unlimited if limit == "max" else int(limit) - int((group / "memory.current").read_text())
    except (OSError, ValueError, StopIteration):
        return unlimited
