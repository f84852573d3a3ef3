"""What the tests of remote shards have in common."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from fastretina.beton.paths import shard_path, shard_rows
from fastretina.beton.remote import Cache
from fastretina.beton.writer import BetonWriter
from fastretina.loading.loader import Loader
from tests.http_faults import FaultyServer

SHARDS, SAMPLES, SIDE = 12, 360, 48
PATTERN = f"train-*-of-{SHARDS:05d}.beton"


def settings(**changes) -> dict:
    return {"batch_size": 16, "resolution": SIDE, "workers": 2, "seed": 5} | changes


def same_epochs(a: Loader, b: Loader, epochs: int = 1) -> None:
    for _ in range(epochs):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.images, other.images)


def complete(cache: Cache) -> list[str]:
    """The shards in the cache that count as complete."""
    return sorted(path.name.partition("-")[2] for path in Path(cache.folder).glob("*.beton"))


def asked_for_samples(server: FaultyServer) -> Counter[str]:
    """How often each shard was asked for its first sample, which lies at 2 MiB."""
    return Counter(name for name, first, _ in server.requests if first == 1 << 21)


def write_shards(folder: Path) -> Path:
    """Shards of 30 images and 2.1 MB each, most of that padding."""
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        rows = shard_rows(SAMPLES, number, SHARDS)
        with BetonWriter(shard_path(folder / "train.beton", number, SHARDS), len(rows), page=1 << 21) as writer:
            for row in rows:
                coarse = rng.integers(0, 255, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
                jpeg = simplejpeg.encode_jpeg(np.kron(coarse, np.ones((4, 4, 1), np.uint8)), quality=90)
                writer.add(jpeg, zlib.crc32(jpeg), name=f"{row}_left", label=row % 5, id=row, width=SIDE, height=SIDE)
            writer.finish({"shard": {"number": number, "of": SHARDS}})
    return folder
