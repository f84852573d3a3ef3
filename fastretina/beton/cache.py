"""A folder of fetched files that stays within a limit and that any number of processes may share.

Three kinds of files: `NAME` is complete and checked; `NAME.tables` has the tables alone; `NAME.partial` is being fetched, or is
what a killed fetch left. Whoever writes or reads one holds a lock of the kernel's on it (flock: exclusive or shared), which ends
with the process, however that ends. The least recently opened file that nobody holds makes room for a new one.

Others may write to the folder, too. Its files are opened in the folder that was opened at first, wherever its path leads by then,
and never through a link; what is to be written must have no other name. Whatever the system refuses is a CacheError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.file import OpenFile
from fastretina.beton.reader import Beton
from fastretina.beton.waiting import POLL, Closing
from fastretina.errors import BetonError, CacheError
from fastretina.system.files import try_lock

_SHARE = 0.8  # of what the disk has left, where no limit is given
_CLOCK = 60.0  # seconds that another machine's clock may be ahead
_OWN_FOLDER = ". Give a cache folder of your own: FASTRETINA_CACHE=DIR, or Cache(DIR)"
# By errno: the reason, where that is not the system's, and the way out.
_REFUSED = {
    errno.EACCES: ("", _OWN_FOLDER),
    errno.EPERM: ("", _OWN_FOLDER),
    errno.EROFS: ("", _OWN_FOLDER),
    errno.ELOOP: ("a symbolic link, which no cache makes", "; remove it"),
    errno.EISDIR: ("a folder, not a file", "; remove it"),
    errno.ENOENT: ("", ": was the folder removed? Open the set again"),
}


class NoRoom(CacheError):
    """Nothing that ends with the process: others may let go of what is missing."""


class CachedBeton(Beton):
    """A file of the cache, open, which is not evicted before it is closed or the last reference to this object is gone."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """descriptor: of the file, locked; it is this object's to close."""
        self._descriptor = descriptor
        super().__init__(path)

    def _opened(self) -> OpenFile:
        return OpenFile(self.path, self._descriptor)

    def read(self, start: int, size: int) -> NDArray[np.uint8]:
        """Bytes of the file (uint8), as they are. Raises BetonError and OSError."""
        assert self._file is not None
        return self._file.read(start, size)

    @property
    def disk_bytes(self) -> int:
        """That it takes."""
        return _on_disk(os.fstat(self._descriptor))


class Unfinished:
    """A file of the cache that is being filled. What the system refuses is a CacheError.

    path: its name for now.
    """

    def __init__(self, folder: CacheFolder, name: str, descriptor: int) -> None:
        self.path, self._reported, self._descriptor = folder.path / name, partial(folder._reported, name), descriptor

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` on, or fewer at its end."""
        with self._reported():
            return os.pread(self._descriptor, size, start)

    def write(self, data: bytes | memoryview, start: int) -> None:
        """All of `data` at byte `start`."""
        view = memoryview(data)
        with self._reported():
            while view:
                done = os.pwrite(self._descriptor, view, start)
                view, start = view[done:], start + done

    def resize(self, size: int) -> None:
        """To `size` bytes, with a hole where nothing was written."""
        with self._reported():
            os.ftruncate(self._descriptor, size)

    def opened(self) -> CachedBeton:
        """What it holds by now. Raises BetonError."""
        with self._reported():
            return CachedBeton(self.path, os.dup(self._descriptor))


class CacheFolder:
    """Attributes:
    path: as it was given. limit: bytes that all files in the folder may take together.
    """

    def __init__(self, path: Path, limit: int | None, closing: Closing | None = None) -> None:
        """The folder, made if it is not there. limit: None for 80 % of what the disk has free and the folder holds already.
        closing: ends waiting for other processes, with a CacheError."""
        self.path, self._closing = path, closing or Closing()
        with self._reported():
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            if limit is None:
                disk = os.fstatvfs(self._descriptor)
                limit = int(_SHARE * (disk.f_bavail * disk.f_frsize + self.used()))
        self.limit = limit

    def used(self) -> int:
        """Bytes on disk of all files."""
        return sum(blocks for *_, blocks, _ in self._files())

    def tables(self, name: str, fetch: Callable[[Unfinished], None]) -> CachedBeton:
        """The tables of a file; if they are not here, `fetch` is given an empty one to fill. Raises CacheError."""
        name = f"{name}.tables"
        while (found := self._open(name)) is None:
            temporary = f"{name}.{secrets.token_hex(8)}.tmp"
            with self._reported(temporary):
                descriptor = self._open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                try:
                    if try_lock(descriptor) and self._still_names(temporary, descriptor):  # else it was evicted
                        fetch(Unfinished(self, temporary, descriptor))
                        self._publish(temporary, name, descriptor)
                finally:
                    with suppress(FileNotFoundError):
                        os.unlink(temporary, dir_fd=self._descriptor)
                    os.close(descriptor)
        return found

    def file(self, name: str, size: int, fetch: Callable[[Unfinished], None]) -> CachedBeton:
        """A complete file; if it is not here, `fetch` is given one to fill, of which it must trust no byte.

        Raises CacheError where `size` bytes find no room, or the folder cannot be used.
        """
        unfinished = f"{name}.partial"
        while (found := self._open(name)) is None:
            with self._reported(unfinished):
                descriptor = self._begin(name, unfinished, size)
                if descriptor < 0:
                    continue  # another process has finished it, or has given up
                try:
                    fetch(Unfinished(self, unfinished, descriptor))
                    self._publish(unfinished, name, descriptor)
                finally:
                    os.close(descriptor)
        return found

    def remove(self, name: str) -> None:
        """Remove a file that is not what it should be. CacheError."""
        with self._reported(name), suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    @contextmanager
    def _reported(self, name: str = "") -> Iterator[None]:
        """What the system refuses to do with a file of the folder, or with the folder."""
        path = self.path / name
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
                raise NoRoom(f"{path}: {error.strerror}") from None
            reason, way_out = _REFUSED.get(error.errno or 0, (error.strerror, ""))
            raise CacheError(f"{path}: cannot be used in a cache: {reason or error.strerror}{way_out}") from None

    def _open_file(self, name: str, flags: int) -> int:
        """The descriptor of a file in the folder. OSError where it is none, or is to be written and has another name, too."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # the second for FIFOs, which would be waited for
        descriptor = os.open(name, flags, 0o666, dir_fd=self._descriptor)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and (found.st_nlink <= 1 or not flags & os.O_RDWR):
            return descriptor
        os.close(descriptor)
        reason = "it has another name, too, which no cache gives" if stat.S_ISREG(found.st_mode) else "not a file"
        raise OSError(errno.EINVAL, f"{reason}; remove it")

    def _still_names(self, name: str, descriptor: int) -> bool:
        """Whether the name is the open file's: between opening and locking it, it may have been renamed or removed."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))

    def _publish(self, temporary: str, name: str, descriptor: int) -> None:
        """Give a complete file its name, once it is on disk."""
        os.fsync(descriptor)
        if not self._still_names(temporary, descriptor):
            raise OSError(errno.ESTALE, "was replaced while it was written")
        os.rename(temporary, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def _wait_for(self, what: Callable[[], bool], name: str) -> None:
        while not what():
            if self._closing.wait(POLL):
                raise CacheError(f"{self.path / name}: closed while another process had it")

    def _open(self, name: str) -> CachedBeton | None:
        """The file if it is here, as the most recently used; one that is corrupt is removed."""
        while True:
            with self._reported(name):
                try:
                    descriptor = self._open_file(name, os.O_RDONLY)
                except FileNotFoundError:
                    return None
                try:
                    self._wait_for(partial(_try_share, descriptor), name)
                    named = self._still_names(name, descriptor)
                    with suppress(OSError):  # another user's, or on a disk that is read-only: then its use is not noted
                        os.utime(descriptor)
                except BaseException:
                    os.close(descriptor)
                    raise
            if not named:
                os.close(descriptor)
                continue
            try:
                return CachedBeton(self.path / name, descriptor)
            except BetonError as error:
                if isinstance(error.__context__, OSError):
                    raise  # a disk error, too many open files: that is not the file's fault
            self.remove(name)

    def _begin(self, name: str, unfinished: str, size: int) -> int:
        """A descriptor of the unfinished file, locked, its bytes taken from the limit and the disk; -1: look again for the file."""
        try:
            descriptor, own = self._open_file(unfinished, os.O_RDWR | os.O_CREAT), True
        except PermissionError:
            if not self._has(unfinished):
                raise
            descriptor, own = self._open_file(unfinished, os.O_RDONLY), False  # another user's, who may be about to finish it
        locked = False

        def settled() -> bool:
            nonlocal locked
            locked = try_lock(descriptor)
            return locked or not self._still_names(unfinished, descriptor)

        try:
            # A finished file keeps its locks when it is renamed, so that it must not be waited for.
            self._wait_for(settled, unfinished)
            named = locked and self._still_names(unfinished, descriptor)
            if self._has(name) or not named or not own:
                if named:  # made by the lines above after the file was finished, or abandoned by another user
                    os.unlink(unfinished, dir_fd=self._descriptor)
                os.close(descriptor)
                return -1
            with self._bookkeeping():
                missing = size - _on_disk(os.fstat(descriptor))
                if missing > 0:
                    self._make_room(missing)
                os.ftruncate(descriptor, size)
                self._take(descriptor, size)
            return descriptor
        except BaseException:
            if locked and own and os.fstat(descriptor).st_blocks == 0:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=self._descriptor)
            os.close(descriptor)
            raise

    def _has(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        """One process at a time looks at what there is and takes its part."""
        try:
            descriptor = self._open_file(".lock", os.O_RDONLY)  # another user's can be locked, too
        except FileNotFoundError:
            descriptor = self._open_file(".lock", os.O_RDONLY | os.O_CREAT)
        try:
            self._wait_for(lambda: try_lock(descriptor), ".lock")
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int, size: int) -> None:
        """Have the disk keep room for all of a file; where others have filled it, in the place of files that nobody holds."""
        # Tables free next to nothing, and would be missed at once.
        names = iter([name for *_, blocks, name in sorted(self._files()) if blocks and not name.endswith(".tables")])
        while True:
            try:
                return os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno != errno.ENOSPC or not any(self._evict(name) for name in names):
                    raise

    def _make_room(self, size: int) -> None:
        files = sorted(self._files())
        used = sum(blocks for *_, blocks, _ in files)
        for *_, blocks, name in files:
            if used + size <= self.limit:
                return
            used -= blocks if self._evict(name) else 0
        if used + size > self.limit:
            raise NoRoom(
                f"{self.path}: no room for {size / 1e9:.3f} GB: {used / 1e9:.3f} of at most {self.limit / 1e9:.3f} GB are in use. "
                "Allow it more"
            )

    def _files(self) -> Iterator[tuple[bool, float, int, str]]:
        """(whether its last use is known, when that was, bytes on disk, name) of each."""
        latest = time.time() + _CLOCK
        for name in os.listdir(self._descriptor):  # noqa: PTH208  # a Path holds no descriptor
            if re.search(r"\.(beton|tables|partial|tmp)$", name):
                with suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
                    # A time to come is from before the clock was set back; by it, a file would outlive all that are used now.
                    yield found.st_mtime <= latest, found.st_mtime, _on_disk(found), name

    def _evict(self, name: str) -> bool:
        """Remove a file unless somebody holds it, or the system does not let us."""
        try:
            descriptor = self._open_file(name, os.O_RDONLY)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            if not (try_lock(descriptor) and self._still_names(name, descriptor)):
                return False
            os.unlink(name, dir_fd=self._descriptor)
        except FileNotFoundError:
            return True
        except PermissionError:
            return False
        finally:
            os.close(descriptor)
        return True


def _try_share(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _on_disk(found: os.stat_result) -> int:
    return found.st_blocks * 512
