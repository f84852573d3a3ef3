"""How many files this process may have open."""

from __future__ import annotations

import os
import resource

_OTHERS = 64  # that threads, pools and libraries open meanwhile


def allow_open_files(count: int) -> int | None:
    """Let this process open `count` more files, by raising its own limit as far as the system lets it. Returns None where they fit,
    else the system's limit."""
    try:
        now = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names alone
    except OSError:  # a container without /proc
        now = 0
    needed = now + count + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > hard != resource.RLIM_INFINITY:
        return hard
    if needed > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return None
