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
from fastretina.system.interrupts import HeldSignals

_OURS = os.O_NOFOLLOW | os.O_CLOEXEC  # a link at the name of an unfinished file would lead us to somebody else's
_ACCESS_LIST = "system.posix_acl_access"  # where there is one, the mode's bits of the group are its mask, not the group's


def unfinished(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


class AtomicFile:
    """A file under construction: filled by `write` or `fill`, then `publish` (fsync, rename, fsync of the folder) or `discard`.

    Until then it is `.NAME.tmp` in the same folder, locked against a second writer. After a kill -9 it stays, locked by nobody, and
    the next writer of the same file removes it.

    The folder is opened once: whatever its path comes to mean, a link to elsewhere or another folder, everything stays in the
    folder that it meant at first. A link at the file's own name is replaced, and what it leads to left alone.

    A file that replaces another keeps its mode, owner, group and access list, as far as the system allows: it is never more
    readable than that one was, nor is the unfinished file.

    To be used while signals are held (see `fastretina.system.interrupts`), so that none of it is lost to a Ctrl-C.
    """

    _descriptor = _folder = -1

    def __init__(self, path: Path, error: type[FastretinaError] = RunError) -> None:
        """error: what all methods raise, with the path and the system's reason; here also where another process writes the file."""
        self.path, self._error = path, error
        try:
            with self._reported():
                self._place = path.parent.absolute()
                # Not by its whole path: a folder above may be one that only others may enter.
                self._folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                replaced = self._replaced()
                if replaced is not None and not stat.S_ISREG(replaced.st_mode):
                    what = "folder" if stat.S_ISDIR(replaced.st_mode) else "device, a pipe or a socket"
                    raise error(f"{path}: is a {what}; give a file name")
                self._partial = unfinished(path).name
                mode = 0o666 if replaced is None else replaced.st_mode & 0o666 | 0o600
                while (descriptor := self._begun(mode)) is None:
                    pass
                self._descriptor = descriptor
        except BaseException as problem:
            self._close()
            if isinstance(problem, ValueError):  # a NUL in the path, or what no file system can name
                raise error(f"{path}: cannot be written: {problem}") from problem
            raise

    def _begun(self, mode: int) -> int | None:
        """A new file, locked; None where one was in the way, which has been removed by now: try again."""
        try:
            descriptor, new = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OURS, mode, dir_fd=self._folder), True
        except FileExistsError:
            try:
                descriptor, new = os.open(self._partial, os.O_RDWR | os.O_NONBLOCK | _OURS, dir_fd=self._folder), False
            except FileNotFoundError:
                return None
            except OSError as error:
                raise self._error(
                    f"{self.path}: cannot be written: {unfinished(self.path)} is in the way: {error.strerror}"
                ) from error
        try:
            with suppress(OSError):  # a file system without locks: of two writers the first one fails as it publishes
                if not try_lock(descriptor):
                    raise self._error(f"{self.path}: another process is writing this file; wait for it or stop it")
            # Between open and lock its previous owner may have renamed or removed it.
            if still_names(self._partial, descriptor, self._folder):
                if new:
                    owned, descriptor = descriptor, -1
                    return owned
                os.unlink(self._partial, dir_fd=self._folder)
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _replaced(self) -> os.stat_result | None:
        """Of what has the final name now, or of what that leads to; None where there is nothing."""
        try:
            return os.stat(self.path.name or ".", dir_fd=self._folder)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None
            raise

    def _in_place(self) -> bool:
        """Whether the folder is still what its path names."""
        try:
            return still_names(self._place, self._folder)
        except PermissionError:  # begun from within a folder that only others may enter
            return True

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
        """Make the file durable and give it its final name, replacing what was there. older: a name for that, in the same folder.

        Raises, and changes nothing, also where the folder is no longer what its path names or the unfinished file was taken away.
        """
        with self._reported():
            replaced = self._replaced()
            if replaced is not None:
                _keep_access(self._descriptor, replaced, f"/proc/self/fd/{self._folder}/{self.path.name}")
            os.fsync(self._descriptor)
            if not still_names(self._partial, self._descriptor, self._folder):
                raise self._error(f"{self.path}: cannot be written: {unfinished(self.path)} was removed or replaced")
            if not self._in_place():
                raise self._error(f"{self.path}: cannot be written: its folder was moved or replaced meanwhile")
            if older is not None and replaced is not None:
                self._name_as_well(older.name)
            os.replace(self._partial, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        try:
            sync_folder(Path(), self._folder)
        except OSError as error:
            raise self._error(
                f"{self.path}: is complete and in its place, but may not outlive a power cut: its folder cannot be synced: "
                f"{error.strerror}"
            ) from error
        finally:
            self._close()

    def _name_as_well(self, other: str) -> None:
        """Let `other` name the file at the final name too, in one step, so that neither name is ever missing."""
        name, spare, folder = self.path.name, unfinished(Path(other)).name, self._folder
        with suppress(FileNotFoundError):
            os.unlink(spare, dir_fd=folder)
        try:
            os.link(name, spare, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            os.replace(spare, other, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:  # a file system without hard links: for a moment there is only the other name, which a resume looks at too
            os.replace(name, other, src_dir_fd=folder, dst_dir_fd=folder)
        # rename(2) does nothing, and leaves both names, where they are of the same file already: after a kill at the wrong moment.
        with suppress(FileNotFoundError):
            os.unlink(spare, dir_fd=folder)

    def discard(self) -> None:
        """Remove the unfinished file; does nothing once published."""
        try:
            if self._descriptor >= 0 and still_names(self._partial, self._descriptor, self._folder):
                os.unlink(self._partial, dir_fd=self._folder)
        except OSError as error:
            raise self._error(
                f"{self.path}: not written, and {unfinished(self.path)} cannot be removed: {error.strerror}"
            ) from error
        finally:
            self._close()

    def _close(self) -> None:
        for descriptor in (self._descriptor, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._folder = -1

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


def _keep_access(descriptor: int, replaced: os.stat_result, path: str) -> None:
    """Let the open file be for those whom the replaced one, at `path`, is for; where that cannot be, for fewer."""
    mode, access, own = replaced.st_mode & 0o777, None, os.fstat(descriptor)
    with suppress(OSError):  # it has none
        access = os.getxattr(path, _ACCESS_LIST)
    if (own.st_uid, own.st_gid) != (replaced.st_uid, replaced.st_gid):
        try:
            os.fchown(descriptor, replaced.st_uid, replaced.st_gid)
        except OSError:  # only root gives files away; but of one's own groups one may choose
            try:
                os.fchown(descriptor, -1, replaced.st_gid)
            except OSError:  # another group may do what everybody may
                mode, access = mode & 0o707 | (mode & 0o007) << 3, None
    try:
        if access is not None:
            os.setxattr(descriptor, _ACCESS_LIST, access)
        else:
            os.removexattr(descriptor, _ACCESS_LIST)  # of those by default in this folder
    except OSError:
        mode &= 0o707 if access is not None else 0o777
    if os.fstat(descriptor).st_mode & 0o777 != mode:  # not on a file system without modes
        os.fchmod(descriptor, mode)


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], older: Path | None = None, error: type[FastretinaError] = RunError
) -> None:
    """Let `write` fill a file that gets its name only when it is complete and on disk. `error` with the system's reason.

    older: a name for what `path` held until now, in the same folder. A signal interrupts `write`, but nothing else.
    """
    with HeldSignals() as signals, AtomicFile(path, error) as file:
        with signals.let_in():
            file.fill(write)
        file.publish(older)


def sync_folder(folder: Path, dir_fd: int | None = None) -> None:
    """Put a folder's entries on disk, so that a rename outlives a power cut. dir_fd: of the folder that its path begins in."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    except PermissionError:  # one may write in it but not list it: then everything there is
        os.sync()
        return
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


def still_names(path: Path | str, descriptor: int, dir_fd: int | None = None) -> bool:
    """Whether the path names the open file: between opening and locking it, it may have been renamed or removed.

    dir_fd: of the folder that the path is the name of an entry of, which then must be the file itself and no link to it.
    """
    try:
        return os.path.samestat(os.stat(path, dir_fd=dir_fd, follow_symlinks=dir_fd is None), os.fstat(descriptor))
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
    with HeldSignals():  # the descriptor belongs to nobody
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
