"""JPEG decoding on a CUDA device by nvImageCodec, into memory of ours, with proof that each image was written.

The hardware JPEG engine of an H100 honours no order on the device: with nvjpegDecodeBatched it writes an output when the call is
made, whatever the stream, or an event that the stream waits for, says (pytorch/vision #9606, meta-pytorch/torchcodec #1634: 100
of 100 iterations out of order; 0 of 100 when the host waits first). So outputs are buffers that are kept and used in turn, and
before one is decoded into again the host waits until all that read it has run.

nvImageCodec makes the status of all images of a hardware batch out of one return code (0.8, extensions/nvjpeg/hw_decoder.cpp): one
that the engine skipped would be another sample's pixels. So a buffer is poisoned before each decode and looked at after it.

The library also decodes on the CPU: slower than decode/cpu.py, and how the tests call it.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastretina.beton.format import MODE_JPEG
from fastretina.beton.reader import Beton
from fastretina.errors import LoaderError, SampleError, UsageError
from fastretina.system.cuda import current_stream, mark

_TURNS = 3  # buffers: one being decoded into, one being read, one to spare
# An image counts as written if in each of its bands a poisoned byte has changed. In a band of 32 all of them being the poison by
# chance has a probability of 256^-32, and an image of which an eighth is missing lacks a whole band.
_BANDS, _PROBES = 16, 32
_CPU_ONLY = -99999  # nvImageCodec's NVIMGCODEC_DEVICE_CPU_ONLY
DEVICE_BATCH = 256  # images that a device decoder gets at once where that can be chosen


# nvImageCodec's backends in the order in which they may choose, each with its share of a batch. None: what the library does by
# itself, all to the hardware engine, and to the others what that cannot decode. "hybrid" is its CUDA decoder: Huffman codes of
# images below 10^6 px are read by CPU threads. Read by the GPU they came to 3,568 images a second of 512 px on an H200 (hybrid
# 7,333, hardware 9,916), and a test of corrupt ones did not come to an end in 80 s: that is not offered.
_Engines = tuple[tuple[str, float], ...] | None
_ENGINES: dict[str, _Engines] = {"all": None, "hardware": (("HW_GPU_ONLY", 1.0),), "hybrid": (("HYBRID_CPU_GPU", 1.0),)}
# One thread at a time: a decoder is shared by all loaders of the process, and is not documented to be thread-safe.
_decoding = threading.Lock()


@dataclass(frozen=True)
class CodecSettings:
    """What a codec is made for. threads: of the CPU, 0: as many as the machine has cores. height, width: of the largest image, px.
    batch: images of a call."""

    device: torch.device
    threads: int
    height: int
    width: int
    batch: int


@cache
def _library_decoder(settings: CodecSettings, engines: _Engines, fancy_upsampling: bool) -> Any:
    """One decoder per device and use in a process: making one takes a good part of a second."""
    from nvidia import nvimgcodec

    device = settings.device
    # Memory that the hardware engine does not have to take in a call is worth more than 20 %, by a comment in its source.
    options = (
        f":fancy_upsampling={int(fancy_upsampling)} :preallocate_width_hint={settings.width} "
        f":preallocate_height_hint={settings.height} :preallocate_batch_size={settings.batch}"
    )
    if device.type == "cpu":
        engines = (("CPU_ONLY", 1.0),)
    chosen = [nvimgcodec.Backend(getattr(nvimgcodec.BackendKind, kind), load_hint=share) for kind, share in engines or ()]
    number = _CPU_ONLY if device.type == "cpu" else device.index
    # It never takes all cores, and warns where it is asked to.
    cores = max(1, len(os.sched_getaffinity(0)) - 1)
    threads = min(settings.threads or cores, cores)
    return nvimgcodec.Decoder(device_id=number, max_num_cpu_threads=threads, backends=chosen or None, options=options)


class NvImageCodec:
    """NVIDIA's nvImageCodec."""

    def __init__(self, settings: CodecSettings, engines: str | _Engines = "all", fancy_upsampling: bool = True) -> None:
        """engines: a key of _ENGINES, or what stands there. fancy_upsampling: chroma is interpolated as libjpeg-turbo does it on
        the CPU; without, edges in 4:2:0 images differ by tens of grey levels.

        Raises ImportError or RuntimeError where the library, its driver or the engine is missing.
        """
        from nvidia import nvimgcodec

        named = f", {engines}" if isinstance(engines, str) and engines != "all" else ""
        self.name = f"nvImageCodec{named}"
        self._device, self._as_image = settings.device, nvimgcodec.as_image
        chosen = _ENGINES[engines] if isinstance(engines, str) else engines
        self._decoder = _library_decoder(settings, chosen, fancy_upsampling)
        # The CPU's decoder knows nothing of EXIF, and a file that fastretina packed has been rotated already.
        self._parameters = nvimgcodec.DecodeParams(color_spec=nvimgcodec.ColorSpec.SRGB, apply_exif_orientation=False)

    def wrap(self, target: Tensor) -> Any:
        """The library's view of (H, W, 3) uint8 memory on the device, to be used for as long as that stays."""
        source = target.numpy() if self._device.type == "cpu" else target
        return self._as_image(source, self._stream()), tuple(target.shape)

    def decode(self, jpegs: Sequence[memoryview], targets: Sequence[Any]) -> list[bool]:
        """Decode each JPEG into its target, as `wrap` gave it, in the current stream. False where it cannot, or the JPEG has
        another size; that target's memory is then undefined."""
        sources = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        images = [image for image, _ in targets]
        try:
            with _decoding:
                found = self._decoder.decode(sources, images=images, params=self._parameters, cuda_stream=self._stream())
        except ValueError:  # a JPEG that is larger than its target is an error of the whole call, before it decodes anything
            if len(jpegs) == 1:
                return [False]
            return [self.decode([jpeg], [target])[0] for jpeg, target in zip(jpegs, targets, strict=True)]
        # A JPEG that is smaller has made its image smaller.
        return [image is not None and tuple(image.shape) == shape for image, (_, shape) in zip(found, targets, strict=True)]

    def _stream(self) -> int:
        stream = current_stream(self._device)
        return 0 if stream is None else stream.cuda_stream


# What `Loader(decoder=...)` may name; the first one where nothing is named.
DECODERS: dict[str, Callable[[CodecSettings], NvImageCodec]] = {"nvimgcodec": NvImageCodec} | {
    f"nvimgcodec-{engines}": partial(NvImageCodec, engines=engines) for engines in ("hardware", "hybrid")
}


@dataclass(frozen=True)
class Decoded:
    """A batch on the device.

    memory: uint8, flat, valid until what `release` was given has passed. offsets: (n,) where in it each image begins: (H, W, 3).
    sizes: (n,) height and width of each, px. done: (n,) whether each image is there. unwritten: which of them the codec says it
    decoded, and did not write.
    """

    memory: Tensor
    offsets: NDArray[np.int64]
    sizes: list[tuple[int, int]]
    done: list[bool]
    unwritten: list[int]

    def image(self, number: int) -> Tensor:
        """(H, W, 3) uint8: a view of `memory`, to be read, or to be written where the image is not there."""
        height, width = self.sizes[number]
        start = int(self.offsets[number])
        return self.memory[start : start + height * width * 3].view(height, width, 3)


class _Buffer:
    """Memory for the images of one batch, one after the other, of which every `stride`-th byte is poisoned before a decode."""

    def __init__(self, nbytes: int, stride: int, device: torch.device) -> None:
        probes = -(-nbytes // stride)
        self.memory = torch.empty(probes * stride, dtype=torch.uint8, device=device)
        self.event: torch.cuda.Event | None = None  # behind the last that reads it
        self.sizes: list[tuple[int, int]] = []
        self.targets: list[Any] = []  # as the codec sees the images of these sizes: making one takes 7 us
        self._probes = self.memory.view(probes, stride)[:, 0]
        noise = np.random.default_rng(0).integers(0, 256, probes, np.uint8)
        self._noise = torch.from_numpy(noise).to(device)
        self._equal = torch.empty(probes, dtype=torch.bool, pin_memory=device.type == "cuda")
        self._device = device

    def poison(self) -> None:
        """Write the poison. The host waits for that: the hardware engine would not."""
        _write_poison(self._probes, self._noise)
        self._wait()

    def intact_poison(self) -> NDArray[np.bool_]:
        """(probes,) which bytes are as they were poisoned, once all has run that the current stream holds."""
        _compare_poison(self._probes, self._noise, self._equal)
        self._wait()
        found: NDArray[np.bool_] = self._equal.numpy()
        return found

    def _wait(self) -> None:
        event = mark(current_stream(self._device))
        if event is not None:
            event.synchronize()


def _write_poison(probes: Tensor, noise: Tensor) -> None:
    probes.copy_(noise)


def _compare_poison(probes: Tensor, noise: Tensor, equal: Tensor) -> None:
    equal.copy_(probes == noise, non_blocking=True)


class DeviceDecoder:
    """A codec with memory to decode into. Not for more than one thread. Each `decode` is followed by a `release` before the next.

    Attributes:
        name: the codec's. late: images so far that were there only after all of the device's streams had been waited for.
    """

    def __init__(self, codec: NvImageCodec, device: torch.device, smallest: int) -> None:
        """smallest: bytes of the smallest image, decoded."""
        self.name, self.late = codec.name, 0
        self._codec, self._device, self._cuda = codec, device, device.type == "cuda"
        self._stride = max(1, smallest // (_BANDS * _PROBES))
        self._bands = min(_BANDS, max(1, smallest // self._stride // _PROBES))
        self._buffers: list[_Buffer | None] = [None] * _TURNS
        self._turn = 0

    def decode(self, jpegs: Sequence[memoryview | None], sizes: list[tuple[int, int]]) -> Decoded:
        """Decode JPEGs of these (height, width) in the current stream. None: an image that is only to have its memory.

        The host waits until all of it is done.
        """
        edges = np.cumsum([0, *(height * width * 3 for height, width in sizes)], dtype=np.int64)
        offsets, ends = edges[:-1], edges[1:]
        buffer = self._free_buffer(int(edges[-1]))
        decoded = Decoded(buffer.memory, offsets, sizes, [False] * len(sizes), [])
        asked = [number for number, jpeg in enumerate(jpegs) if jpeg is not None]
        if not asked:
            return decoded
        if buffer.sizes != sizes:
            buffer.sizes = []  # first: an interrupt must not leave other targets with these
            buffer.targets = [self._codec.wrap(decoded.image(number)) for number in range(len(sizes))]
            buffer.sizes = list(sizes)
        buffer.poison()
        found = self._codec.decode([jpeg for jpeg in jpegs if jpeg is not None], [buffer.targets[number] for number in asked])
        claimed = [number for number, done in zip(asked, found, strict=True) if done]
        missing = self._missing(buffer, claimed, offsets, ends)
        if missing and self._cuda:
            # Late, or never? The library has its own streams, and should have made ours wait for them.
            torch.cuda.synchronize(self._device)
            waited = self._missing(buffer, claimed, offsets, ends)
            self.late += len(missing) - len(waited)
            missing = waited
        for number in claimed:
            decoded.done[number] = number not in missing
        decoded.unwritten.extend(missing)
        return decoded

    def release(self, event: torch.cuda.Event | None) -> None:
        """The last batch's memory may be written again once this event has passed; None: now."""
        buffer = self._buffers[self._turn]
        if buffer is not None:
            buffer.event = event
        self._turn = (self._turn + 1) % _TURNS

    def let_go(self) -> None:
        """Give the memory back, to the stream that decoded last; another batch takes it anew."""
        self._buffers = [None] * _TURNS

    def _free_buffer(self, nbytes: int) -> _Buffer:
        buffer = self._buffers[self._turn]
        if buffer is not None and buffer.event is not None:
            buffer.event.synchronize()
        if buffer is None or len(buffer.memory) < nbytes:
            buffer = self._buffers[self._turn] = _Buffer(max(1, nbytes), self._stride, self._device)
        return buffer

    def _missing(self, buffer: _Buffer, claimed: list[int], offsets: NDArray[np.int64], ends: NDArray[np.int64]) -> list[int]:
        """Of these images those that have a band of their poison still."""
        intact = buffer.intact_poison()
        first, last = -(-offsets // self._stride), -(-ends // self._stride)
        bands = first[:, None] + (last - first)[:, None] * np.arange(self._bands) // self._bands
        whole = np.asarray(np.logical_and.reduceat(intact[: last[-1]], bands.reshape(-1)))
        unwritten = np.asarray(whole.reshape(bands.shape).any(axis=1))
        return [number for number in claimed if unwritten[number]]


def make_decoder(
    beton: Beton, device: torch.device, name: str | None = None, threads: int = 0, batch: int = DEVICE_BATCH
) -> DeviceDecoder:
    """A decoder for the images of a file, at their full size; `name`: a key of DECODERS, None: the first.

    threads: of the CPU that it may use, 0: as many as there are cores. batch: images of most calls.
    Raises UsageError for an unknown name, LoaderError with the reason where it does not start, or decodes less than half of the
    file's first batch.
    """
    name = next(iter(DECODERS)) if name is None else name
    if name not in DECODERS:
        raise UsageError(f"decoder must be one of {', '.join(DECODERS)}, not {name!r}")
    if name.startswith("nvimgcodec") and not installed():
        raise LoaderError(
            f"no decoder for {device}: nvImageCodec is not installed (pip install 'fastretina[gpu]'); use decode='cpu'"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    settings = CodecSettings(device, threads, int(beton.heights.max()), int(beton.widths.max()), batch)
    try:
        codec = DECODERS[name](settings)
        smallest = int((beton.heights.astype(np.int64) * beton.widths).min()) * 3
        _decode_first(DeviceDecoder(codec, device, smallest), beton, batch, device)
    except (ImportError, RuntimeError, OSError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoaderError(f"no decoder for {device}: {name}: {reason}; use decode='cpu'") from error
    return DeviceDecoder(codec, device, smallest)


def _decode_first(decoder: DeviceDecoder, beton: Beton, batch: int, device: torch.device) -> None:
    """One batch of the usual size out of the file's first samples.

    It shows that the decoder works, on this file; and nvImageCodec takes the number of images that its engines get of each batch
    from the first call (0.8, src/image_generic_codec.h): a small one, such as an epoch's last, would hold for good.
    """
    first = []
    for index in range(min(len(beton), batch)):
        with suppress(SampleError):  # a bad one is for the loader to tell, or to leave out
            if beton.modes[index] == MODE_JPEG:
                first.append((beton.jpeg(index), (int(beton.heights[index]), int(beton.widths[index]))))
    if not first:
        raise LoaderError(f"{beton.path}: its first {min(len(beton), batch)} samples are no good JPEGs; use decode='cpu'")
    jpegs, sizes = zip(*(first[number % len(first)] for number in range(batch)), strict=True)
    with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):  # type: ignore[no-untyped-call]
        decoded = decoder.decode(jpegs, list(sizes))
    if 2 * sum(decoded.done) <= batch:
        raise LoaderError(
            f"{decoder.name} decoded {sum(decoded.done)} of {batch} images (the first samples of {beton.path}, again and again)"
        )


def installed() -> bool:
    """Whether nvImageCodec is there, without importing it."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.nvimgcodec") is not None
