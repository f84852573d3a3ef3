"""A folder of shards, servers that fail on purpose, and a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from remote_cases import write_shards

from fastretina.beton.remote import Cache
from tests.http_faults import Fault, FaultyServer

# Without the remote extra there is nothing to test here.
collect_ignore_glob = [] if find_spec("fsspec") and find_spec("aiohttp") else ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def shard_bytes(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.iterdir())


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 20 requests a shard instead of one, so that faults meet the middle of it."""
    monkeypatch.setattr("fastretina.beton.fetch.SPAN", 4 << 10)
    monkeypatch.setattr("fastretina.beton.fetch._HEAD", 5 << 10)


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., FaultyServer]]:
    servers: list[FaultyServer] = []

    def start(faults: Callable[[int, str], Fault | None] = lambda number, name: None, at: Path = folder) -> FaultyServer:
        servers.append(FaultyServer(at, faults).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", limit=1 << 30, timeout=20)
