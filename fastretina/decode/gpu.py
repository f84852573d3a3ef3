"""JPEG decoding on a CUDA device: nvImageCodec where it is installed, else torchvision's nvJPEG, behind one function.

The hardware JPEG engine of an H100 does not honour the stream that it is given (pytorch/vision #9606): it may write an output
before earlier work of that stream has finished. So outputs are buffers that the decoder owns and uses in turn, and before one
is decoded into again the host waits until all that read it has run. Written to NVIDIA's documented interface; it has not run
on a device yet, which is why `decode="auto"` does not choose it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastretina.errors import UsageError

_TURNS = 3  # sets of output buffers: one being decoded into, one being read, one to spare


@dataclass(frozen=True)
class Decoded:
    """The images of one call, on the device.

    images: uint8, one for each JPEG, None where it could not be decoded; (3, H, W) where `planar`, else (H, W, 3). They are
    views; keep: what owns the memory.
    """

    images: list[Tensor | None]
    planar: bool
    keep: Any


class Backend(Protocol):
    """Decodes a batch on the current stream. One per device and process: making one is slow."""

    def decode(self, jpegs: Sequence[memoryview], sizes: Sequence[tuple[int, int]]) -> Decoded:
        """JPEG bytes and their (height, width); a JPEG that fails, or comes out in another size, gives None."""

    def release(self, event: torch.cuda.Event) -> None:
        """The last batch's memory may be used again once this event has passed."""


def make_backend(device: torch.device) -> Backend:
    """The best decoder that is installed. Raises UsageError where the device is no CUDA device."""
    if device.type != "cuda":
        raise UsageError(f"decode='gpu' needs device='cuda', not {device}: use decode='auto'")
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nvimgcodec"):
        return NvImageCodec(device)
    return TorchvisionNvJpeg(device)


class NvImageCodec:
    """NVIDIA's nvImageCodec: hardware engine, CUDA and CPU backends, balanced by itself."""

    def __init__(self, device: torch.device) -> None:
        from nvidia import nvimgcodec

        self._device = device
        self._decoder = nvimgcodec.Decoder(device_id=device.index or 0)
        self._parameters = nvimgcodec.DecodeParams(color_spec=nvimgcodec.ColorSpec.SRGB)
        self._sets: list[tuple[list[Any], torch.cuda.Event | None]] = [([], None)] * _TURNS
        self._turn = 0

    def decode(self, jpegs: Sequence[memoryview], sizes: Sequence[tuple[int, int]]) -> Decoded:
        images, event = self._sets[self._turn]
        if event is not None:
            event.synchronize()
        # A shorter or failed set cannot be used again: the library wants one image for each source.
        again = {"images": images} if len(images) == len(jpegs) and None not in images else {}
        stream = torch.cuda.current_stream().cuda_stream
        sources = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        found = list(self._decoder.decode(sources, params=self._parameters, cuda_stream=stream, **again))
        self._sets[self._turn] = found, None
        images = [
            torch.as_tensor(image, device=self._device) if image is not None and tuple(image.shape) == (*size, 3) else None
            for image, size in zip(found, sizes, strict=True)
        ]
        return Decoded(images, planar=False, keep=found)

    def release(self, event: torch.cuda.Event) -> None:
        self._sets[self._turn] = self._sets[self._turn][0], event
        self._turn = (self._turn + 1) % _TURNS


class TorchvisionNvJpeg:
    """torchvision's decode_jpeg on the device; one failure fails its batch, so that it is then decoded one by one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: list[tuple[list[Tensor], torch.cuda.Event]] = []
        self._last: list[Tensor] = []

    def decode(self, jpegs: Sequence[memoryview], sizes: Sequence[tuple[int, int]]) -> Decoded:
        # Its outputs come from torch's allocator, which would hand out memory that a kernel still reads: hold on to each
        # batch until its event has passed, and drain the stream that they were allocated on.
        while self._held and (len(self._held) >= _TURNS or self._held[0][1].query()):  # type: ignore[no-untyped-call]
            self._held.pop(0)[1].synchronize()
        sources = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
        torch.cuda.current_stream().synchronize()
        try:
            found: list[Tensor | None] = list(self._decode(sources))
        except RuntimeError:
            found = [self._decode_one(source) for source in sources]
        self._last = [image for image in found if image is not None]
        images = [
            image if image is not None and tuple(image.shape) == (3, *size) else None
            for image, size in zip(found, sizes, strict=True)
        ]
        return Decoded(images, planar=True, keep=found)

    def _decode(self, sources: list[Tensor]) -> list[Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg

        images: list[Tensor] = decode_jpeg(sources, mode=ImageReadMode.RGB, device=self._device)
        return images

    def _decode_one(self, source: Tensor) -> Tensor | None:
        try:
            return self._decode([source])[0]
        except RuntimeError:
            return None

    def release(self, event: torch.cuda.Event) -> None:
        self._held.append((self._last, event))
        self._last = []
