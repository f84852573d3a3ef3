"""Shards on a server, through fsspec (https, s3, gs, file, ...) and a bounded local cache.

    with Loader("https://host/train-*-of-00064.beton", cache=Cache("/scratch/fastretina", limit=200_000_000_000)) as loader:

Opening fetches the tables of all shards and no sample. Whole shards are then fetched as the order needs them, the next ones while
the current ones are read, and read as local files.
"""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.cache import CacheFolder
from fastretina.beton.fetch import Patience, fetch_tables, look_up
from fastretina.beton.paths import as_path
from fastretina.beton.reader import Beton
from fastretina.beton.replies import bound_replies
from fastretina.beton.shards import ShardedBeton, in_order, open_all
from fastretina.beton.shelf import Shard, Shelf
from fastretina.beton.waiting import Closing
from fastretina.errors import RemoteError, UsageError

_NUMBERED = re.compile(r"\*(?=-of-(\d{5})\.)")


@dataclass(frozen=True)
class Cache:
    """Where shards from a server are kept, and how long it may take to answer."""

    folder: str | os.PathLike[str] | None = None
    """None: $FASTRETINA_CACHE, or ~/.cache/fastretina. Any number of processes may share it."""
    limit: int | None = None
    """Bytes that all files in it may take; None: $FASTRETINA_CACHE_GB, or 80 % of what the disk has free."""
    streams: int = 4
    """Shards that are fetched at the same time."""
    attempts: int = 6
    """For each request, with growing pauses."""
    timeout: float = 60.0
    """Seconds for each request (4 MiB at most)."""

    def open(self, closing: Closing) -> CacheFolder:
        """The folder; `closing` ends waiting for others that use it. Raises UsageError and CacheError."""
        folder = self.folder or os.environ.get("FASTRETINA_CACHE") or Path("~/.cache/fastretina").expanduser()
        limit, gigabytes = self.limit, os.environ.get("FASTRETINA_CACHE_GB")
        if limit is None and gigabytes:
            try:
                limit = int(float(gigabytes) * 1e9)
            except ValueError:
                raise UsageError(f"FASTRETINA_CACHE_GB={gigabytes}: a number of gigabytes is needed") from None
        if self.streams < 1 or self.attempts < 1 or not self.timeout > 0 or (limit is not None and limit < 1):
            raise UsageError("streams, attempts, timeout and limit of a cache must be above 0")
        return CacheFolder(Path(folder), limit, closing)


def open_remote(url: str, cache: Cache | None = None, **options: Any) -> RemoteBeton:
    """The shards that a URL with a pattern stands for, or one file, as one Beton.

    `*-of-00064.beton` stands for all 64 names and needs no listing; other patterns need a file system that lists. `options` go
    to fsspec's file system.

    Raises:
        RemoteError: by URL, what cannot be had from the server. BetonError: shards that are no set. UsageError: settings.
    """
    cache = cache or Cache()
    patience = Patience(cache.attempts, cache.timeout)
    folder = cache.open(patience.closing)
    fs, urls = _expand(url, patience, options)

    def open_one(one: str) -> Shard:
        file = look_up(fs, fs._strip_protocol(one), one, patience)
        # The version in the name: a file that was replaced on the server is another one here, and the old one gets evicted.
        key = hashlib.sha256(f"{one}\n{file.size}\n{file.version}".encode()).hexdigest()[:16]
        name = f"{key}-{PurePosixPath(urlsplit(one).path).name}"
        name = name if name.endswith(".beton") else f"{name}.beton"
        with folder.tables(name, partial(fetch_tables, file)) as tables:
            on_disk = tables.disk_bytes
        tables.path = as_path(one)  # for messages; the tables are in memory now
        return Shard(file, name, tables, on_disk)

    shards = {id(shard.tables): shard for shard in open_all(urls, open_one, patience.closing.set)}
    tables: list[Beton] = [shard.tables for shard in shards.values()]
    ordered = in_order(as_path(url), tables) if _is_pattern(url) else tables
    shelf = Shelf([shards[id(one)] for one in ordered], folder, cache.streams, patience)
    return RemoteBeton(url, ordered, shelf, partial(open_remote, url, cache, **options))


def _expand(url: str, patience: Patience, options: dict[str, Any]) -> tuple[Any, list[str]]:
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(url, skip_instance_cache=True, **options)
        bound_replies(fs)
    except ImportError as error:
        raise RemoteError(url, f"needs more packages ({error}). Install them: pip install 'fastretina[remote]'") from None
    except (ValueError, RuntimeError) as error:  # the second where no thread can be started
        raise RemoteError(url, f"{error}") from None
    numbered = _NUMBERED.search(url)
    if numbered is not None:
        return fs, [_NUMBERED.sub(f"{number:05d}", url) for number in range(int(numbered[1]))]
    if not _is_pattern(url):
        return fs, [url]
    found = patience.until(url, lambda: sorted(patience.call(fs, "glob", path)))
    if not found:
        raise RemoteError(url, "no file matches, or the server cannot list; give the number of shards: train-*-of-00064.beton")
    return fs, [fs.unstrip_protocol(one) for one in found]


def _is_pattern(url: str) -> bool:
    return "*" in url  # "?" begins a query


class RemoteBeton(ShardedBeton):
    """Shards on a server as one Beton: `shards` are their tables; samples come from whole shards in the cache.

    Reading a sample waits for its shard; RemoteError where that cannot be had. Read in an order that `expect` was told, shards are
    there before they are needed. In a child that was forked after the set was opened, RemoteError: the threads that fetch are not
    there.
    """

    def __init__(self, url: str, tables: Sequence[Beton], shelf: Shelf, opener: Callable[[], Beton]) -> None:
        super().__init__(url, tables, opener)
        self.url, self._shelf, self._interrupted = url, shelf, False
        weakref.finalize(self._users, shelf.stop)  # when the last selection is forgotten, too

    def _shard(self, number: int) -> Beton:
        return self._shelf.get(number, self._is_given_up)

    def _is_given_up(self) -> bool:
        return self._closed or self._interrupted

    def interrupt(self) -> None:
        """Have reads that wait for the server fail soon, also those to come. Other selections of the set read on."""
        self._interrupted = True

    def check_order(self, sampling: str) -> None:
        self._shelf.check(sampling, self.url)

    def expect(self, indices: NDArray[np.int64]) -> None:
        numbers, _ = self.shard_of(indices)
        first, last = np.full(len(self.shards), len(numbers)), np.full(len(self.shards), -1)
        first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # the last assignment to a number is the one that stays
        last[numbers] = np.arange(len(numbers))
        self._shelf.expect(first.tolist(), last.tolist())

    def _close_files(self) -> None:
        self._shelf.close()
        super()._close_files()
