"""The device half of a batch: pixels go to the GPU (or are decoded or kept there) and one kernel makes the batch of them.

Everything is queued on a stream of its own, so that copies and kernels run beside the training step; the consumer's stream
waits for an event, the host for nothing. On a CPU device (the tests, with Triton's interpreter) there are no streams.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastretina.augment import WarpParameters
from fastretina.augment.gpu import warp
from fastretina.decode.gpu import Backend
from fastretina.errors import SampleError
from fastretina.feed import DeviceJob, Feed
from fastretina.resident import DeviceStore


class DeviceStage:
    """Turns decoded jobs into tensors on the device. Not for more than one thread."""

    def __init__(self, feed: Feed, device: torch.device, store: DeviceStore | None, backend: Backend | None) -> None:
        self._feed, self._device, self._store, self._backend = feed, device, store, backend
        self._norm = torch.from_numpy(np.ascontiguousarray(feed.norm[:, :3])).to(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # Pinned memory and decoder output that queued work still reads, with the event after which it is free.
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()

    def launch(self, job: DeviceJob) -> Tensor:
        """Queue everything that is left to do: (B, R, R, 3) images of the job's good rows, ready in the caller's stream.

        Rows that the device cannot decode, and the CPU neither, become the job's bad rows, or raise SampleError.
        """
        on_stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
        with on_stream:
            addresses, planar, keep = self._sources(job)
            good = [row for row in range(job.rows) if row not in job.bad]
            resolution = self._feed.settings.resolution
            output = torch.empty((len(good), resolution, resolution, 3), dtype=self._feed.settings.dtype, device=self._device)
            if good:
                parameters = WarpParameters(job.parameters.affine[good], job.parameters.colour[good])
                widths, heights = (self._upload(side[good].astype(np.int32)) for side in job.sizes)
                places = self._upload(addresses[good])
                warp(places, heights, widths, parameters, self._norm, self._feed.recolours, output, planar)
        if self._stream is not None:
            self._hand_over(output, keep)
        return output

    def _hand_over(self, output: Tensor, keep: Any) -> None:
        """Order the caller's stream after the batch, and hold what the batch is made of until it is made."""
        assert self._stream is not None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        if self._backend is not None:
            self._backend.release(event)
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(event)
        output.record_stream(consumer)
        self._in_use.append((event, keep))
        while len(self._in_use) > 1 and self._in_use[0][0].query():  # type: ignore[no-untyped-call]
            self._in_use.popleft()

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

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
        for row, image in images.items():
            store.images[job.indices[row]] = image.permute(1, 2, 0) if planar else image
        store.held[job.indices[list(images)]] = True
        return store.addresses(job.indices), False, keep

    def _copied(self, job: DeviceJob, fresh: list[int]) -> tuple[dict[int, Tensor], bool, Any]:
        """What the CPU decoded, by row, copied from pinned memory in one piece."""
        pixels = torch.from_numpy(job.pixels)
        staged = pixels.to(self._device, non_blocking=True)
        widths, heights = job.sizes
        images = {
            row: staged[job.offsets[row] : job.offsets[row + 1]].view(int(heights[row]), int(widths[row]), 3) for row in fresh
        }
        return images, False, (pixels, staged)

    def _decoded(self, job: DeviceJob, fresh: list[int]) -> tuple[dict[int, Tensor], bool, Any]:
        """Decode on the device; what it cannot decode is decoded here, and is bad only if that fails too."""
        assert self._backend is not None
        feed, (widths, heights) = self._feed, job.sizes
        sizes = [(int(heights[row]), int(widths[row])) for row in fresh]
        decoded = self._backend.decode([job.jpegs[row] for row in fresh], sizes)
        images: dict[int, Tensor] = {}
        for row, size, image in zip(fresh, sizes, decoded.images, strict=True):
            if image is not None:
                images[row] = image
                continue
            pixels = np.empty((*size, 3), np.uint8)
            try:
                feed.decode(int(job.indices[row]), pixels)
            except SampleError as error:
                if not feed.settings.skip_bad:
                    raise
                job.bad[row] = error.with_traceback(None)
                continue
            uploaded = torch.from_numpy(pixels).to(self._device)
            images[row] = uploaded.permute(2, 0, 1).contiguous() if decoded.planar else uploaded
        return images, decoded.planar, (decoded.keep, images)
