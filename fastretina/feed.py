"""How a batch is made: order -> decode -> augment, one job per batch, one row per sample.

A Feed holds everything that stays the same over the epochs. It does not know the Loader, so that threads that work for it
do not keep a forgotten Loader alive.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastretina.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, cpu, draw
from fastretina.beton import Beton
from fastretina.buffers import BufferPool
from fastretina.decode.cpu import decode, decoded_size
from fastretina.errors import SampleError
from fastretina.order import Order, Sampling, epoch_order

# torch dtypes that a batch may have, and the numpy type under whose name the CPU warp writes them.
KERNEL_DTYPES = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16, torch.uint8: np.uint8}


@dataclass(frozen=True)
class FeedSettings:
    """What a batch depends on, apart from the data."""

    batch_size: int
    resolution: int  # px
    seed: int
    sampling: Sampling
    drop_last: bool
    augment: Augment
    dtype: torch.dtype
    verify: bool  # check every sample's crc32
    skip_bad: bool  # leave bad samples out instead of raising


class Feed:
    """Makes the jobs of any epoch of one file."""

    def __init__(self, beton: Beton, settings: FeedSettings, store: Store | None, pool: BufferPool) -> None:
        self.beton, self.settings, self.store, self.pool = beton, settings, store, pool
        self.sizes = decoded_sizes(beton, settings.resolution)
        as_is = settings.dtype == torch.uint8
        self.norm = cpu.identity_norm() if as_is else cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)
        augment = settings.augment
        self.recolours = bool(augment.brightness or augment.contrast or augment.saturation)
        # Nothing to warp, nothing to compute: decode straight into the batch.
        self.direct = as_is and augment == Augment.none() and store is None and self.sizes.only == (settings.resolution,) * 2
        self._scratch = threading.local()
        self._order: tuple[int, Order] | None = None

    def __len__(self) -> int:
        n, size = len(self.beton), self.settings.batch_size
        return n // size if self.settings.drop_last else -(-n // size)

    def order(self, epoch: int) -> Order:
        """The order of an epoch; the last one asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self.beton.labels, self.settings.sampling, self.settings.seed, epoch)
        return self._order[1]

    def jobs(self, epoch: int, batch: int) -> Iterator[BatchJob]:
        """Jobs from one batch of one epoch onwards, without end: the next epoch begins while the last batches are in use."""
        for current in itertools.count(epoch):
            order = self.order(current)
            for number in range(batch if current == epoch else 0, len(self)):
                yield BatchJob(self, order, current, number)

    def source(self, index: int) -> NDArray[np.uint8]:
        """The decoded sample as (bytes + padding,) uint8, valid until this thread asks again."""
        if self.store is not None:
            return self.store.pixels(index, self)
        width, height = self.sizes[index]
        size = width * height * 3
        flat: NDArray[np.uint8] | None = getattr(self._scratch, "flat", None)
        if flat is None or len(flat) < size + cpu.SOURCE_PADDING:
            flat = self._scratch.flat = np.zeros(size + cpu.SOURCE_PADDING, np.uint8)
        self.decode(index, flat[:size].reshape(height, width, 3))
        return flat

    def decode(self, index: int, target: NDArray[np.uint8]) -> None:
        decode(self.beton, index, self.settings.resolution, target, self.settings.verify)


class BatchJob:
    """One batch in the making; see fastretina.pipeline.Job."""

    def __init__(self, feed: Feed, order: Order, epoch: int, number: int) -> None:
        settings = feed.settings
        rows = slice(number * settings.batch_size, (number + 1) * settings.batch_size)
        self.feed, self.epoch, self.number = feed, epoch, number
        self.indices = order.indices[rows]
        self.ids = feed.beton.ids[self.indices]
        self.rows = len(self.indices)
        self.bad: dict[int, SampleError] = {}  # by row
        resolution = settings.resolution
        self.images: NDArray[Any] = feed.pool.take((self.rows, resolution, resolution, 3), KERNEL_DTYPES[settings.dtype])
        if not feed.direct:
            repeats = None if order.repeats is None else order.repeats[rows]
            self.sizes = feed.sizes.of(self.indices)
            self.affine, colour = draw(settings.augment, resolution, *self.sizes, settings.seed, epoch, self.ids, repeats)
            self.colour = cpu.kernel_colour(colour)

    def run(self, row: int) -> None:
        """Decode and warp one sample into its row; a bad sample raises SampleError, or is noted where they are to be skipped."""
        feed, index = self.feed, int(self.indices[row])
        try:
            if feed.direct:
                feed.decode(index, self.images[row])
                return
            source = feed.source(index)
        except SampleError as error:
            if not feed.settings.skip_bad:
                raise
            # Without its traceback, which would keep this batch's memory alive for as long as the record of the skip.
            self.bad[row] = error.with_traceback(None)
            return
        width, height = self.sizes
        affine, colour = self.affine[row], self.colour[row]
        cpu.warp(source, int(height[row]), int(width[row]), affine, colour, feed.norm, feed.recolours, self.images[row])


class Sizes:
    """Decoded width and height of each sample: one pair where all are equal, else two (N,) arrays."""

    def __init__(self, widths: NDArray[np.int64], heights: NDArray[np.int64]) -> None:
        uniform = bool((widths == widths[0]).all() and (heights == heights[0]).all())
        self.only = (int(widths[0]), int(heights[0])) if uniform else None
        self._widths, self._heights = (widths[:0], heights[:0]) if uniform else (widths, heights)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.only or (int(self._widths[index]), int(self._heights[index]))

    def of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Widths and heights (B,) int64 of these samples."""
        if self.only:
            return np.full(len(indices), self.only[0]), np.full(len(indices), self.only[1])
        return self._widths[indices], self._heights[indices]


def decoded_sizes(beton: Beton, resolution: int) -> Sizes:
    """The size that each sample has after decoding for `resolution`."""
    widths, heights = np.asarray(beton.widths, np.int64), np.asarray(beton.heights, np.int64)
    if (widths == widths[0]).all() and (heights == heights[0]).all():
        width, height = decoded_size(int(widths[0]), int(heights[0]), resolution)
        return Sizes(np.full(1, width), np.full(1, height))
    pairs, which = np.unique(np.stack([widths, heights], axis=1), axis=0, return_inverse=True)
    decoded = np.array([decoded_size(int(w), int(h), resolution) for w, h in pairs])[which.reshape(-1)]
    return Sizes(decoded[:, 0], decoded[:, 1])


class Store:
    """Resident mode: the decoded data set as one uint8 array in RAM.

    A sample is decoded when an epoch first asks for it, so the first epoch starts at once and fills the store as it goes.
    """

    def __init__(self, samples: int, width: int, height: int) -> None:
        """Memory is taken as it is filled: samples * width * height * 3 bytes in the end."""
        self._shape, self._size = (height, width, 3), height * width * 3
        self._memory = np.empty(samples * self._size + cpu.SOURCE_PADDING, np.uint8)
        self._filled = np.zeros(samples, np.bool_)

    def pixels(self, index: int, feed: Feed) -> NDArray[np.uint8]:
        """Sample `index` as (bytes + padding,) uint8, decoded by the feed if it is not here yet; any thread may ask."""
        start = index * self._size
        if not self._filled[index]:
            # Two threads may both come here for one sample (class-balanced orders repeat some); both write the same bytes.
            feed.decode(index, self._memory[start : start + self._size].reshape(self._shape))
            self._filled[index] = True
        return self._memory[start : start + self._size + cpu.SOURCE_PADDING]
