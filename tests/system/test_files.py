"""Files that are there completely or not at all, and files that are read only where they are files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastretina.errors import ConvertError, RunError
from fastretina.system.files import AtomicFile, read_regular, write_bytes


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
        with pytest.raises(RunError, match=rf"{name}: is a device or a pipe"):
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
