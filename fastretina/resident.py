"""Resident mode: the decoded data set in memory, so that later epochs only warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from fastretina.beton import Beton
from fastretina.decode.cpu import decoded_sizes
from fastretina.device_memory import device_available_bytes
from fastretina.errors import LoaderError
from fastretina.memory import available_bytes

# `resident="auto"` takes at most this share of the free memory: a train and a test loader may each come to it unaware of
# the other, since RAM is only taken as a store fills; and on a GPU the model needs its part, where nobody says how much.
_AUTO_SHARE = 0.4
# Where they do say: of what that leaves. A device store is taken at once, so the next one sees what is left.
_RESERVED_SHARE = 0.95


class Store:
    """The decoded data set as one uint8 array in RAM, (N, H, W, 3).

    A sample is decoded when an epoch first asks for it, so the first epoch starts at once and fills the store as it goes.
    """

    def __init__(self, samples: int, width: int, height: int) -> None:
        """Memory is taken as it is filled: samples * width * height * 3 bytes in the end."""
        self._images = np.empty((samples, height, width, 3), np.uint8)
        self._filled = np.zeros(samples, np.bool_)

    def read(self, index: int, target: NDArray[np.uint8], decode: Callable[[int, NDArray[np.uint8]], None]) -> None:
        """Copy sample `index` to target (H, W, 3), decoded first if it is not here yet; any thread may ask.

        A copy, because the warp then finds its source in the core's cache: a turned image is read across its rows, and straight
        from the store that misses cache and page tables at every pixel (measured: 1.65 times the whole epoch's time).
        """
        if not self._filled[index]:
            # Two threads may both come here for one sample (class-balanced orders repeat some); both write the same bytes.
            decode(index, self._images[index])
            self._filled[index] = True
        np.copyto(target, self._images[index])


class DeviceStore:
    """The decoded data set in device memory, (N, H, W, 3) uint8, taken at once. Loader.fill brings the samples."""

    def __init__(self, samples: int, width: int, height: int, device: torch.device) -> None:
        """Raises torch.OutOfMemoryError."""
        self.images = torch.empty((samples, height, width, 3), dtype=torch.uint8, device=device)
        # Set when the copy has been queued: whatever reads the sample is queued later, behind the same event.
        self.held = np.zeros(samples, np.bool_)

    def addresses(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) device addresses of these samples."""
        return self.images.data_ptr() + indices * self.images[0].numel()


def plan_residence(
    beton: Beton, resolution: int, resident: str, device: torch.device, reserve: int | None = None, world_size: int = 1
) -> tuple[tuple[int, int] | None, str]:
    """(width, height) of the images to keep, or None; and the decision in words.

    resident: "on", "off", or "auto": where they take at most 95 % of what is free after `reserve`, in bytes, the memory that the
    model will need (see device_memory.training_bytes); None: at most 40 % of what is free. Raises LoaderError where "on" cannot be.
    world_size: ranks, each of which comes to keep all images, since every epoch deals them anew: RAM is reckoned for all of them
    on one machine, device memory is each rank's own.
    """
    if resident == "off":
        return None, "streaming"
    only = decoded_sizes(beton, resolution).only
    if only is None:
        if resident == "on":
            raise LoaderError(f"{beton.path}: resident mode needs images of one size; pack them with tools/write_beton.py --size")
        return None, "streaming (images of several sizes)"
    where = "RAM" if device.type == "cpu" else "device memory"
    needed = len(beton) * only[0] * only[1] * 3 * (world_size if device.type == "cpu" else 1)
    free = available_bytes() if device.type == "cpu" else device_available_bytes(device)
    if resident == "on" and needed > free:
        raise LoaderError(
            f"{beton.path}: resident mode needs {needed / 1e9:.2f} GB of {where} and {free / 1e9:.2f} GB are free; "
            "use resident='auto'"
        )
    allowed = free * _AUTO_SHARE if reserve is None else (free - reserve) * _RESERVED_SHARE
    if resident == "auto" and needed > allowed:
        kept = f", {reserve / 1e9:.1f} GB of it for the model" if reserve is not None else ""
        return None, f"streaming (resident would take {needed / 1e9:.1f} of {free / 1e9:.1f} GB of {where} free{kept})"
    return only, f"resident in {where} ({needed / 1e6:,.0f} MB)"


def make_store(
    samples: int, size: tuple[int, int] | None, kept: str, device: torch.device, resident: str
) -> tuple[DeviceStore | None, str]:
    """The device store of a plan of `plan_residence`, and the decision in words.

    Memory that was free in one piece less than in all makes "auto" stream after all; "on" is then a LoaderError.
    """
    if size is None:
        return None, kept
    try:
        return DeviceStore(samples, *size, device), kept
    except torch.OutOfMemoryError as error:
        needed = f"{samples * size[0] * size[1] * 3 / 1e9:.1f} GB of device memory in one piece"
        if resident == "on":
            raise LoaderError(f"resident mode needs {needed}, which cannot be had; use resident='auto'") from error
        return None, f"streaming (resident would take {needed}, which cannot be had)"
