"""JPEG decoding on a CUDA device: nvImageCodec where it is installed, else torchvision's nvJPEG, behind one function.

The hardware JPEG engine of an H100 honours no order on the device: with nvjpegDecodeBatched it writes an output when the call is
made, whatever the stream, or an event that the stream waits for, says (pytorch/vision #9606, meta-pytorch/torchcodec #1634: 100
of 100 iterations out of order; 0 of 100 when the host waits first). So outputs are buffers that are kept and used in turn, and
before one is decoded into again the host waits until all that read it has run.

Both backends also work on a CPU device, with the same libraries: slower than decode/cpu.py, and how the tests call them.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastretina.errors import LoaderError, UsageError

_TURNS = 3  # sets of output buffers: one being decoded into, one being read, one to spare
_CPU_ONLY = -99999  # nvImageCodec's NVIMGCODEC_DEVICE_CPU_ONLY


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
    """Decodes a batch on the current stream. Each `decode` is followed by a `release` before the next."""

    name: str

    def decode(self, jpegs: Sequence[memoryview], sizes: Sequence[tuple[int, int]]) -> Decoded:
        """JPEG bytes and their (height, width); a JPEG that fails, or comes out in another size, gives None."""

    def release(self, event: torch.cuda.Event | None) -> None:
        """The last batch's memory may be used again once this event has passed; None: now."""


# nvImageCodec's backend kinds and options that make one engine work alone. Its CUDA decoder is of the kind HYBRID_CPU_GPU: images
# below the threshold (default 10^6 px) have their Huffman codes read by CPU threads, above it by the GPU.
_ENGINES: dict[str, tuple[tuple[str, ...], str]] = {
    "all": ((), ""),
    "hardware": (("HW_GPU_ONLY",), ""),
    "hybrid": (("HYBRID_CPU_GPU",), ""),
    "cuda": (("HYBRID_CPU_GPU",), "nvjpeg_cuda_decoder:hybrid_huffman_threshold=0"),
}
# One thread at a time: a decoder is shared by all loaders of the process, and is not documented to be thread-safe.
_decoding = threading.Lock()


@cache
def _library_decoder(device: torch.device, engines: str, threads: int) -> Any:
    """One decoder per device and process: making one takes a good part of a second."""
    from nvidia import nvimgcodec

    kinds, option = _ENGINES[engines]
    # Chroma is interpolated as libjpeg-turbo does it on the CPU; without, edges in 4:2:0 images differ by tens of grey levels.
    options = f":fancy_upsampling=1 {option}".strip()
    if device.type == "cpu":
        kinds = ("CPU_ONLY",)
    backends = [nvimgcodec.Backend(getattr(nvimgcodec.BackendKind, kind)) for kind in kinds]
    number = _CPU_ONLY if device.type == "cpu" else device.index or 0
    return nvimgcodec.Decoder(device_id=number, max_num_cpu_threads=threads, backends=backends or None, options=options)


class NvImageCodec:
    """NVIDIA's nvImageCodec. engines: "all" balances hardware engine, CUDA and CPU by itself; "hardware", "cuda" (all on the GPU)
    and "hybrid" (Huffman codes on the CPU) are one of them alone. threads: of its own on the CPU, 0: one a core.
    """

    def __init__(self, device: torch.device, engines: str = "all", threads: int = 0) -> None:
        """Raises ImportError or RuntimeError where the library, its driver or the engine is missing."""
        from nvidia import nvimgcodec

        self.name = "nvImageCodec" if engines == "all" else f"nvImageCodec, {engines}"
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        # It never takes all cores, and warns where it is asked to.
        self._decoder = _library_decoder(device, engines, min(threads, max(1, len(os.sched_getaffinity(0)) - 1)))
        # The CPU's decoder knows nothing of EXIF, and a file that fastretina packed has been turned already.
        self._parameters = nvimgcodec.DecodeParams(color_spec=nvimgcodec.ColorSpec.SRGB, apply_exif_orientation=False)
        # The library lets only images of its own be used again; each with a view of its memory, and the event that frees the set.
        self._sets: list[list[tuple[Any, Tensor] | None]] = [[] for _ in range(_TURNS)]
        self._events: list[torch.cuda.Event | None] = [None] * _TURNS
        self._turn = 0

    def decode(self, jpegs: Sequence[memoryview], sizes: Sequence[tuple[int, int]]) -> Decoded:
        event, held = self._events[self._turn], self._sets[self._turn]
        if event is not None:
            event.synchronize()
        held += [None] * (len(jpegs) - len(held))
        again = [None if slot is None else slot[0] for slot in held[: len(jpegs)]]
        sources = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        with _decoding:
            found = self._decoder.decode(sources, images=again, params=self._parameters, cuda_stream=stream)
        held[: len(jpegs)] = [None if image is None else self._slot(image, slot) for image, slot in zip(found, held, strict=False)]
        images = [
            slot[1] if slot is not None and slot[1].shape == (*size, 3) else None for slot, size in zip(held, sizes, strict=False)
        ]
        return Decoded(images, planar=False, keep=(sources, held))

    def _slot(self, image: Any, before: tuple[Any, Tensor] | None) -> tuple[Any, Tensor]:
        """The image with a tensor over its memory, which is the one before where nothing moved: making one takes 10 us."""
        interface = image.__array_interface__ if self._device.type == "cpu" else image.__cuda_array_interface__
        if before is not None and before[1].data_ptr() == interface["data"][0] and before[1].shape == tuple(interface["shape"]):
            return image, before[1]
        view = torch.from_numpy(np.asarray(image)) if self._device.type == "cpu" else torch.as_tensor(image, device=self._device)
        if not view.is_contiguous():
            raise LoaderError(f"nvImageCodec gave an image with strides {view.stride()}; use decode='cpu'")
        return image, view

    def release(self, event: torch.cuda.Event | None) -> None:
        self._events[self._turn] = event
        self._turn = (self._turn + 1) % _TURNS


class TorchvisionNvJpeg:
    """torchvision's decode_jpeg on the device; one failure fails its batch, so that it is then decoded one by one."""

    name = "torchvision's nvJPEG"

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
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
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

        with warnings.catch_warnings():
            # From 0.29 on it points to torchcodec instead.
            warnings.simplefilter("ignore", DeprecationWarning)
            images: list[Tensor] = decode_jpeg(sources, mode=ImageReadMode.RGB, device=self._device)
        return [image.contiguous() for image in images]  # a view of (H, W, 3) on a CPU

    def _decode_one(self, source: Tensor) -> Tensor | None:
        try:
            return self._decode([source])[0]
        except RuntimeError:
            return None

    def release(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            self._held.append((self._last, event))
        self._last = []


# What `Loader(decoder=...)` may name. The first two are tried in turn where none is named.
DECODERS: dict[str, Callable[[torch.device, int], Backend]] = {
    "nvimgcodec": lambda device, threads: NvImageCodec(device, "all", threads),
    "torchvision": lambda device, threads: TorchvisionNvJpeg(device),
    "nvimgcodec-hardware": lambda device, threads: NvImageCodec(device, "hardware", threads),
    "nvimgcodec-hybrid": lambda device, threads: NvImageCodec(device, "hybrid", threads),
    "nvimgcodec-cuda": lambda device, threads: NvImageCodec(device, "cuda", threads),
}


def make_decoder(device: torch.device, name: str | None = None, threads: int = 0) -> Backend:
    """The decoder of that name for a device; None: the best that is installed and starts.

    threads: CPU threads that nvImageCodec may use, 0: one a core. Raises UsageError for an unknown name, LoaderError with each
    one's reason where none starts.
    """
    if name is not None and name not in DECODERS:
        raise UsageError(f"decoder must be one of {', '.join(DECODERS)}, not {name!r}")
    reasons = []
    for candidate in ("nvimgcodec", "torchvision") if name is None else (name,):
        if candidate.startswith("nvimgcodec") and not installed():
            reasons.append("nvImageCodec is not installed (pip install 'fastretina[gpu]')")
            continue
        try:
            return DECODERS[candidate](device, threads)
        except (ImportError, RuntimeError, OSError) as error:
            reasons.append(f"{candidate}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    raise LoaderError(f"no decoder for {device}: {'; '.join(reasons)}; use decode='cpu'")


def installed() -> bool:
    """Whether nvImageCodec is there, without importing it."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.nvimgcodec") is not None
