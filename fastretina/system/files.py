"""Files: written completely or not at all, locked by the kernel, read only where they are files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from fastretina.errors import FastretinaError, RunError


def unfinished(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


class AtomicFile:
    """A file under construction: filled by `write` or `fill`, then `publish` (fsync, rename, fsync of the folder) or `discard`.

    Until then it is `.NAME.tmp` in the same folder, locked against a second writer. After a kill -9 it stays, locked by nobody, and
    the next writer of the same file takes it over.
    """

    def __init__(self, path: Path, error: type[FastretinaError] = RunError) -> None:
        """error: what all methods raise, with the path and the system's reason; here also where another process writes the file."""
        if path.is_dir():
            raise error(f"{path}: is a folder; give a file name")
        if path.exists() and not path.is_file():  # renamed over /dev/null, by root, it would be /dev/null for everybody
            raise error(f"{path}: is a device or a pipe, which no file can take the place of; give a file name")
        self.path = path
        self._partial, self._error, self._descriptor = unfinished(path), error, -1
        with self._reported():
            # Between open and lock its previous owner may have renamed or removed it; then start over.
            while not still_names(self._partial, descriptor := self._open_locked()):
                os.close(descriptor)
            self._descriptor = descriptor
            os.ftruncate(descriptor, 0)

    def _open_locked(self) -> int:
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: one writer at a time is then the user's care
            if not try_lock(descriptor):
                os.close(descriptor)
                raise self._error(f"{self.path}: another process is writing this file; wait for it or stop it")
        return descriptor

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """All of `data` at byte `offset`."""
        view = memoryview(data)
        with self._reported():
            while view:
                done = os.pwrite(self._descriptor, view, offset)
                view, offset = view[done:], offset + done

    def fill(self, write: Callable[[BinaryIO], object]) -> None:
        """Let `write` write it from its beginning."""
        with self._reported(), open(self._descriptor, "wb", closefd=False) as file:
            write(file)

    def publish(self, older: Path | None = None) -> None:
        """Make the file durable and give it its final name, replacing what was there. older: a name for what was there."""
        with self._reported():
            os.fsync(self._descriptor)
            if older is not None and self.path.exists():
                _name_as_well(self.path, older)
            self._partial.replace(self.path)
            self._close()
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the unfinished file; does nothing once published."""
        if self._descriptor >= 0:
            self._partial.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], older: Path | None = None, error: type[FastretinaError] = RunError
) -> None:
    """Let `write` fill a file that gets its name only when it is complete and on disk. `error` with the system's reason.

    older: a name for what `path` held until now.
    """
    with AtomicFile(path, error) as file:
        file.fill(write)
        file.publish(older)


def _name_as_well(path: Path, other: Path) -> None:
    """Let `other` name the file at `path`, in one step, so that neither name is ever missing."""
    spare = unfinished(other)
    spare.unlink(missing_ok=True)
    try:
        spare.hardlink_to(path)
        spare.replace(other)
    except OSError:  # a file system without hard links: for a moment there is only the other name, which a resume looks at too
        path.replace(other)
    # rename(2) does nothing, and leaves both names, where they are of the same file already: after a kill at the wrong moment.
    spare.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, so that a rename outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(descriptor: int) -> bool:
    """Lock an open file; False where another descriptor holds it. The kernel lets go when the process dies, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def still_names(path: Path, descriptor: int) -> bool:
    """Whether the path names the open file: between opening and locking it, it may have been renamed or removed."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def open_regular(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Descriptor and size in bytes of a file to read. OSError, its reason in `strerror`, also for a folder, a device or a FIFO."""
    try:
        # O_NONBLOCK: a FIFO must not hang the open.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a file")
    return descriptor, status.st_size


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a file of at most `limit` bytes. OSError as `open_regular`, and where it is larger."""
    descriptor, size = open_regular(path)
    try:
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes; the limit is {limit:,}")
        # Usually one read, and a second that finds the end; a file that grows meanwhile stays within the limit.
        parts, left = [], limit
        while left > 0 and (part := os.read(descriptor, min(left, size + 1))):
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, error: type[FastretinaError] = RunError) -> None:
    """Write bytes atomically."""
    write_atomically(path, lambda file: file.write(data), error=error)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically; NaN and infinity are a ValueError: what is undefined is None here and null there."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # a path may be no text; JSON reads the escape as that path again
