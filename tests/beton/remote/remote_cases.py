"""What the tests of remote shards have in common."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from fastretina.beton.remote import Cache
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
