"""Files that are there completely or not at all, and files that are read only where they are files."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fastretina.errors import ConvertError, RunError
from fastretina.system.files import AtomicFile, read_regular, write_atomically, write_bytes


def test_files_of_a_run_are_locked_while_they_are_written_and_name_their_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with AtomicFile(path):
        with pytest.raises(RunError, match=r"a\.json: another process is writing"):
            write_bytes(path, b"other")
        with pytest.raises(ConvertError, match="another process"):
            write_bytes(path, b"other", ConvertError)
    write_bytes(path, b"1")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(RunError, match=r"b\.json: cannot be written: No such file"):
        write_bytes(tmp_path / "no" / "b.json", b"1")


def test_what_replaced_the_unfinished_file_of_a_killed_writer_is_shorter_and_whole(tmp_path: Path) -> None:
    (tmp_path / ".a.json.tmp").write_bytes(b"left behind" * 1000)
    write_bytes(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


def test_no_file_takes_the_place_of_a_device_or_a_pipe(tmp_path: Path) -> None:
    """Such a rename root's processes can make, and /dev/null would be a file from then on."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("fifo", "link"):
        before = (tmp_path / name).lstat()
        with pytest.raises(RunError, match=rf"{name}: is a device, a pipe"):
            write_bytes(tmp_path / name, b"1")
        assert (tmp_path / name).lstat() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"fifo", "link"}


def test_a_path_without_a_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", "/", ".."):
        with pytest.raises(RunError, match="is a folder; give a file name"):
            write_bytes(Path(name), b"1")


def test_only_regular_files_within_the_limit_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    os.mkfifo(tmp_path / "fifo")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    for name, reason in (("fifo", "not a file"), (".", "a folder"), ("nul\0", "null"), ("none", "No such file")):
        with pytest.raises(OSError, match=reason):
            read_regular(tmp_path / name, 5)
    with pytest.raises(OSError, match="5 bytes; the limit is 4"):
        read_regular(tmp_path / "file", 4)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("instead", ["nothing", "another folder", "a link"])
def test_a_folder_that_was_moved_away_gets_nothing_and_neither_does_what_took_its_place(instead: str, tmp_path: Path) -> None:
    place, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    place.mkdir()
    other.mkdir()
    with AtomicFile(place / "a.json") as file:
        file.write(b"new", 0)
        place.rename(moved)
        if instead == "another folder":
            place.mkdir()
        elif instead == "a link":
            place.symlink_to(other)
        (other / ".a.json.tmp").write_bytes(b"not ours")
        with pytest.raises(RunError, match=r"a\.json: cannot be written: its folder was moved or replaced"):
            file.publish()
    assert names(moved) == []
    assert names(other) == [".a.json.tmp"]
    assert instead == "nothing" or names(place.resolve()) == names(other if instead == "a link" else moved)


def test_a_link_that_leads_elsewhere_by_now_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    link = tmp_path / "data"
    link.symlink_to("a")
    write_bytes(link / "x", b"1")
    with AtomicFile(link / "y") as file:
        link.unlink()
        link.symlink_to("b")
        with pytest.raises(RunError, match="moved or replaced"):
            file.publish()
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["x"], [])


def test_a_relative_path_means_the_folder_that_it_meant_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with AtomicFile(Path("a")) as file, AtomicFile(Path("b")):
        file.write(b"new", 0)
        os.chdir(tmp_path / "there")
        file.publish()
    assert (names(tmp_path / "here"), names(tmp_path / "there")) == (["a"], [])


def test_nothing_is_written_through_links_at_the_name_of_the_unfinished_file(tmp_path: Path) -> None:
    path, partial, precious = tmp_path / "a", tmp_path / ".a.tmp", tmp_path / "precious"
    precious.write_bytes(b"precious")
    partial.symlink_to(precious)
    with pytest.raises(RunError, match=r"a: cannot be written: .*/\.a\.tmp is in the way"):
        write_bytes(path, b"new")
    assert partial.is_symlink()
    partial.unlink()
    partial.hardlink_to(precious)
    write_bytes(path, b"new")
    assert (path.read_bytes(), precious.read_bytes(), names(tmp_path)) == (b"new", b"precious", ["a", "precious"])


@pytest.mark.parametrize("by", [b"another's", None])
def test_an_unfinished_file_that_somebody_replaced_or_removed_is_not_published(by: bytes | None, tmp_path: Path) -> None:
    path, partial = tmp_path / "a", tmp_path / ".a.tmp"
    path.write_bytes(b"old")
    with AtomicFile(path) as file:
        file.write(b"new", 0)
        partial.unlink()
        if by is not None:
            partial.write_bytes(by)
        with pytest.raises(RunError, match=r"\.a\.tmp was removed or replaced"):
            file.publish()
    assert path.read_bytes() == b"old"
    assert by is None or partial.read_bytes() == by


def test_a_link_at_the_final_name_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    path, target, older = tmp_path / "a", tmp_path / "target", tmp_path / "a.prev"
    target.write_bytes(b"old")
    target.chmod(0o600)
    path.symlink_to("target")
    write_atomically(path, lambda file: file.write(b"new"), older)
    assert (path.is_symlink(), path.read_bytes(), mode(path), target.read_bytes()) == (False, b"new", 0o600, b"old")
    assert older.readlink() == Path("target")
    path.unlink()
    path.symlink_to("nowhere")
    write_bytes(path, b"new")
    assert not path.is_symlink()


def test_devices_pipes_folders_and_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    for name, reason in {
        "fifo": "is a device, a pipe or a socket",
        "link": "is a device",
        "..": "is a folder",
        "": "is a folder",
        "a\0b": "cannot be written: embedded null byte",
        "n" * 255: "File name too long",
        "fifo/a": "Not a directory",
    }.items():
        with pytest.raises(RunError, match=reason):
            write_bytes(tmp_path / name, b"new")
    assert names(tmp_path) == ["fifo", "link"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o444, 0o664, 0o000])
def test_a_file_keeps_the_mode_of_the_one_it_replaces_and_is_never_more_readable(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    before = os.umask(0o022)
    try:
        path.write_bytes(b"old")
        path.chmod(bits)
        with AtomicFile(path) as file:
            assert mode(tmp_path / ".a.tmp") & ~bits & 0o177 == 0
            file.publish()
        assert mode(path) == bits
        write_bytes(tmp_path / "b", b"new")
        assert mode(tmp_path / "b") == 0o644
    finally:
        os.umask(before)


def test_an_access_list_is_kept_and_none_is_added(tmp_path: Path) -> None:
    """u::rw, user 1234 r, g::-, mask r, o::-: by its mode alone, 0640, the group might read it."""
    entries = [(1, 6, -1), (2, 4, 1234), (4, 0, -1), (16, 4, -1), (32, 0, -1)]
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    path, name = tmp_path / "a", "system.posix_acl_access"
    path.write_bytes(b"old")
    try:
        os.setxattr(path, name, listed)
    except OSError:
        pytest.skip("no access lists on this file system")
    write_bytes(path, b"new")
    assert os.getxattr(path, name) == listed
    os.removexattr(path, name)
    path.chmod(0o640)
    os.setxattr(tmp_path, "system.posix_acl_default", listed)
    write_bytes(path, b"new")
    assert name not in os.listxattr(path)
    assert mode(path) == 0o640


# Root may do everything: it becomes somebody else first, who may enter the folder, but none of those above it.
ELSEWHO = """
import os, sys
from pathlib import Path
from fastretina.system.files import AtomicFile, write_bytes
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    {code}
except Exception as error:
    print(type(error).__name__, error)
"""


def as_somebody_else(code: str, folder: Path, mode: int) -> str:
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    folder.chmod(mode)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHO.replace("{code}", code)], capture_output=True, text=True, timeout=30, check=True, cwd=folder
    )
    assert done.stderr == ""
    folder.chmod(0o700)
    return done.stdout


def test_in_a_folder_that_may_be_written_but_not_listed_files_are_published(tmp_path: Path) -> None:
    assert as_somebody_else('write_bytes(Path("a"), b"1"); write_bytes(Path("a"), b"2")', tmp_path, 0o300) == ""
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"2"


def test_of_a_group_that_cannot_be_kept_another_gets_no_more_than_everybody(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    path = tmp_path / "a"
    for bits, kept in ((0o640, 0o600), (0o664, 0o644)):
        path.write_bytes(b"old")
        os.chown(path, 0, 0)
        path.chmod(bits)
        assert as_somebody_else('write_bytes(Path("a"), b"new")', tmp_path, 0o700) == ""
        assert (mode(path), path.stat().st_uid) == (kept, 65534)
    os.chown(path, 1234, 5678)
    write_bytes(path, b"by root")
    assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (1234, 5678, 0o644)


def test_what_cannot_be_removed_or_synced_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'f = AtomicFile(Path("a")); os.chmod(".", 0o500); f.__exit__()'
    assert "RunError a: not written, and .a.tmp cannot be removed: Permission denied" in as_somebody_else(code, tmp_path, 0o700)
    assert names(tmp_path) == [".a.tmp"]

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"a: is complete and in its place, but may not outlive a power cut: .*: Input/output error"):
        write_bytes(tmp_path / "a", b"new")
    assert (names(tmp_path), (tmp_path / "a").read_bytes()) == (["a"], b"new")
