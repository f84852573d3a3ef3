"""The device half of a batch: pixels go to the GPU (or are decoded or kept there) and one kernel makes the batch of them.

Copies and decoding are queued on one stream, the warp on another, so that both run beside the training step; streams wait for
events, the host for nothing (but before a device decoder writes, see fastretina.decode.gpu). On a CPU device (the tests, with
Triton's interpreter) there are no streams.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastretina.augment.gpu import warp
from fastretina.buffers import BufferPool
from fastretina.decode.gpu import Backend
from fastretina.errors import SampleError
from fastretina.feed import DeviceJob, Feed
from fastretina.profiling import span
from fastretina.resident import DeviceStore
from fastretina.streams import mark

# What the kernel and the consumer need to know of each row, in one piece of pinned memory and one copy: pageable memory might
# make the host wait for the stream, and six copies cost six launches. 8-byte types first, so that every part is aligned.
_ROW = (
    ("addresses", torch.int64, ()), ("labels", torch.int64, ()), ("ids", torch.int64, ()),
    ("affine", torch.float32, (2, 3)), ("colour", torch.float32, (3, 4)),
    ("heights", torch.int32, ()), ("widths", torch.int32, ()),
)  # fmt: skip
_ROW_BYTES = 3 * 8 + (6 + 12) * 4 + 2 * 4


class DeviceBatch(NamedTuple):
    """images: (B, R, R, 3). labels, ids: (B,) int64. On the device, ready in the consumer's stream."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class DeviceStage:
    """Turns decoded jobs into tensors on the device. Not for more than one thread."""

    def __init__(self, feed: Feed, device: torch.device, store: DeviceStore | None, backend: Backend | None) -> None:
        self._feed, self._device, self._store, self._backend = feed, device, store, backend
        self._norm = torch.from_numpy(np.ascontiguousarray(feed.norm[:, :3])).to(device)
        self._cuda = device.type == "cuda"
        self._sourcing, self._warping = (torch.cuda.Stream(device) if self._cuda else None for _ in range(2))  # type: ignore[no-untyped-call]
        self._rows = BufferPool(_ROW_BYTES * feed.settings.batch_size, keep=4, pinned=self._cuda)
        # Memory that queued work still reads, with the event after which it is free.
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()

    def launch(self, job: DeviceJob) -> DeviceBatch:
        """Queue everything that is left to do, for the job's good rows.

        Rows that the device cannot decode, and the CPU neither, become the job's bad rows, or raise SampleError.
        """
        with _on(self._sourcing):
            addresses, planar, keep = self._sources(job)
            good = [row for row in range(job.rows) if row not in job.bad]
            described, rows = self._describe(job, addresses, good)
            sourced = mark(self._sourcing)
        resolution = self._feed.settings.resolution
        with span("warp"), _on(self._warping):
            if sourced is not None and self._warping is not None:
                self._warping.wait_event(sourced)
            images = torch.empty((len(good), resolution, resolution, 3), dtype=self._feed.settings.dtype, device=self._device)
            if good:
                warp(
                    rows["addresses"], rows["heights"], rows["widths"], rows["affine"], rows["colour"], self._norm,
                    self._feed.recolours, images, planar,
                )  # fmt: skip
        batch = DeviceBatch(images, rows["labels"], rows["ids"])
        self._hand_over(mark(self._warping), (keep, described, rows), batch)
        return batch

    def keep(self, job: DeviceJob) -> None:
        """Queue what brings a job's samples into the store."""
        with _on(self._sourcing):
            _, _, keep = self._sources(job)
        self._hand_over(mark(self._sourcing), keep, None)

    def kept(self) -> None:
        """All that `keep` was given is on its way."""
        assert self._store is not None
        self._store.tell_peers()

    @property
    def owned(self) -> range:
        """The samples that `keep` is to be given."""
        assert self._store is not None
        return self._store.owned

    @property
    def decoder(self) -> str | None:
        """The name of what decodes on the device, if anything does."""
        return None if self._backend is None else self._backend.name

    def _hand_over(self, event: torch.cuda.Event | None, keep: Any, batch: DeviceBatch | None) -> None:
        """Order the consumer's stream after the batch, and hold what the batch is made of until it is made."""
        if self._backend is not None:
            self._backend.release(event)
        if event is None:
            return
        if batch is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(event)
            for tensor in batch:
                tensor.record_stream(consumer)
        self._in_use.append((event, keep))
        while len(self._in_use) > 1 and self._in_use[0][0].query():  # type: ignore[no-untyped-call]
            self._in_use.popleft()

    def _describe(self, job: DeviceJob, addresses: NDArray[np.int64], good: list[int]) -> tuple[Any, dict[str, Tensor]]:
        """The good rows' part of _ROW on the device, and the pinned memory that it is copied from."""
        widths, heights = job.sizes
        values: dict[str, NDArray[Any]] = {
            "addresses": addresses, "labels": self._feed.beton.labels[job.indices], "ids": job.ids,
            "affine": job.parameters.affine, "colour": job.parameters.colour, "heights": heights, "widths": widths,
        }  # fmt: skip
        memory = self._rows.take((_ROW_BYTES * len(good),), np.uint8)
        places: list[tuple[str, slice, torch.dtype, tuple[int, ...]]] = []
        offset = 0
        for name, dtype, shape in _ROW:
            size = len(good) * int(np.prod(shape)) * dtype.itemsize
            place = slice(offset, offset + size)
            memory[place].view(_NUMPY[dtype])[:] = values[name][good].reshape(-1)
            places.append((name, place, dtype, shape))
            offset += size
        on_device = torch.from_numpy(memory).to(self._device, non_blocking=True)
        return memory, {name: on_device[place].view(dtype).view(len(good), *shape) for name, place, dtype, shape in places}

    def _sources(self, job: DeviceJob) -> tuple[NDArray[np.int64], bool, Any]:
        """Addresses (rows,) of the images on the device, whether they are planar, and what keeps them there.

        Rows that the device holds already, and bad ones, have no source of their own.
        """
        fresh = [row for row in np.flatnonzero(job.fresh).tolist() if row not in job.bad]
        store = self._store
        if not fresh and store is not None:
            return store.addresses(job.indices), False, None
        images, planar, keep = self._decoded(job, fresh) if self._backend is not None else self._copied(job, fresh)
        if store is None:
            addresses = np.zeros(job.rows, np.int64)
            addresses[list(images)] = [image.data_ptr() for image in images.values()]
            return addresses, planar, keep
        addresses, elsewhere = store.addresses(job.indices), []
        with span("keep"):
            for row, image in images.items():
                pixels = image.permute(1, 2, 0) if planar else image
                if not store.put(int(job.indices[row]), pixels):  # another rank's to keep, who could not read it
                    elsewhere.append(pixels.contiguous())
                    addresses[row] = elsewhere[-1].data_ptr()
        return addresses, False, (keep, elsewhere)

    def _copied(self, job: DeviceJob, fresh: list[int]) -> tuple[dict[int, Tensor], bool, Any]:
        """What the CPU decoded, by row, copied from pinned memory in one piece."""
        with span("copy"):
            pixels = torch.from_numpy(job.pixels)
            staged = pixels.to(self._device, non_blocking=True)
        widths, heights = job.sizes
        images = {
            row: staged[job.offsets[row] : job.offsets[row + 1]].view(int(heights[row]), int(widths[row]), 3) for row in fresh
        }
        return images, False, (pixels, staged)

    def _decoded(self, job: DeviceJob, fresh: list[int]) -> tuple[dict[int, Tensor], bool, Any]:
        """Decode on the device; what it cannot decode (raw pixels among it) is decoded here, and is bad only if that fails too."""
        assert self._backend is not None
        widths, heights = job.sizes
        jpegs = [row for row in fresh if row in job.jpegs]
        sizes = {row: (int(heights[row]), int(widths[row])) for row in fresh}
        with span("decode"):
            decoded = self._backend.decode([job.jpegs[row] for row in jpegs], [sizes[row] for row in jpegs])
        images = {row: image for row, image in zip(jpegs, decoded.images, strict=True) if image is not None}
        for row in fresh:
            if row in images:
                continue
            pixels = np.empty((*sizes[row], 3), np.uint8)
            try:
                self._feed.decode(int(job.indices[row]), pixels)
            except SampleError as error:
                if not job.skips_bad:
                    raise
                job.bad[row] = error.with_traceback(None)
                continue
            uploaded = torch.from_numpy(pixels).to(self._device)
            images[row] = uploaded.permute(2, 0, 1).contiguous() if decoded.planar else uploaded
        return images, decoded.planar, (decoded.keep, images)


_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.int32: np.int32}


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
