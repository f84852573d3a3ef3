"""How much RAM this process may still take. Imports no torch: the packing workers come here."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 62


def available_bytes() -> int:
    """Free RAM in bytes without swapping: the kernel's MemAvailable, or what the container's limit leaves if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):  # a sandbox without /proc: what is free, caches not counted
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available, _container_headroom())


def _container_headroom() -> int:
    """Bytes left under the tightest memory limit of this process's control groups and those around them: a batch system limits the
    job, and its steps and tasks are groups within. A huge number where none is set."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return _UNLIMITED
    least = _UNLIMITED
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the one outside; what is mounted at the root is then its own group.
        group = PurePosixPath(path.lstrip("/"))
        least = min(least, *(_headroom(root / part, *names) for part in (group, *group.parents)))
    return least


def _headroom(group: Path, limit: str, usage: str, cache: str) -> int:
    """Bytes left in one group. cache: the line of memory.stat that counts pages of files, which the kernel gives up if it must."""
    try:
        allowed = (group / limit).read_text().strip()
        if allowed == "max":
            return _UNLIMITED
        left = int(allowed) - int((group / usage).read_text())
    except (OSError, ValueError):
        return _UNLIMITED
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return left + int(stat[cache])
    except (OSError, ValueError, KeyError):
        return left
