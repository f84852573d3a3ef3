"""Shards on a server, through fsspec (https, s3, gs, file, ...) and a bounded local cache.

    with Loader("https://host/train-*-of-00064.beton", cache=Cache("/scratch/fastretina", limit=200_000_000_000)) as loader:

Opening fetches the tables of all shards and no sample. Whole shards are then fetched as the order needs them, the next ones while
the current ones are read, and read as local files.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.cache import CacheFolder
from fastretina.beton.fetch import Patience, RemoteFile, fetch_samples, fetch_tables, look_up
from fastretina.beton.paths import as_path
from fastretina.beton.reader import Beton
from fastretina.beton.shards import WINDOW, ShardedBeton, in_order, open_all
from fastretina.errors import CacheError, RemoteError, UsageError
from fastretina.system.process import OwnProcess

_NUMBERED = re.compile(r"\*(?=-of-(\d{5})\.)")
# A shard is done with when its last sample came so many before the first of the one that begins: threads are that far apart.
_SLACK = 256


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

    def open(self) -> CacheFolder:
        """The folder. Raises UsageError."""
        folder = self.folder or os.environ.get("FASTRETINA_CACHE") or Path("~/.cache/fastretina").expanduser()
        limit, gigabytes = self.limit, os.environ.get("FASTRETINA_CACHE_GB")
        if limit is None and gigabytes:
            try:
                limit = int(float(gigabytes) * 1e9)
            except ValueError:
                raise UsageError(f"FASTRETINA_CACHE_GB={gigabytes}: a number of gigabytes is needed") from None
        if self.streams < 1 or self.attempts < 1 or not self.timeout > 0 or (limit is not None and limit < 1):
            raise UsageError("streams, attempts, timeout and limit of a cache must be above 0")
        return CacheFolder.at(Path(folder), limit)


def open_remote(url: str, cache: Cache | None = None, **options: Any) -> RemoteBeton:
    """The shards that a URL with a pattern stands for, or one file, as one Beton.

    `*-of-00064.beton` stands for all 64 names and needs no listing; other patterns need a file system that lists. `options` go
    to fsspec's file system.

    Raises:
        RemoteError: by URL, what cannot be had from the server. BetonError: shards that are no set. UsageError: settings.
    """
    cache = cache or Cache()
    folder, patience = cache.open(), Patience(cache.attempts, cache.timeout)
    fs, urls = _expand(url, patience, options)

    def open_one(one: str) -> _Shard:
        file = look_up(fs, fs._strip_protocol(one), one, patience)
        # The version in the name: a file that was replaced on the server is another one here, and the old one gets evicted.
        key = hashlib.sha256(f"{one}\n{file.size}\n{file.version}".encode()).hexdigest()[:16]
        name = f"{key}-{PurePosixPath(urlsplit(one).path).name}"
        name = name if name.endswith(".beton") else f"{name}.beton"
        with folder.tables(name, partial(fetch_tables, file)) as tables:
            blocks = tables.path.stat().st_blocks
        tables.path = as_path(one)  # for messages; the tables are in memory now
        return _Shard(file, name, tables, 512 * blocks)

    shards = {id(shard.tables): shard for shard in open_all(urls, open_one)}
    tables: list[Beton] = [shard.tables for shard in shards.values()]
    ordered = in_order(as_path(url), tables) if _is_pattern(url) else tables
    shelf = Shelf([shards[id(one)] for one in ordered], folder, cache.streams, patience.closing)
    return RemoteBeton(url, ordered, shelf, partial(open_remote, url, cache, **options))


def _expand(url: str, patience: Patience, options: dict[str, Any]) -> tuple[Any, list[str]]:
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        raise RemoteError(url, f"needs more packages ({error}). Install them: pip install 'fastretina[remote]'") from None
    except ValueError as error:
        raise RemoteError(url, f"{error}") from None
    fs.invalidate_cache()  # of listings: the same process may have looked before the files were replaced
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


@dataclass(frozen=True)
class _Shard:
    file: RemoteFile
    name: str  # in the cache
    tables: Beton  # closed: all but the samples
    tables_bytes: int  # on disk

    def is_in(self, other: Beton) -> bool:
        """Whether another copy of the tables is the same: the server may have replaced the file without another ETag."""

        def columns(beton: Beton) -> list[NDArray[Any]]:
            return [beton.ids, beton.labels, np.asarray(beton.crcs), *beton.extents]

        return all(np.array_equal(a, b) for a, b in zip(columns(self.tables), columns(other), strict=True))


class RemoteBeton(ShardedBeton):
    """Shards on a server as one Beton: `shards` are their tables; samples come from whole shards in the cache.

    Reading a sample waits for its shard; RemoteError where that cannot be had. Read in an order that `expect` was told, shards are
    there before they are needed. In a child that was forked after the set was opened, RemoteError: the threads that fetch are not
    there.
    """

    def __init__(self, url: str, tables: Sequence[Beton], shelf: Shelf, opener: Callable[[], Beton]) -> None:
        super().__init__(url, tables, opener)
        self.url, self._shelf = url, shelf
        weakref.finalize(self._users, shelf.stop)  # when the last selection is forgotten, too

    def _shard(self, number: int) -> Beton:
        return self._shelf.get(number)

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


class Shelf:
    """The shards of a set that are open or on their way, by number.

    Which to fetch next and which to give up follows from the order that `expect` was told: the next to begin, and the one whose
    turn is furthest off.
    """

    def __init__(self, shards: Sequence[_Shard], folder: CacheFolder, streams: int, closing: threading.Event) -> None:
        """streams: shards to fetch at the same time, apart from those that somebody waits for. closing: ends the fetches soon."""
        self._shards, self._folder, self._streams, self.closing = shards, folder, streams, closing
        self._room = folder.limit - sum(shard.tables_bytes for shard in shards)
        self._fits = sum(shard.file.size for shard in shards) <= self._room
        self._process, self._lock = OwnProcess(), threading.Lock()
        self._open: dict[int, Beton] = {}  # read without the lock
        self._coming: dict[int, Future[Beton]] = {}
        self._threads: dict[int, threading.Thread] = {}  # daemons: nothing here is worth keeping a process for
        # Positions of each shard's first and last sample in the order; past its end and -1 where it has none.
        self._first, self._last = [0] * len(shards), [len(shards)] * len(shards)
        self._queue: list[int] = []  # shards still to begin, the next one last
        self._begun: set[int] = set()

    def get(self, number: int) -> Beton:
        """The complete shard, fetched if need be."""
        self._require_threads(number)
        found = self._open.get(number)
        if found is not None and number in self._begun:
            return found
        with self._lock:
            if number not in self._begun:
                self._begin(number)
            found = self._open.get(number)
            coming = None if found is not None else self._coming.get(number) or self._fetch(number)
        return found if coming is None else coming.result()  # type: ignore[return-value]

    def expect(self, first: list[int], last: list[int]) -> None:
        """The order that samples will be asked for in: for each shard the positions of its first and last."""
        self._require_threads(0)
        with self._lock:
            self._first, self._last, self._begun = first, last, set()
            self._queue = sorted((number for number, position in enumerate(last) if position >= 0), key=lambda k: -first[k])
            self._fill()

    def _require_threads(self, number: int) -> None:
        if not self._process.is_this:
            url = self._shards[number].file.url
            raise RemoteError(url, "its set was opened before the process was forked; open it in the process that reads it")

    def _begin(self, number: int) -> None:
        """A shard's first sample is asked for: give up what is done with, and fetch what comes next. Called with the lock."""
        self._begun.add(number)
        done = self._first[number] - _SLACK
        for other in [] if self._fits else [k for k in self._open if k in self._begun and self._last[k] < done]:
            del self._open[other]
        self._fill()

    def _fill(self) -> None:
        """Fetch the next shards as far as there is room, or room can be had from one whose turn is later."""
        while self._queue and len(self._coming) < self._streams and not self.closing.is_set():
            number = self._queue[-1]
            if number not in self._open and number not in self._coming:
                while self._held() + self._size(number) > self._room:
                    later = [k for k in self._open if k not in self._begun and self._first[k] > self._first[number]]
                    if not later or not self._begun:
                        return
                    del self._open[max(later, key=self._first.__getitem__)]
                self._fetch(number)
            self._queue.pop()

    def _size(self, number: int) -> int:
        return self._shards[number].file.size

    def _held(self) -> int:
        return sum(self._size(number) for number in {*self._open, *self._coming})

    def _fetch(self, number: int) -> Future[Beton]:
        future = self._coming[number] = Future()
        thread = threading.Thread(target=self._load, args=(number, future), name=f"fastretina-fetch-{number}", daemon=True)
        self._threads[number] = thread
        thread.start()
        return future

    def _load(self, number: int, future: Future[Beton]) -> None:
        found: Beton | BaseException
        try:
            found = self._cached(number)
        except BaseException as error:
            found = error
        with self._lock:
            del self._coming[number], self._threads[number]
            if isinstance(found, BaseException):
                future.set_exception(found)
            else:
                self._open[number] = found
                future.set_result(found)
            self._fill()

    def _cached(self, number: int) -> Beton:
        shard, file = self._shards[number], self._shards[number].file

        def fetch(descriptor: int) -> None:
            with self._folder.tables(shard.name, partial(fetch_tables, file)) as tables:
                if shard.is_in(tables):
                    fetch_samples(file, tables, descriptor)
                    return
            raise RemoteError(file.url, "was replaced on the server; open the set again")

        while True:
            try:
                found = self._folder.file(shard.name, file.size, self.closing, fetch)
                if shard.is_in(found):
                    return found
                found.path.unlink(missing_ok=True)  # of an older version that looked the same to the server
            except CacheError as error:
                if self.closing.is_set() or not self._give_up_one(number):
                    raise RemoteError(file.url, str(error)) from None

    def _give_up_one(self, number: int) -> bool:
        """Make room for a shard that somebody waits for: close the open one that is needed last, or wait for those on their way."""
        with self._lock:
            if number not in self._begun:
                return False  # it was to be here early, and must not push out what is in use
            if self._open:
                del self._open[max(self._open, key=lambda k: -1 if k in self._begun else self._first[k])]
                return True
            others = len(self._coming) > 1
        return others and not self.closing.wait(0.1)

    def check(self, sampling: str, url: str) -> None:
        """UsageError where reading in such an order would fetch shards again and again."""
        sizes = sorted(shard.file.size for shard in self._shards)
        needed = {"shards": sum(sizes[-WINDOW - 1 :]), "sequential": sum(sizes[-2:])}.get(sampling, sum(sizes))
        if needed > self._room:
            others = "" if sampling in ("shards", "sequential") else ", or read it with sampling='shards' (--sampling shards)"
            raise UsageError(
                f"{url}: sampling={sampling!r} needs {needed / 1e9:.3f} GB at a time, the cache {self._folder.path} has room for "
                f"{self._room / 1e9:.3f} GB: allow it more{others}"
            )

    def stop(self) -> None:
        """Have the fetches end soon. Nothing in a forked child, where the event's lock may stay held."""
        if self._process.is_this:
            self.closing.set()

    def close(self) -> None:
        """End the fetches, and let go of the files; what was half fetched goes on from there another time."""
        if not self._process.is_this:
            return
        self.stop()
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join()
        with self._lock:
            self._open.clear()
