"""A file system that is soon full: a tmpfs in a mount name space of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def on_small_disk(folder: Path, size: str, *command: object, then: str = "") -> list[str]:
    """`command`, to be run with a tmpfs of that size mounted at the folder; then: shell code to run after it. Skips the test where
    mounting is not allowed."""
    apart = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} none '{folder}'"
    try:
        allowed = subprocess.run([*apart, mount], capture_output=True, timeout=60).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a tmpfs is not allowed here")
    return [*apart, f'{mount} && "$@"; code=$?; {then or ":"}; exit $code', "sh", *map(str, command)]
