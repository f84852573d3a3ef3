"""Reading .beton files through fsspec: ranges of bytes, checked, tried again for a bounded time, and no byte kept that is wrong.

A file is fetched in two parts. Its tables come first and are a sparse file of their own, which `Beton` opens and checks as any
other: labels, names and the crc32 of every sample are then known. The samples follow in spans of 4 MiB, each compared with those
checksums before it is written, so that a broken connection costs one span, and what an interrupted fetch left is checked and used.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fastretina.beton import format as fmt
from fastretina.beton.cache import CachedBeton, Unfinished
from fastretina.beton.replies import WrongBytes
from fastretina.beton.waiting import Closing
from fastretina.errors import BetonError, CacheError, RemoteError
from fastretina.system.memory import available_bytes

SPAN = 4 << 20  # bytes of one request
_HEAD = 256 << 10  # bytes of the first request: all of the metadata of 6,000 samples
_PIECE = 4 << 20  # bytes of a request for tables
_MUCH = 64 << 20  # bytes of tables (a million samples) that nobody need ask the system about
_LONGEST_PAUSE = 5.0  # seconds between attempts
_LATER = (408, 425, 429)  # HTTP statuses of the 400s that say: try again
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Patience:
    """How long a server may take. The longest wait for one request is attempts * (timeout + 5) seconds."""

    attempts: int = 6
    timeout: float = 60.0  # seconds for one request of at most 4 MiB, or for what the server says about a file
    closing: Closing = field(default_factory=Closing)  # set by whoever does not want to wait any more

    def until(self, url: str, action: Callable[[], _Found]) -> _Found:
        """What `action` returns, after as many attempts as that takes, with growing pauses between them.

        Raises RemoteError with URL and reason after the last attempt, or at once where another cannot help (no such file, no
        permission), or when `closing` is set.
        """
        started = time.monotonic()
        for attempt in range(self.attempts):
            self.require_open(url)
            try:
                return action()
            except (RemoteError, CacheError):
                raise
            except Exception as error:  # whatever the client libraries raise for a server's faults
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                if _is_final(error):
                    raise RemoteError(url, f"cannot be read ({reason})") from None
            # Jitter: ranks that failed together should not come back together.
            if attempt + 1 < self.attempts:
                self.closing.wait(min(_LONGEST_PAUSE, 0.1 * 2**attempt) * random.uniform(0.5, 1))
        raise RemoteError(url, f"{reason}; gave up after {self.attempts} attempts in {time.monotonic() - started:.0f} s")

    def require_open(self, url: str) -> None:
        """RemoteError where `closing` is set."""
        if self.closing.is_set():
            raise RemoteError(url, "closed while it was read")

    def call(self, fs: Any, method: str, *given: Any, **named: Any) -> Any:
        """A method of a file system, ended after `timeout` seconds or when `closing` is set; local file systems just run."""
        if not getattr(fs, "async_impl", False):
            return getattr(fs, method)(*given, **named)
        future = asyncio.run_coroutine_threadsafe(getattr(fs, f"_{method}")(*given, **named), fs.loop)
        end = time.monotonic() + self.timeout
        try:
            while True:
                try:
                    return future.result(timeout=max(0.0, min(0.2, end - time.monotonic())))
                except concurrent.futures.TimeoutError:
                    if future.done():
                        raise  # a timeout of the client's own
                    if self.closing.is_set() or time.monotonic() >= end:
                        raise TimeoutError(f"no answer within {self.timeout:g} s") from None
        finally:
            future.cancel()  # also where Ctrl-C ends the waiting


def _is_final(error: BaseException) -> bool:
    """Whether the server's answer will stay the same. fsspec's HTTP calls everything "not found" that fails; its cause tells."""
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _LATER
    if type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError):
        return False
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server: `size` in bytes; `version`: the server's ETag, or the time of its last change, or nothing; `patience`:
    how long it is waited for."""

    fs: Any
    path: str  # as fsspec names it
    url: str
    size: int
    version: str
    patience: Patience

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop, in one attempt. Raises what the client raises, TimeoutError, WrongBytes if they are too few, and
        RemoteError where the server sends the whole file, which it would do again."""
        data = self.patience.call(self.fs, "cat_file", self.path, start=start, end=stop)
        if len(data) == self.size > stop - start:
            raise RemoteError(self.url, "the server ignores ranges, which are needed")
        if len(data) != stop - start:
            raise WrongBytes(f"{len(data)} bytes of {stop - start}")
        return bytes(data)

    def read_tables(self, start: int, stop: int) -> bytes:
        """Bytes start to stop, in as many requests and attempts as they take. RemoteError where that cannot be had."""
        if stop - start > _MUCH and 3 * (stop - start) > available_bytes():
            raise RemoteError(self.url, f"its tables of {stop - start:,} bytes do not fit in memory")
        parts = [(begin, min(begin + _PIECE, stop)) for begin in range(start, stop, _PIECE)]
        return b"".join([self.patience.until(self.url, partial(self.read, *part)) for part in parts])

    def until(self, action: Callable[[], _Found]) -> _Found:
        """As Patience.until; RemoteError at once where the bytes are wrong because the server has another file by now."""

        def attempt() -> _Found:
            try:
                return action()
            except Exception as error:
                # 416: it has become shorter.
                if isinstance(error, WrongBytes) or getattr(error, "status", None) == 416:
                    self.fs.invalidate_cache()
                    if _said_of(self.fs, self.path, self.patience) != (self.size, self.version):
                        raise RemoteError(self.url, "was replaced on the server; open the set again") from None
                raise

        return self.patience.until(self.url, attempt)


def _said_of(fs: Any, path: str, patience: Patience) -> tuple[int | None, str]:
    """Size and version of a file, in one attempt. Raises what the client raises."""
    found = patience.call(fs, "info", path)
    version = next((str(found[key]) for key in ("ETag", "etag", "Last-Modified", "LastModified", "mtime") if found.get(key)), "")
    size = found.get("size")
    return size if isinstance(size, int) and found.get("type") != "directory" else None, version


def look_up(fs: Any, path: str, url: str, patience: Patience) -> RemoteFile:
    """Size and version of a file. Raises RemoteError."""
    size, version = patience.until(url, lambda: _said_of(fs, path, patience))
    if size is None:
        raise RemoteError(url, "the server does not say how large it is, so that its tables cannot be found")
    return RemoteFile(fs, path, url, size, version, patience)


def fetch_tables(file: RemoteFile, target: Unfinished) -> None:
    """Write all but the samples to `target`, as long as the file and with a hole instead of them. Raises RemoteError."""

    def attempt() -> None:
        regions = list(_table_regions(file))
        target.resize(file.size)
        for start, data in regions:
            target.write(data, start)
        try:
            with target.opened() as beton:
                if beton.crcs is None:
                    raise RemoteError(file.url, "holds no checksums (made by FFCV?); download it and use it as a file")
        except BetonError as error:
            raise WrongBytes(str(error).removeprefix(f"{target.path}: ")) from None

    file.until(attempt)


def _table_regions(file: RemoteFile) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of header, descriptors and metadata, and of our block and the allocation table. Claims are bounded by the
    file's size; whether they are true is for `Beton` to say."""
    head = file.read_tables(0, min(_HEAD, file.size))
    if len(head) < fmt.HEADER.itemsize:
        raise WrongBytes("too short for a .beton")
    _, fields, _, count, alloc = (int(value) for value in np.frombuffer(head, fmt.HEADER, 1)[0])
    rows = fmt.HEADER.itemsize + fields * fmt.DESCRIPTOR.itemsize
    metadata = rows + count * fmt.metadata_dtype([type_id for _, type_id in fmt.OUR_FIELDS]).itemsize
    footer = alloc - fmt.FOOTER.itemsize
    if not 0 < metadata <= footer < alloc < file.size:
        raise WrongBytes("not a .beton of fastretina, or corrupt")
    if metadata > len(head):
        head += file.read_tables(len(head), metadata)
    # The block's size is known only from its footer; names of 24 bytes are guessed, and what is missing is asked for.
    start = max(metadata, footer - 24 * count - (64 << 10))
    tail = file.read_tables(start, file.size)
    size = int(np.frombuffer(tail[footer - start :], fmt.FOOTER, 1)[0]["block_size"])
    if not fmt.FOOTER.itemsize <= size <= alloc - metadata:
        raise WrongBytes("the name block does not fit")
    if alloc - size < start:
        tail, start = file.read_tables(alloc - size, start) + tail, alloc - size
    yield 0, head[:metadata]
    yield alloc - size, tail[alloc - size - start :]


def fetch_samples(file: RemoteFile, tables: CachedBeton, target: Unfinished) -> None:
    """Complete `target`, which may hold anything, from the tables and from the server. Raises RemoteError."""
    (starts, sizes), crcs = tables.extents, tables.crcs
    assert crcs is not None
    first, last = int(starts[0]), int(starts[-1] + sizes[-1])
    for start, stop in ((0, first), (last, file.size)):
        for offset in range(start, stop, SPAN):
            target.write(tables.read(offset, min(SPAN, stop - offset)).data, offset)

    def complete(samples: range) -> None:
        start, stop = int(starts[samples[0]]), int(starts[samples[-1]] + sizes[samples[-1]])

        def wrong(data: bytes) -> int | None:
            """The first of these samples whose bytes do not match; None where all do."""
            view = memoryview(data)
            return next((i for i in samples if zlib.crc32(view[starts[i] - start :][: sizes[i]]) != crcs[i]), None)

        def attempt() -> bytes:
            data = file.read(start, stop)
            if (bad := wrong(data)) is not None:
                raise WrongBytes(f"sample {bad} ({tables.names[bad]}) does not match its checksum")
            return data

        file.patience.require_open(file.url)
        if wrong(target.read(start, stop - start)) is not None:  # else an earlier fetch has left it
            target.write(file.until(attempt), start)

    bounds = [*np.flatnonzero(np.diff((starts - starts[0]) // SPAN, prepend=-1)).tolist(), len(starts)]
    for begin, end in itertools.pairwise(bounds):
        complete(range(begin, end))
