"""How batches are made: sampler -> decode -> augment, one job per batch, one row per sample.

A Feed holds everything that stays the same over the epochs. It does not know the Loader, so that threads that work for it
do not keep a forgotten Loader alive.
"""

from __future__ import annotations

import functools
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastretina.beton.format import MODE_JPEG
from fastretina.beton.reader import Beton
from fastretina.beton.shards import ShardedBeton
from fastretina.errors import SampleError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, WarpParameters, cpu, draw
from fastretina.loading.buffers import BufferPool
from fastretina.loading.config import KERNEL_DTYPES, LoaderConfig
from fastretina.loading.decode.cpu import Sizes, decode
from fastretina.loading.resident import Store
from fastretina.loading.sampler import Order, Sampling, epoch_order, rank_positions


class Batch(NamedTuple):
    """images: (B, 3, R, R) of the loader's dtype, channels-last in memory. labels, ids: (B,) int64. All on its device, and on CUDA
    ready in the stream that was current as the batch was asked for."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class Feed:
    """Makes the jobs of any epoch of one file."""

    def __init__(self, beton: Beton, config: LoaderConfig, pool: BufferPool, job: type[BatchJob]) -> None:
        self.beton, self.config, self.pool, self.job = beton, config, pool, job
        self.sampling: Sampling = config.sampling or ("shuffle" if config.train else "sequential")
        self.augment = config.augment or (Augment() if config.train else Augment.none())
        self.sizes = Sizes(beton, config.resolution)
        self.decode = functools.partial(decode, beton, resolution=config.resolution)  # (index, target)
        self.as_is = config.dtype == torch.uint8
        self.norm = cpu.kernel_norm() if self.as_is else cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)
        self.recolours = self.augment.recolours
        self.store: Store | None = None  # decoded samples in RAM
        self.on_device: NDArray[np.bool_] | None = None  # samples that need no decoding because the device holds them
        self.device_decodes = False
        self._shards: NDArray[np.uint32] | None = None  # number of each sample's file, where the order depends on it
        if isinstance(beton, ShardedBeton):
            beton.check_order(self.sampling)
            if self.sampling == "shards":
                self._shards = beton.shard_of(np.arange(len(beton)))[0].astype(np.uint32)

    def bring(self, index: int, target: NDArray[np.uint8]) -> None:
        """The pixels of sample `index` into target (h, w, 3) uint8, from the store or decoded. Raises SampleError."""
        if self.store is not None:
            self.store.read(index, target, self.decode)
        else:
            self.decode(index, target)

    def __len__(self) -> int:
        n, size = len(self.beton), self.config.batch_size
        return n // size if self.config.drop_last else -(-n // size)

    def jobs(self, epoch: int, batch: int) -> Iterator[BatchJob]:
        """Jobs from one batch of one epoch onwards, without end: the next epoch begins while the last batches are in use."""
        for current in itertools.count(epoch):
            order = epoch_order(self.beton.labels, self.sampling, self.config.seed, current, self._shards)
            first = batch if current == epoch else 0
            if isinstance(self.beton, ShardedBeton):
                self.beton.expect(order.indices[first * self.config.batch_size :])
            for number in range(first, len(self)):
                yield self.job(self, order.at(self.positions(number)), current)

    def positions(self, batch: int) -> range:
        """Where in an epoch's order the samples of this rank's part of a batch stand."""
        config = self.config
        return rank_positions(batch, len(self.beton), config.batch_size, config.rank, config.world_size)

    def filling(self, samples: range, rows: int) -> Iterator[DeviceJob]:
        """Jobs that bring each of these samples once for the device to keep, in file order, so many at a time."""
        for first in range(samples.start, samples.stop, rows):
            job = DeviceJob(self, Order(np.arange(first, min(first + rows, samples.stop)), None), 0)
            job.skips_bad = True  # they are an error, or a skip, in the epoch that asks for them
            yield job


class BatchJob(ABC):
    """One batch in the making, or this rank's part of it; see fastretina.loading.pipeline.Job.

    indices, ids: (rows,) int64, of each row's sample.
    """

    def __init__(self, feed: Feed, part: Order, epoch: int) -> None:
        self.skips_bad = feed.config.on_bad == "skip"
        self.feed, self.epoch = feed, epoch
        self.indices, self._repeats = part
        self.ids = feed.beton.ids[self.indices]
        self.rows = self.pieces = len(self.indices)
        self.bad: dict[int, SampleError] = {}  # by row
        self.sizes = feed.sizes.of(self.indices)

    def draw(self) -> WarpParameters:
        """The batch's augmentation."""
        config = self.feed.config
        return draw(self.feed.augment, config.resolution, *self.sizes, config.seed, self.epoch, self.ids, self._repeats)

    def run(self, row: int) -> None:
        """Make one row; a bad sample raises SampleError, or is noted where they are to be skipped."""
        try:
            self.make(row, self.indices.item(row))
        except SampleError as error:
            if not self.skips_bad:
                raise
            # Without its traceback, which would keep this batch's memory alive for as long as the record of the skip.
            self.bad[row] = error.with_traceback(None)

    @abstractmethod
    def make(self, row: int, index: int) -> None:
        """Make one row out of sample `index`."""


_scratch = threading.local()


class CpuJob(BatchJob):
    """Decodes and warps on CPU threads; `images` (rows, R, R, 3) is the finished batch."""

    def __init__(self, feed: Feed, part: Order, epoch: int) -> None:
        super().__init__(feed, part, epoch)
        side = feed.config.resolution
        self.images: NDArray[Any] = feed.pool.take((self.rows, side, side, 3), KERNEL_DTYPES[feed.config.dtype])
        # Nothing to warp, nothing to compute: decode, or copy, straight into the batch.
        self.direct = feed.as_is and feed.augment == Augment.none() and feed.sizes.only == (side, side)
        if not self.direct:
            self.affine, colour = self.draw()
            self.colour = cpu.kernel_colour(colour)

    def batch(self) -> Batch:
        """The finished batch, without its bad rows."""
        images = torch.from_numpy(self.images).view(self.feed.config.dtype)
        labels, ids = torch.from_numpy(self.feed.beton.labels[self.indices]), torch.from_numpy(self.ids)
        if self.bad:
            good = torch.tensor([row not in self.bad for row in range(self.rows)])
            images, labels, ids = images[good], labels[good], ids[good]
        return Batch(images.permute(0, 3, 1, 2), labels, ids)

    def make(self, row: int, index: int) -> None:
        feed = self.feed
        if self.direct:
            feed.bring(index, self.images[row])
            return
        width, height = self.sizes[0].item(row), self.sizes[1].item(row)
        source = _thread_memory(width * height * 3 + cpu.SOURCE_PADDING)
        feed.bring(index, source[: width * height * 3].reshape(height, width, 3))
        cpu.warp(source, height, width, self.affine[row], self.colour[row], feed.norm, feed.recolours, self.images[row])


def _thread_memory(size: int) -> NDArray[np.uint8]:
    """At least `size` bytes of the calling thread's own, the same for every sample: they stay in its core's cache.

    They begin 16 bytes past a multiple of 32. To rows that begin at one, libjpeg-turbo writes by non-temporal stores, past the
    cache, and the warp then waits for memory: decoding and warping took 1.3 times as long at 512 px, 1.65 times at 128 px.
    """
    flat: NDArray[np.uint8] | None = getattr(_scratch, "flat", None)
    if flat is None or len(flat) < size:
        memory = np.zeros(size + 32, np.uint8)
        start = (16 - memory.ctypes.data) % 32
        flat = _scratch.flat = memory[start : start + size]
    return flat


class DeviceJob(BatchJob):
    """Decodes on CPU threads into pinned memory; the device does the rest (see fastretina.loading.device_stage).

    pixels: the images one after the other, row r from byte offsets[r] on. jpegs: by row, where the device decodes them.
    fresh: (rows,) bool, the rows that were decoded or are to be decoded: the others the device holds already.
    """

    def __init__(self, feed: Feed, part: Order, epoch: int) -> None:
        super().__init__(feed, part, epoch)
        widths, heights = self.sizes
        self.offsets = np.concatenate([[0], np.cumsum(widths * heights * 3)])
        held = feed.on_device is not None and bool(feed.on_device[self.indices].all())
        if held:  # then no thread need look at it, let alone all of them at each row
            self.pieces = 0
        self.pixels: NDArray[np.uint8] = np.empty(0, np.uint8)
        if not (held or feed.device_decodes):
            self.pixels = feed.pool.take((int(self.offsets[-1]),), np.uint8)
        self.jpegs: dict[int, memoryview] = {}
        self.fresh = np.zeros(self.rows, np.bool_)
        self.parameters = self.draw()

    def make(self, row: int, index: int) -> None:
        feed = self.feed
        if feed.on_device is not None and feed.on_device[index]:
            return
        if feed.device_decodes:
            if feed.beton.modes[index] == MODE_JPEG:  # raw pixels are the CPU's to copy
                self.jpegs[row] = feed.beton.jpeg(index)
        else:
            shape = (self.sizes[1].item(row), self.sizes[0].item(row), 3)
            feed.decode(index, np.ndarray(shape, np.uint8, self.pixels, self.offsets.item(row)))
        self.fresh[row] = True
