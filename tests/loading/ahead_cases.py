"""Loaders that decode ahead, without a GPU: a codec that threads can be held in, and a warp that only copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import devices
import numpy as np
import pytest
import simplejpeg
import torch
from simulated_cuda import bytes_at

from fastretina import Loader
from fastretina.loading import device_stage
from fastretina.loading.augment import Augment
from fastretina.loading.decode import gpu

TIMEOUT = 30  # seconds; only reached when something hangs
# Three batches an epoch of `devices.write_blocks(path, 12, SIDE)`, without the warp's arithmetic.
SIDE, BATCH, COUNT = 8, 5, 12
SETTINGS: dict[str, Any] = {
    "batch_size": BATCH, "resolution": SIDE, "seed": 7, "workers": 2, "dtype": torch.uint8, "augment": Augment.none(),
}  # fmt: skip

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the batches are made on a CPU")


class Codec:
    """Decodes as a device library would, on any thread. Decodes are counted from 0, the loader's trial left out.

    gates: by decode, what it waits for. threads: of each decode, the trial among them. refuses, claims: JPEGs that it cannot
    decode, and those that it only says it has decoded.
    """

    name = "stand-in"

    def __init__(self) -> None:
        self._begun: dict[int, threading.Event] = {}
        self.gates: dict[int, threading.Event] = {}
        self.threads: list[int] = []
        self.refuses: set[bytes] = set()
        self.claims: set[bytes] = set()

    def wrap(self, target: torch.Tensor) -> torch.Tensor:
        return target

    def decode(self, jpegs: list[memoryview], targets: list[torch.Tensor]) -> list[bool]:
        number = len(self.threads) - 1
        self.threads.append(threading.get_ident())
        if number >= 0:
            self.begun(number).set()
            assert number not in self.gates or self.gates[number].wait(TIMEOUT)
        return [self._one(bytes(jpeg), target) for jpeg, target in zip(jpegs, targets, strict=True)]

    def _one(self, jpeg: bytes, target: torch.Tensor) -> bool:
        if jpeg in self.claims:
            return True
        if jpeg not in self.refuses:
            target.copy_(torch.from_numpy(simplejpeg.decode_jpeg(jpeg)))
        return jpeg not in self.refuses

    def begun(self, number: int) -> threading.Event:
        """Set as this decode begins."""
        return self._begun.setdefault(number, threading.Event())

    @property
    def count(self) -> int:
        """Decodes that have begun."""
        return len(self.threads) - 1


def copying(then: Callable[[], None] = lambda: None) -> Callable[..., None]:
    """In the kernel's place: the sources as they are, after which it calls `then`."""

    def warp(addresses, heights, widths, affine, colour, norm, recolour, output) -> None:
        for source, target in zip(addresses.tolist(), output, strict=True):
            target.copy_(torch.from_numpy(bytes_at(source, target.nbytes).copy()).view(target.shape))
        then()

    return warp


def provide(patch: pytest.MonkeyPatch) -> Codec:
    """For loaders with decoder="stand-in"."""
    codec = Codec()
    patch.setitem(gpu.DECODERS, "stand-in", lambda settings: codec)
    patch.setattr(device_stage, "warp", copying())
    return codec


def make(path: Any, **changes: Any) -> Loader:
    return devices.DeviceLoader(path, **{"decode": "gpu", "decoder": "stand-in"} | SETTINGS | changes)


def decoded_ahead(loader: Loader) -> bool:
    """Whether the next batch has been decoded, or has failed, soon."""
    for _ in range(TIMEOUT * 1000):
        running = loader._ahead.pipeline._shared.stream.running
        if running and running[0].finished:
            return True
        threading.Event().wait(0.001)
    return False


def pixels(path: Any) -> dict[int, np.ndarray]:
    """Each sample's, by id."""
    with Loader(path, **SETTINGS | {"batch_size": COUNT, "train": False}) as loader:
        (batch,) = list(loader)
    return {int(name): image.permute(1, 2, 0).numpy() for name, image in zip(batch.ids, batch.images, strict=True)}
