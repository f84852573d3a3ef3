"""The device half of a batch: pixels go to the GPU (or are decoded or kept there) and one kernel makes the batch of them.

Copies and decoding are queued on one stream, the warp on another, so that both run beside the training step; streams wait for
events, the host for nothing (but for a device decoder, before it writes and until it has: see `decode.gpu`, and `decode_ahead` for
the thread that does it). On a CPU device (the tests, with Triton's interpreter) there are no streams.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastretina.errors import LoaderError, SampleError
from fastretina.loading.augment.gpu import warp
from fastretina.loading.batches import Batch, DeviceJob, Feed
from fastretina.loading.buffers import BufferPool
from fastretina.loading.decode.gpu import DeviceDecoder
from fastretina.loading.resident import DeviceStore
from fastretina.system.cuda import mark
from fastretina.system.tracing import span

# What the kernel and the consumer need to know of each row, in one piece of pinned memory and one copy: pageable memory might
# make the host wait for the stream, and seven copies cost seven launches.
_ROW = (
    ("addresses", torch.int64, ()), ("labels", torch.int64, ()), ("ids", torch.int64, ()),
    ("affine", torch.float32, (2, 3)), ("colour", torch.float32, (3, 4)),
    ("heights", torch.int32, ()), ("widths", torch.int32, ()),
)  # fmt: skip
_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.int32: np.int32}
# Each part begins at a multiple of this, which is what Triton compiles a variant of the kernel for: parts that begin anywhere, as
# those of a shorter batch would, were another variant each, compiled in the midst of an epoch.
_ALIGNMENT = 16  # bytes


def _layout(rows: int) -> tuple[dict[str, slice], int]:
    """Where the parts of _ROW lie for so many rows, in bytes, and what all of them take."""
    parts, end = {}, 0
    for name, dtype, shape in _ROW:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + rows * int(np.prod(shape)) * dtype.itemsize
        parts[name] = slice(start, end)
    return parts, end


class _InUse:
    """Memory that queued work reads or may read, and the event after which it does not; None: not all of it has been queued."""

    def __init__(self, job: DeviceJob) -> None:
        self.memory: list[Any] = [job]
        self.event: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Sourced:
    """A job whose images are on the device, or will be by what is queued: (rows,) `addresses` of them."""

    job: DeviceJob
    addresses: NDArray[np.int64]
    in_use: _InUse


class DeviceStage:
    """Turns jobs into tensors on the device. One call at a time, from whichever thread; a `source` is followed by its `finish`, or
    by another `source`, which drops it."""

    def __init__(self, feed: Feed, device: torch.device, store: DeviceStore | None, decoder: DeviceDecoder | None) -> None:
        self._feed, self._device, self._store, self._decoder = feed, device, store, decoder
        self._norm = torch.from_numpy(np.ascontiguousarray(feed.norm[:, :3])).to(device)
        self._cuda = device.type == "cuda"
        self._sourcing, self._warping = (torch.cuda.Stream(device) if self._cuda else None for _ in range(2))  # type: ignore[no-untyped-call]
        # To be entered before a stream is: a new thread is on device 0, and each change back to that would make a context there.
        self._number = -1 if self._sourcing is None else self._sourcing.device.index
        if self._sourcing is not None:
            # The store's memory is of this stream: what used it before may not have run yet.
            self._sourcing.wait_stream(torch.cuda.current_stream(device))
        self._rows = BufferPool(_layout(feed.config.batch_size)[1], keep=4, pinned=self._cuda)
        self._in_use: deque[_InUse] = deque()  # in the order of their events

    def launch(self, job: DeviceJob) -> Batch:
        """Queue everything that is left to do, for the job's good rows. Raises what `source` raises."""
        return self.finish(self.source(job))

    def source(self, job: DeviceJob) -> Sourced:
        """Queue what brings the job's images to the device, or decode them there.

        Rows that the device cannot decode, and the CPU neither, become the job's bad rows, or raise SampleError. LoaderError where
        a device decoder claims to have decoded what it did not write.
        """
        with torch.cuda.device(self._number), torch.cuda.stream(self._sourcing):
            in_use = self._begin(job)
            return Sourced(job, self._sources(job, in_use), in_use)

    def finish(self, sourced: Sourced) -> Batch:
        """Queue the rest, for the job's good rows: the batch, in the order of the stream that is current here."""
        job, in_use = sourced.job, sourced.in_use
        with torch.cuda.stream(self._sourcing):
            good = [row for row in range(job.rows) if row not in job.bad]
            rows = self._describe(job, sourced.addresses, good, in_use)
            described = mark(self._sourcing)
        side, dtype = self._feed.config.resolution, self._feed.config.dtype
        with span("warp"), torch.cuda.stream(self._warping):
            if described is not None and self._warping is not None:
                self._warping.wait_event(described)
            images = torch.empty((len(good), side, side, 3), dtype=dtype, device=self._device)
            if good:
                warp(
                    rows["addresses"], rows["heights"], rows["widths"], rows["affine"], rows["colour"], self._norm,
                    self._feed.recolours, images,
                )  # fmt: skip
        batch = Batch(images.permute(0, 3, 1, 2), rows["labels"], rows["ids"])
        in_use.memory.append(rows)
        self._hand_over(mark(self._warping), in_use, batch)
        return batch

    def keep(self, job: DeviceJob) -> None:
        """Queue what brings a job's samples into the store."""
        in_use = self.source(job).in_use
        self._hand_over(mark(self._sourcing), in_use, None)

    def kept(self) -> None:
        """All that `keep` was given is on its way."""
        assert self._store is not None
        self._store.tell_peers()
        if self._decoder is not None:
            self._decoder.let_go()  # 0.6 GB at 512 px, and no epoch decodes again

    @property
    def owned(self) -> range:
        """The samples that `keep` is to be given."""
        assert self._store is not None
        return self._store.owned

    def _begin(self, job: DeviceJob) -> _InUse:
        """Hold the job's memory, from before anything is queued that reads it: whoever is interrupted has no time for it later.

        What an interrupted call has queued, or one whose job was dropped, is over when all is that has been queued by now.
        """
        in_use = _InUse(job)
        if self._sourcing is not None and self._warping is not None:
            if self._in_use and self._in_use[-1].event is None:
                self._warping.wait_stream(self._sourcing)
                self._in_use[-1].event = event = mark(self._warping)
                if self._decoder is not None:
                    self._decoder.release(event)
            self._in_use.append(in_use)
        return in_use

    def _hand_over(self, event: torch.cuda.Event | None, in_use: _InUse, batch: Batch | None) -> None:
        """Order the consumer's stream after the batch, and hold what the batch is made of until it is made."""
        # An event that is there is that of a signal handler's batch, which came in the midst of this one and released its memory.
        if self._decoder is not None and in_use.event is None:
            self._decoder.release(event)
        if event is None:
            return
        if batch is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(event)
            for tensor in batch:
                tensor.record_stream(consumer)
        in_use.event = event
        while len(self._in_use) > 1 and (first := self._in_use[0].event) is not None and first.query():  # type: ignore[no-untyped-call]
            self._in_use.popleft()

    def _describe(self, job: DeviceJob, addresses: NDArray[np.int64], good: list[int], in_use: _InUse) -> dict[str, Tensor]:
        """The good rows' part of _ROW on the device."""
        widths, heights = job.sizes
        values: dict[str, NDArray[Any]] = {
            "addresses": addresses, "labels": self._feed.beton.labels[job.indices], "ids": job.ids,
            "affine": job.parameters.affine, "colour": job.parameters.colour, "heights": heights, "widths": widths,
        }  # fmt: skip
        parts, size = _layout(len(good))
        memory = self._rows.take((size,), np.uint8)
        in_use.memory.append(memory)
        for name, dtype, _ in _ROW:
            memory[parts[name]].view(_NUMPY[dtype])[:] = values[name][good].reshape(-1)
        on_device = torch.from_numpy(memory).to(self._device, non_blocking=True)
        return {name: on_device[parts[name]].view(dtype).view(len(good), *shape) for name, dtype, shape in _ROW}

    def _sources(self, job: DeviceJob, in_use: _InUse) -> NDArray[np.int64]:
        """Addresses (rows,) of the images on the device, where `in_use` keeps them.

        Rows that the device holds already, and bad ones, have no source of their own.
        """
        fresh = [row for row in np.flatnonzero(job.fresh).tolist() if row not in job.bad]
        store = self._store
        if not fresh and store is not None:
            return store.addresses(job.indices)
        memory, offsets = self._decoded(job, fresh) if self._decoder is not None else self._copied(job)
        in_use.memory.append(memory)
        if self._warping is not None:
            memory.record_stream(self._warping)  # also where this stage is let go of before the warp has run
        fresh = [row for row in fresh if row not in job.bad]
        if store is None:
            addresses = np.zeros(job.rows, np.int64)
            addresses[fresh] = memory.data_ptr() + offsets[fresh]
            return addresses
        addresses = store.addresses(job.indices)
        with span("keep"):
            kept = store.put(job.indices[fresh], memory, offsets[fresh])
        elsewhere = np.array(fresh, np.int64)[~kept]  # another rank's to keep, who could not read it
        addresses[elsewhere] = memory.data_ptr() + offsets[elsewhere]
        return addresses

    def _copied(self, job: DeviceJob) -> tuple[Tensor, NDArray[np.int64]]:
        """What the CPU decoded, copied from pinned memory in one piece: the memory, where in it each row begins."""
        with span("copy"):
            return torch.from_numpy(job.pixels).to(self._device, non_blocking=True), job.offsets

    def _decoded(self, job: DeviceJob, fresh: list[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """Decode on the device, as `_copied`; what it cannot decode (raw pixels among it) the CPU does, and is bad only if that
        fails too."""
        assert self._decoder is not None
        widths, heights = job.sizes
        sizes = [(int(heights[row]), int(widths[row])) for row in fresh]
        with span("decode"):
            decoded = self._decoder.decode([job.jpegs.get(row) for row in fresh], sizes)
        if decoded.unwritten:
            beton, index = self._feed.beton, int(job.indices[fresh[decoded.unwritten[0]]])
            raise LoaderError(
                f"{beton.path}: sample {index} ({beton.names[index]}) and {len(decoded.unwritten) - 1} more of {len(fresh)}: "
                f"{self._decoder.name} says that it decoded it, and did not write it; use decode='cpu' or another decoder"
            )
        for number, row in enumerate(fresh):
            if decoded.done[number]:
                continue
            pixels = np.empty((*sizes[number], 3), np.uint8)
            try:
                self._feed.decode(int(job.indices[row]), pixels)
            except SampleError as error:
                if not job.skips_bad:
                    raise
                job.bad[row] = error.with_traceback(None)
                continue
            decoded.image(number).copy_(torch.from_numpy(pixels))
        offsets = np.zeros(job.rows, np.int64)
        offsets[fresh] = decoded.offsets
        return decoded.memory, offsets
