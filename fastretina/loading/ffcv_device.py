"""Decoding and warping on the device inside stock FFCV's Loader: JPEG bytes go straight from its memory map to the decoder.

    from ffcv.loader import Loader, OrderOption
    from fastretina.loading.ffcv_device import device_pipelines

    pipes, decode, warp = device_pipelines("train.beton", resolution=512, seed=0, device="cuda")
    loader = Loader("train.beton", batch_size=256, num_workers=2, os_cache=True, order=OrderOption.RANDOM, drop_last=False,
                    pipelines=pipes)

`os_cache=True` is a must: FFCV's other cache moves pages while their addresses are still in use. Needs the extras `ffcv` and `gpu`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.transforms import Squeeze, ToDevice, ToTensor, ToTorchImage
from numpy.typing import NDArray
from torch import Tensor

from fastretina.beton.reader import Beton
from fastretina.errors import SampleError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, cpu
from fastretina.loading.augment.gpu import warp
from fastretina.loading.decode.gpu import DeviceDecoder, make_decoder
from fastretina.loading.ffcv import Warp, by_field
from fastretina.system.cuda import current_stream, mark


class JpegAddress(SimpleRGBImageDecoder):  # type: ignore[misc]  # ffcv is untyped
    """In place of a decoder: (B, 2) int64, the address and the length of each sample's JPEG; length 0 where it is none.

    A subclass, and compiled, because FFCV asks both of what comes first in an image's pipeline.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        super().declare_state_and_memory(previous_state)  # TypeError where the images are of several sizes
        state = replace(previous_state, jit_mode=True, shape=(2,), dtype=np.dtype("int64"))
        return state, AllocationQuery((2,), np.dtype("int64"))

    def generate_code(self) -> Callable[..., Any]:
        read, jpeg = self.memory_read, IMAGE_MODES["jpg"]
        rows = Compiler.get_iterator()

        def refer(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            for row in rows(len(batch_indices)):
                field = metadata[batch_indices[row]]
                data = read(field["data_ptr"], storage_state)
                destination[row, 0] = data.ctypes.data
                destination[row, 1] = data.size if field["mode"] == jpeg else 0
            return destination[: len(batch_indices)]

        refer.is_parallel = True  # type: ignore[attr-defined]
        return refer


class DecodeOnDevice(Operation):  # type: ignore[misc]
    """What JpegAddress found -> uint8 (B, H, W, 3) on the device.

    An exception in a stage makes stock FFCV's consumer wait for ever. So a bad sample is a black image, a line on standard error,
    and an entry here:

    Attributes:
        bad: SampleErrors by index.
    """

    def __init__(self, beton: Beton, device: torch.device, decoder: DeviceDecoder, verify: bool = True) -> None:
        """verify: compare each sample with its checksum."""
        super().__init__()
        self.bad: dict[int, SampleError] = {}
        self._beton, self._device, self._decoder, self._verify = beton, device, decoder, verify
        self._size = int(beton.heights[0]), int(beton.widths[0])

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (*self._size, 3)
        state = replace(previous_state, jit_mode=False, device=self._device, shape=shape, dtype=torch.uint8)
        return state, AllocationQuery(shape, torch.uint8, self._device)

    def generate_code(self) -> Callable[..., Any]:
        def decode(found: NDArray[np.int64], output: Tensor, indices: Any) -> Tensor:
            output = output[: len(found)]
            good = [row for row in range(len(found)) if self._intact(int(indices[row]), int(found[row, 1]))]
            decoded = self._decoder.decode([_bytes_at(*map(int, found[row])) for row in good], [self._size] * len(good))
            images = {row: decoded.image(number) for number, row in enumerate(good) if decoded.done[number]}
            for row in range(len(found)):
                if row in images:
                    output[row].copy_(images[row], non_blocking=True)
                else:
                    output[row].zero_()
            for number, row in enumerate(good):
                if not decoded.done[number]:
                    did = "did not write" if number in decoded.unwritten else "cannot decode"
                    self._note(self._beton.sample_error(int(indices[row]), f"{self._decoder.name} {did} it"))
            self._decoder.release(mark(current_stream(self._device)))
            return output

        decode.with_indices = True  # type: ignore[attr-defined]  # how FFCV is asked for the batch's rows of the file
        return decode

    def _intact(self, index: int, length: int) -> bool:
        try:
            if length == 0:
                raise self._beton.sample_error(index, "holds raw pixels, not a JPEG")
            if self._verify:
                self._beton.verify(index)
        except SampleError as error:
            self._note(error)
            return False
        return True

    def _note(self, error: SampleError) -> None:
        if error.index not in self.bad:
            print(f"a black image in place of a bad one: {error}", file=sys.stderr, flush=True)
            self.bad[error.index] = error.with_traceback(None)


def _bytes_at(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * length).from_address(address))


class WarpOnDevice(Warp):
    """`Warp` on the device, in one Triton kernel: uint8 (B, H, W, 3) there -> warped and normalised (B, R, R, 3)."""

    def __init__(
        self,
        ids: NDArray[np.int64],
        resolution: int,
        augment: Augment,
        device: torch.device,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(ids, resolution, augment, seed)
        self._device, self._dtype = device, dtype

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self._resolution, self._resolution, 3)
        state = replace(previous_state, jit_mode=False, device=self._device, shape=shape, dtype=self._dtype)
        return state, AllocationQuery(shape, self._dtype, self._device)

    def generate_code(self) -> Callable[..., Any]:
        norm = torch.from_numpy(np.ascontiguousarray(cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)[:, :3])).to(self._device)

        def warp_there(images: Tensor, output: Tensor, indices: Any) -> Tensor:
            count, height, width, _ = images.shape
            drawn = self._draw(images.shape, indices)
            affine, colour = (torch.from_numpy(part.astype(np.float32)).to(self._device, non_blocking=True) for part in drawn)
            addresses = images.data_ptr() + torch.arange(count, device=self._device) * images[0].numel()
            heights, widths = (torch.full((count,), side, dtype=torch.int32, device=self._device) for side in (height, width))
            warp(addresses, heights, widths, affine, colour, norm, self._recolours, output[:count])
            return output[:count]

        warp_there.with_indices = True  # type: ignore[attr-defined]
        return warp_there


def device_pipelines(
    path: str | os.PathLike[str],
    resolution: int = 512,
    seed: int = 0,
    augment: Augment | None = None,
    device: str | torch.device = "cuda",
    decoder: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, list[Operation] | None], DecodeOnDevice, WarpOnDevice]:
    """FFCV pipelines for a .beton of one image size, decoded on the device; the decoding in them (for its `bad`), and the
    warp (for its `epoch`).

    As `fastretina.loading.ffcv.pipelines`, on the device: (B, 3, R, R) of `dtype` and (B,) int64. decoder: see
    decode.gpu.make_decoder. Raises BetonError for a file that cannot be used, LoaderError where no decoder starts.
    """
    beton, device = Beton(path), torch.device(device)
    decode = DecodeOnDevice(beton, device, make_decoder(beton, device, decoder))
    warped = WarpOnDevice(beton.ids, resolution, Augment() if augment is None else augment, device, seed, dtype)
    image: list[Operation] = [JpegAddress(), decode, warped, ToTorchImage(convert_back_int16=False)]
    label: list[Operation] = [IntDecoder(), ToTensor(), ToDevice(device), Squeeze()]
    return by_field(beton, image, label), decode, warped
