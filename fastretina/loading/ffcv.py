"""fastretina's augmentation inside stock FFCV's Loader, for those who keep that one.

    from ffcv.loader import Loader, OrderOption
    from fastretina.loading.ffcv import pipelines

    pipes, warp = pipelines("train.beton", resolution=512, seed=0)
    loader = Loader("train.beton", batch_size=64, num_workers=8, order=OrderOption.RANDOM, drop_last=False, pipelines=pipes)
    for epoch in range(10):
        warp.epoch = epoch          # FFCV does not tell its operations which epoch it is
        for images, labels in loader: ...

Needs the extra `ffcv`. How stock FFCV meets bad samples and errors stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.transforms import Squeeze, ToDevice, ToTensor, ToTorchImage
from numba import prange
from numpy.typing import NDArray

from fastretina.beton.reader import Beton
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, cpu, draw
from fastretina.system.kernel import kernel


class Warp(Operation):  # type: ignore[misc]  # ffcv is untyped
    """FFCV operation: uint8 images (B, H, W, 3) of one size -> warped and normalised float32 (B, R, R, 3).

    The random numbers are those of fastretina.Loader with the same seed and epoch: the images are the same to the bit.

    Attributes:
        epoch: set it before each epoch; left alone, every epoch is augmented alike.
    """

    def __init__(self, ids: NDArray[np.int64], resolution: int, augment: Augment, seed: int = 0) -> None:
        """ids: (N,) int64, the samples' ids by index (`Beton.ids`). resolution: R, px."""
        super().__init__()
        self.epoch = 0
        self._ids, self._resolution, self._augment, self._seed = ids, resolution, augment, seed

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self._resolution, self._resolution, 3)
        # Outside FFCV's compiled block, because drawing parameters is numpy, and the epoch may change.
        state = replace(previous_state, jit_mode=False, shape=shape, dtype=np.dtype("float32"))
        return state, AllocationQuery(shape, np.dtype("float32"))

    def generate_code(self) -> Callable[..., Any]:
        norm, recolours = cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD), self._augment.recolours

        def warp(images: NDArray[np.uint8], output: NDArray[np.float32], indices: Any) -> NDArray[np.float32]:
            count, height, width, _ = images.shape
            ids = self._ids[np.asarray(indices[:count], np.int64)]
            sizes = np.full(count, width), np.full(count, height)
            affine, colour = draw(self._augment, self._resolution, *sizes, self._seed, self.epoch, ids)
            _warp_batch(images, affine, cpu.kernel_colour(colour), norm, recolours, output)
            return output[:count]

        warp.with_indices = True  # type: ignore[attr-defined]  # how FFCV is asked for the batch's rows of the file
        return warp


@kernel(parallel=True)
def _warp_batch(
    images: NDArray[np.uint8],
    affine: NDArray[np.float64],
    colour: NDArray[np.float32],
    norm: NDArray[np.float32],
    recolour: bool,
    output: NDArray[np.float32],
) -> None:
    count, height, width, _ = images.shape
    for row in prange(count):
        source = images[row].reshape(-1)
        if row == count - 1:
            # The warp reads a few bytes past its image: the next one's, but for the last.
            padded = np.empty(source.size + cpu.SOURCE_PADDING, np.uint8)
            padded[: source.size] = source
            source = padded
        cpu.warp(source, height, width, affine[row], colour[row], norm, recolour, output[row])


def pipelines(
    path: str | os.PathLike[str],
    resolution: int = 512,
    seed: int = 0,
    augment: Augment | None = None,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, list[Operation] | None], Warp]:
    """FFCV pipelines for a .beton of one image size, and the Warp in them (for its `epoch`).

    FFCV then yields (images, labels): (B, 3, R, R) float32, channels-last and normalised, and (B,) int64. augment: None is
    rotation and flips; Augment.none() for evaluation. Raises BetonError for a file that cannot be used.
    """
    beton = Beton(path)
    warp = Warp(beton.ids, resolution, augment or Augment(), seed)
    image = [SimpleRGBImageDecoder(), warp, ToTensor(), ToTorchImage(convert_back_int16=False)]
    there = [ToDevice(torch.device(device))] if torch.device(device).type != "cpu" else []
    unread = dict.fromkeys(("id", "crc32") if beton.crcs is not None else ())  # fields that only fastretina reads
    return {"image": image + there, "label": [IntDecoder(), ToTensor(), Squeeze(), *there]} | unread, warp
