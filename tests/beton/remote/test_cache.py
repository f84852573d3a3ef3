"""The cache keeps what is in use, lets the rest go by age, and trusts no corrupt file."""

from __future__ import annotations

import gc
import os
import time

import pytest
from remote_cases import SHARDS

from fastretina.beton.cache import CacheFolder
from fastretina.beton.paths import shard_path
from fastretina.errors import CacheError


def cached(folder: CacheFolder, name: str, content: bytes):
    return folder.file(name, len(content), lambda file: file.write(content, 0))


def test_the_least_recently_used_file_goes_first_and_an_open_one_never(folder, tmp_path):
    content = shard_path(folder / "train.beton", 0, SHARDS).read_bytes()
    space = CacheFolder(tmp_path / "cache", limit=3 * (len(content) + 4096))
    kept = cached(space, "a.beton", content)
    for name in ("b.beton", "c.beton", "b.beton", "d.beton"):
        cached(space, name, content)
        time.sleep(0.02)  # a file's time has the granularity of the kernel's clock
    assert sorted(path.name for path in space.path.glob("*.beton")) == ["a.beton", "b.beton", "d.beton"]
    others = [cached(space, name, content) for name in ("b.beton", "d.beton")]
    with pytest.raises(CacheError, match="in use"):
        cached(space, "e.beton", content)
    kept.verify(0)
    del others
    gc.collect()
    cached(space, "e.beton", content)
    assert (space.path / "a.beton").exists()
    assert space.used() <= space.limit


def test_a_corrupt_file_in_the_cache_is_fetched_again(folder, tmp_path):
    content = shard_path(folder / "train.beton", 0, SHARDS).read_bytes()
    space = CacheFolder(tmp_path / "cache", limit=1 << 30)
    cached(space, "a.beton", content).close()
    with (space.path / "a.beton").open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"12345")
    cached(space, "a.beton", content).verify(0)
    assert (space.path / "a.beton").read_bytes() == content
