"""Which sample comes when: a pure function of (seed, epoch)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from fastretina.errors import UsageError

Sampling = Literal["shuffle", "sequential", "balanced", "sqrt"]


class Order(NamedTuple):
    """One epoch. indices: (N,) int64 positions in the file; repeats: (N,) uint32, how often each came before in this epoch,
    or None where none comes twice."""

    indices: NDArray[np.int64]
    repeats: NDArray[np.uint32] | None


def epoch_order(labels: NDArray[np.int64], sampling: Sampling, seed: int, epoch: int) -> Order:
    """The order of one epoch over N samples with labels (N,).

    shuffle: every sample once, in random order. sequential: every sample once, in file order. balanced: N draws, each class
    equally often. sqrt: N draws, each class in proportion to the square root of its count, a compromise that repeats rare
    grades less. In both, a class is dealt like a deck: no sample comes a second time before all of its class have come once.
    """
    if sampling not in get_args(Sampling):
        raise UsageError(f"sampling must be one of {', '.join(get_args(Sampling))}, not {sampling!r}")
    if sampling == "sequential":
        return Order(np.arange(len(labels)), None)
    rng = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, epoch]))
    if sampling == "shuffle":
        return Order(rng.permutation(len(labels)), None)
    members = [np.flatnonzero(labels == grade) for grade in np.unique(labels)]
    weights = np.array([len(m) ** (0.0 if sampling == "balanced" else 0.5) for m in members])
    indices, repeats = [], []
    for member, quota in zip(members, _apportion(len(labels), weights), strict=True):
        deals = -(-quota // len(member))
        indices.append(np.concatenate([rng.permutation(member) for _ in range(deals)])[:quota])
        repeats.append(np.arange(quota, dtype=np.uint32) // np.uint32(len(member)))
    mix = rng.permutation(len(labels))
    return Order(np.concatenate(indices)[mix], np.concatenate(repeats)[mix])


def rank_places(batch: int, samples: int, batch_size: int, rank: int, world_size: int) -> range:
    """The places in an epoch's order of `samples` that one rank makes of one global batch: every world_size-th of the batch.

    The parts of all ranks are the batch, whatever their number; their sizes differ by one at most, and in a last batch of fewer
    samples than ranks some are empty.
    """
    return range(batch * batch_size + rank, min((batch + 1) * batch_size, samples), world_size)


def _apportion(total: int, weights: NDArray[np.float64]) -> list[int]:
    """Split `total` in proportion to weights into whole numbers, the largest remainders rounded up."""
    exact = total * weights / weights.sum()
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return [int(p) for p in parts]
