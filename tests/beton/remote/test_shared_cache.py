"""A cache folder that others write to: nothing outside it is touched, whatever its names lead to, and other users' files are read
or refused by name."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from remote_cases import PATTERN, SHARDS
from small_disk import on_small_disk

from fastretina.beton.cache import CachedBeton, CacheFolder
from fastretina.beton.open import open_beton
from fastretina.beton.paths import shard_path
from fastretina.beton.remote import Cache
from fastretina.beton.waiting import Closing
from fastretina.errors import CacheError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who may become another user")


@pytest.fixture
def content(folder: Path) -> bytes:
    return shard_path(folder / "train.beton", 0, SHARDS).read_bytes()


@pytest.fixture
def space(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", limit=1 << 30)


@pytest.fixture
def victim(tmp_path: Path, content: bytes) -> Path:
    """A file elsewhere that would do as a shard, last used long ago."""
    path = tmp_path / "victim"
    path.write_bytes(content)
    os.utime(path, (10**9, 10**9))
    return path


def fetched(space: CacheFolder, content: bytes, kind: str = "a file") -> CachedBeton:
    if kind == "tables":
        return space.tables("a.beton", lambda file: file.write(content, 0))
    return space.file("a.beton", len(content), lambda file: file.write(content, 0))


def link(victim: Path, name: Path) -> None:
    name.symlink_to(victim)


def dangling(victim: Path, name: Path) -> None:
    name.symlink_to(victim.with_name("created"))


def second_name(victim: Path, name: Path) -> None:
    name.hardlink_to(victim)


def folder_link(victim: Path, name: Path) -> None:
    name.symlink_to(victim.parent)


def pipe(victim: Path, name: Path) -> None:
    os.mkfifo(name)


def subfolder(victim: Path, name: Path) -> None:
    name.mkdir()


@pytest.mark.parametrize("name", ["a.beton", "a.beton.partial", "a.beton.tables", ".lock"])
@pytest.mark.parametrize("plant", [link, dangling, folder_link, pipe, subfolder])
def test_what_is_no_file_of_the_cache_is_refused_by_name_and_leads_nowhere(space, victim, content, plant, name):
    plant(victim, space.path / name)
    with pytest.raises(CacheError, match=r"cache/\S+: cannot be used in a cache: .*remove it"):
        fetched(space, content, "tables" if name.endswith("tables") else "a file")
    assert victim.read_bytes() == content
    assert victim.stat().st_mtime == 10**9
    assert not victim.with_name("created").exists()


def test_a_file_that_has_another_name_elsewhere_is_not_written_to(space, victim, content):
    second_name(victim, space.path / "a.beton.partial")
    with pytest.raises(CacheError, match="another name"):
        fetched(space, bytes(len(content)))
    assert victim.read_bytes() == content


def test_a_temporary_name_that_can_be_foretold_is_not_used(space, victim, content):
    link(victim, space.path / f"a.beton.tables.{os.getpid()}-{threading.get_ident()}.tmp")
    fetched(space, content, "tables").close()
    assert victim.read_bytes() == content
    assert victim.stat().st_mtime == 10**9


def test_a_folder_put_in_the_place_of_the_cache_is_left_alone(space, victim, content):
    space.path.rename(moved := space.path.with_name("moved"))
    (other := space.path.with_name("other")).mkdir()
    (other / "a.beton").write_bytes(b"mine")
    space.path.symlink_to(other)
    fetched(space, content).verify(0)
    assert [path.read_bytes() for path in other.iterdir()] == [b"mine"]
    assert (moved / "a.beton").read_bytes() == content


def test_a_lock_that_is_never_let_go_of_is_not_waited_for_after_closing(tmp_path, content):
    closing = Closing()
    space = CacheFolder(tmp_path / "cache", 1 << 30, closing)
    fetched(space, content).close()
    for name, asked in ((".lock", "b.beton"), ("a.beton", "a.beton")):
        held = os.open(space.path / name, os.O_RDWR | os.O_CREAT)
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.2, closing.set).start()
        with pytest.raises(CacheError, match="closed while another process had it"):
            space.file(asked, len(content), lambda file: file.write(content, 0))
        os.close(held)
        closing._is_set = False


def test_a_clock_that_was_set_back_keeps_no_garbage(tmp_path, content):
    """Files that were used at a time to come go first, not last; what is open stays."""
    space = CacheFolder(tmp_path / "cache", limit=3 * (len(content) + 4096))

    def use(name: str) -> CachedBeton:
        return space.file(name, len(content), lambda file: file.write(content, 0))

    held = use("held.beton")
    use("old.beton").close()
    for name in ("held", "old"):
        os.utime(space.path / f"{name}.beton", (later := time.time() + 7200, later))
    for name in ("a.beton", "b.beton", "a.beton", "c.beton"):
        use(name).close()
        time.sleep(0.02)
    assert sorted(path.name for path in space.path.glob("*.beton")) == ["a.beton", "c.beton", "held.beton"]
    held.verify(0)


def test_temporary_tables_that_nobody_writes_go_at_once_and_others_stay(space, content):
    left = space.path / "b.beton.tables.1-2.tmp"
    left.write_bytes(content)
    small = CacheFolder(space.path, limit=len(content) + (64 << 10))
    seen: list[bool] = []

    def fetch(file) -> None:
        file.write(content[:4096], 0)
        fetched(small, content).close()  # makes room meanwhile
        seen.append(file.path.exists())
        file.write(content, 0)

    small.tables("c.beton", fetch).close()
    assert seen == [True]
    assert not left.exists()


AS_ANOTHER = """
import os, sys
import aiohttp, fsspec.implementations.http
from fastretina.beton.open import open_beton
from fastretina.beton.remote import Cache
from fastretina.errors import FastretinaError
os.chdir(sys.argv[1])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    with open_beton(sys.argv[2], Cache("cache", limit=1 << 30)) as beton:
        for i in range(0, len(beton), 10):
            beton.verify(i)
    print("read")
except FastretinaError as error:
    print(type(error).__name__, error)
"""


def as_another(url: str, tmp_path: Path) -> str:
    """What a process of another user has to say that reads a set through tmp_path / "cache"."""
    tmp_path.chmod(0o755)
    return subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, tmp_path, url], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout.strip()  # fmt: skip


@pytest.fixture
def filled(serve, tmp_path) -> tuple[str, Path]:
    """URL of a shard, and the cache of this user that holds it."""
    url = f"{serve().url}/train-00000-of-{SHARDS:05d}.beton"
    with open_beton(url, Cache(tmp_path / "cache", limit=1 << 30)) as beton:
        beton.verify(0)
    return url, tmp_path / "cache"


@as_root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_another_user_reads_what_may_be_read(filled, tmp_path, mode):
    url, cache = filled
    cache.chmod(mode)
    assert as_another(url, tmp_path) == "read"


@as_root
@pytest.mark.parametrize("what", ["tables", "beton"])
def test_what_another_user_may_not_read_is_an_error_with_a_way_out(filled, tmp_path, what):
    url, cache = filled
    for path in cache.glob(f"*.{what}"):
        path.chmod(0o600)
    said = as_another(url, tmp_path)
    assert f".{what}: cannot be used in a cache: Permission denied. Give a cache folder of your own: FASTRETINA_CACHE" in said


@as_root
@pytest.mark.parametrize("what", ["tables", "beton"])
def test_what_another_user_may_not_write_is_an_error_with_a_way_out(filled, tmp_path, what):
    url, cache = filled
    cache.chmod(0o755)
    for path in cache.glob(f"*.{what}"):
        path.unlink()
    said = as_another(url, tmp_path)
    assert "cannot be used in a cache: Permission denied. Give a cache folder of your own" in said


@as_root
def test_another_user_goes_on_where_the_folder_is_anybodys(filled, tmp_path):
    url, cache = filled
    cache.chmod(0o777)
    for path in cache.glob("*.beton"):
        path.rename(f"{path}.partial")  # abandoned, and its owner's alone to write
    assert as_another(url, tmp_path) == "read"
    (path,) = cache.glob("*.beton")
    assert path.stat().st_uid == 65534


@as_root
def test_what_another_user_left_half_fetched_where_only_owners_remove_is_an_error(filled, tmp_path):
    url, cache = filled
    cache.chmod(0o1777)
    for path in cache.glob("*.beton"):
        path.rename(f"{path}.partial")
    assert "Give a cache folder of your own" in as_another(url, tmp_path)


READ_ALL = """
import sys
import numpy
from fastretina.beton.open import open_beton
from fastretina.beton.remote import Cache
from fastretina.errors import FastretinaError
try:
    with open_beton(sys.argv[1], Cache(sys.argv[2], limit=1 << 30, streams=1)) as beton:
        beton.expect(numpy.arange(len(beton)))
        for i in range(len(beton)):
            beton.verify(i)
    print("read")
except FastretinaError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(("shards", "says"), [(3, "read"), (0.9, "No space left on device")])
def test_on_a_disk_that_others_filled_shards_take_turns_as_long_as_one_fits(serve, tmp_path, shard_bytes, shards, says):
    (inside := tmp_path / "cache").mkdir()
    reading = on_small_disk(
        inside, str(int(shards * shard_bytes)), sys.executable, "-c", READ_ALL, f"{serve().url}/{PATTERN}", inside
    )
    done = subprocess.run(reading, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert says in done.stdout
