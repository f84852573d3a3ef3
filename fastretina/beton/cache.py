"""A folder of fetched files that stays within a limit and that any number of processes may share.

Three kinds of files: `NAME` is complete and checked; `NAME.tables` has the tables alone; `NAME.partial` is being fetched, or is
what a killed fetch left. Whoever writes or reads one holds a lock of the kernel's on it (flock: exclusive or shared), which ends
with the process, however that ends. The least recently opened file that nobody holds makes room for a new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastretina.beton.reader import Beton
from fastretina.errors import BetonError, CacheError
from fastretina.system.files import still_names, try_lock

_SHARE = 0.8  # of what the disk has left, where no limit is given
_STALE = 3600.0  # seconds after which a temporary file has no owner any more
_POLL = 0.05  # seconds between looks at a lock that another process holds


class CachedBeton(Beton):
    """A file of the cache, open, which is not evicted before it is closed or the last reference to this object is gone."""

    def __init__(self, path: Path, lock: int) -> None:
        """lock: the descriptor that holds it."""
        self._unlock = weakref.finalize(self, os.close, lock)
        super().__init__(path)

    def close(self) -> None:
        super().close()
        self._unlock()


@dataclass(frozen=True)
class CacheFolder:
    """limit: bytes that all files in the folder may take together."""

    path: Path
    limit: int

    @classmethod
    def at(cls, path: Path, limit: int | None) -> CacheFolder:
        """The folder, made if it is not there; without a limit, 80 % of what the disk has free and the folder holds already."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            if limit is None:
                disk = os.statvfs(path)
                limit = int(_SHARE * (disk.f_bavail * disk.f_frsize + cls(path, 0).used()))
        except OSError as error:
            raise CacheError(f"{path}: cannot be used as a cache folder: {error.strerror}") from None
        return cls(path, limit)

    def used(self) -> int:
        """Bytes on disk of all files."""
        return sum(blocks for _, blocks, _ in self._files())

    def tables(self, name: str, fetch: Callable[[Path], None]) -> CachedBeton:
        """The tables of a file, fetched into the path that `fetch` is given if they are not here."""
        path = self.path / f"{name}.tables"
        while (found := self._open(path)) is None:
            temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
            try:
                fetch(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return found

    def file(self, name: str, size: int, closing: threading.Event, fetch: Callable[[int], None]) -> CachedBeton:
        """A complete file; if it is not here, `fetch` is given the descriptor of one to fill, of which it must trust no byte.

        Raises CacheError where `size` bytes find no room.
        """
        path, partial = self.path / name, self.path / f"{name}.partial"
        while (found := self._open(path)) is None:
            descriptor = self._begin(path, partial, size, closing)
            if descriptor < 0:
                continue  # another process has finished it, or has given up
            try:
                fetch(descriptor)
                os.fsync(descriptor)
                partial.replace(path)
            except OSError as error:
                raise CacheError(f"{partial}: cannot be written: {error.strerror}") from None
            finally:
                os.close(descriptor)
        return found

    def _open(self, path: Path) -> CachedBeton | None:
        """The file if it is here, as the most recently used; one that is corrupt is removed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not still_names(path, descriptor):
            os.close(descriptor)
            return self._open(path)
        os.utime(descriptor)
        try:
            return CachedBeton(path, descriptor)
        except BetonError as error:
            if isinstance(error.__context__, OSError):
                raise  # too many open files, no permission: that is not the file's fault
            path.unlink(missing_ok=True)
            return None

    def _begin(self, path: Path, partial: Path, size: int, closing: threading.Event) -> int:
        """A descriptor of the partial file, locked, its bytes taken from the limit and the disk; -1: look again for the file."""
        descriptor, locked = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), False
        try:
            # A finished file keeps its locks when it is renamed, so that it must not be waited for.
            while not (locked := try_lock(descriptor)) and still_names(partial, descriptor):
                if closing.wait(_POLL):
                    raise CacheError(f"{partial}: closed while another process fetched it")
            if path.exists() or not (locked and still_names(partial, descriptor)):
                if locked and still_names(partial, descriptor):
                    partial.unlink()  # made by the line above, after the file was finished
                os.close(descriptor)
                return -1
            with self._bookkeeping():
                missing = size - os.fstat(descriptor).st_blocks * 512
                if missing > 0:
                    self._make_room(missing)
                os.ftruncate(descriptor, size)
                os.posix_fallocate(descriptor, 0, size)
            return descriptor
        except BaseException as error:
            if locked and os.fstat(descriptor).st_blocks == 0:
                partial.unlink(missing_ok=True)
            os.close(descriptor)
            if isinstance(error, OSError):
                reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
                raise CacheError(f"{partial}: {reason}") from None
            raise

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        """One process at a time looks at what there is and takes its part."""
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> None:
        files = sorted(self._files())
        used = sum(blocks for _, blocks, _ in files)
        for _, blocks, path in files:
            if used + size <= self.limit:
                return
            used -= blocks if _evict(path) else 0
        if used + size > self.limit:
            raise CacheError(
                f"{self.path}: no room for {size / 1e9:.3f} GB: {used / 1e9:.3f} of at most {self.limit / 1e9:.3f} GB are in use. "
                "Allow it more"
            )

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes on disk, path) of each."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                if re.search(r"\.(beton|tables|partial|tmp)$", entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        if entry.name.endswith(".tmp") and time.time() - found.st_mtime < _STALE:
                            continue  # nobody locks them
                        yield found.st_mtime, found.st_blocks * 512, Path(entry.path)


def _evict(path: Path) -> bool:
    """Remove a file unless somebody holds it."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not (try_lock(descriptor) and still_names(path, descriptor)):
                return False
            path.unlink()
        finally:
            os.close(descriptor)
    return True
