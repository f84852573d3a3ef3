"""A folder of shards, servers that fail on purpose, and a cache."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from remote_cases import SAMPLES, SHARDS, SIDE

from fastretina.beton.paths import shard_path, shard_rows
from fastretina.beton.remote import Cache
from fastretina.beton.writer import BetonWriter
from tests.http_faults import Fault, FaultyServer

# Without the remote extra there is nothing to test here.
collect_ignore_glob = [] if find_spec("fsspec") and find_spec("aiohttp") else ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 30 images and 2.1 MB each, most of that padding."""
    folder, rng = tmp_path_factory.mktemp("served"), np.random.default_rng(0)
    for number in range(SHARDS):
        rows = shard_rows(SAMPLES, number, SHARDS)
        with BetonWriter(shard_path(folder / "train.beton", number, SHARDS), len(rows), page=1 << 21) as writer:
            for row in rows:
                coarse = rng.integers(0, 255, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
                jpeg = simplejpeg.encode_jpeg(np.kron(coarse, np.ones((4, 4, 1), np.uint8)), quality=90)
                writer.add(jpeg, zlib.crc32(jpeg), name=f"{row}_left", label=row % 5, id=row, width=SIDE, height=SIDE)
            writer.finish({"shard": {"number": number, "of": SHARDS}})
    return folder


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
