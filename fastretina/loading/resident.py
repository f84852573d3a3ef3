"""Resident mode: the decoded data set in memory, so that later epochs only warp."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastretina.beton.reader import Beton
from fastretina.errors import LoaderError
from fastretina.loading.config import LoaderConfig
from fastretina.loading.decode.cpu import Sizes
from fastretina.loading.shared_memory import Peers, peer_memory, shared_memory
from fastretina.system.cuda import device_available_bytes
from fastretina.system.memory import available_bytes

# `resident="auto"` takes at most this share of the free memory: a train and a test loader may each come to it unaware of
# the other, since RAM is only taken as a store fills; and on a GPU the model needs its part, where nobody says how much.
_AUTO_SHARE = 0.4
# Where they do say: of what that leaves. A device store is taken at once, so the next one sees what is left.
_RESERVED_SHARE = 0.95
# A rank reads what another wrote as soon as that has marked it as there. Only on x86 do other cores see stores in their order.
_STORES_IN_ORDER = platform.machine() in {"x86_64", "AMD64"}


class Store:
    """The decoded data set as one uint8 array in RAM, (N, H, W, 3).

    A sample is decoded when an epoch first asks for it, so the first epoch starts at once and fills the store as it goes. Ranks of
    one machine share their memory: what one of them has decoded is there for all.
    """

    def __init__(self, samples: int, width: int, height: int, memory: NDArray[np.uint8] | None = None) -> None:
        """Memory is taken as it is filled: `nbytes` in the end. memory: that many bytes, all zero, where the ranks share them."""
        memory = np.zeros(self.nbytes(samples, width, height), np.uint8) if memory is None else memory
        pixels = samples * height * width * 3
        self._images = memory[:pixels].reshape(samples, height, width, 3)
        self.filled = memory[pixels:].view(np.bool_)  # (N,)

    @staticmethod
    def nbytes(samples: int, width: int, height: int) -> int:
        """What a store of so many images needs."""
        return samples * (height * width * 3 + 1)

    def read(self, index: int, target: NDArray[np.uint8], decode: Callable[[int, NDArray[np.uint8]], None]) -> None:
        """Copy sample `index` to target (H, W, 3), decoded first if it is not here yet; any thread may ask, of any rank.

        A copy, because the warp then finds its source in the core's cache: a rotated image is read across its rows, and straight
        from the store that misses cache and page tables at every pixel (measured: 1.65 times the whole epoch's time).
        """
        if not self.filled[index]:
            # Two threads may both come here for one sample (class-balanced orders repeat some); both write the same bytes.
            decode(index, self._images[index])
            self.filled[index] = True
        np.copyto(target, self._images[index])


class DeviceStore:
    """The decoded data set in device memory, (N, H, W, 3) uint8, taken at once. Loader.fill brings the samples.

    Split among peers, each rank keeps a run of the samples and reads those of the others over the link between their devices.

    Attributes:
        owned: the samples that this rank keeps. held: (N,) bool, those that are there, on whichever device.
    """

    def __init__(self, samples: int, width: int, height: int, device: torch.device, peers: Peers | None = None) -> None:
        """Raises torch.OutOfMemoryError, of split memory on all peers alike."""
        rank, size = (peers.rank, peers.size) if peers else (0, 1)
        self._peers, self._device = peers, device
        self._bounds = np.array([number * samples // size for number in range(size + 1)])
        self.owned = range(int(self._bounds[rank]), int(self._bounds[rank + 1]))
        self._shape = height, width, 3
        self._image_bytes = height * width * 3
        nbytes = -(-samples // size) * self._image_bytes
        self._own: Tensor
        if peers is None:
            self._own = torch.empty(nbytes, dtype=torch.uint8, device=device)
            starts = [self._own.data_ptr()]
        else:
            memory = peer_memory(nbytes, device, peers)
            if memory is None:
                raise torch.OutOfMemoryError("no memory that all ranks can have and read")
            self._own, starts = memory
        self._starts = np.array(starts, np.int64)
        # Set when the copy has been queued: whatever reads the sample is queued later, behind the same event.
        self.held = np.zeros(samples, np.bool_)

    def put(self, indices: NDArray[np.int64], memory: Tensor, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Queue copies of samples that lie in `memory`, flat uint8, at these byte offsets. (n,) whether each was this rank's to
        keep: another's it has not to bring.

        Samples that lie side by side here and there are one copy: 256 of their own would take the host 1.5 ms.
        """
        mine = (indices >= self.owned.start) & (indices < self.owned.stop)
        targets, sources, size = (indices[mine] - self.owned.start) * self._image_bytes, offsets[mine], self._image_bytes
        seams = np.flatnonzero((np.diff(targets) != size) | (np.diff(sources) != size)) + 1
        for run in np.split(np.arange(len(targets)), seams):
            if len(run):
                to, of, nbytes = int(targets[run[0]]), int(sources[run[0]]), len(run) * size
                self._own[to : to + nbytes].copy_(memory[of : of + nbytes])
        self.held[indices[mine]] = True
        return mine

    def addresses(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) addresses of these samples, as this rank's device reads them."""
        owners = np.searchsorted(self._bounds, indices, side="right") - 1
        found: NDArray[np.int64] = self._starts[owners] + (indices - self._bounds[owners]) * self._image_bytes
        return found

    def tell_peers(self) -> None:
        """All that this rank has put is in its memory: tell the others, and hear what they have. Called by all of them alike."""
        if self._peers is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.held[:] = np.concatenate(self._peers.gather(self.held[self.owned.start : self.owned.stop]))


@dataclass(frozen=True)
class Residence:
    """What a loader keeps. size: (width, height) of the images, None: nothing. note: the decision in words. memory: of a store in
    RAM that the ranks share. split: whether the ranks divide the images among their devices."""

    size: tuple[int, int] | None
    note: str
    memory: NDArray[np.uint8] | None = None
    split: bool = False


def plan_residence(beton: Beton, config: LoaderConfig) -> Residence:
    """Whether to keep the images in memory, and how. Raises LoaderError where resident="on" cannot be.

    "auto": where they take at most 95 % of what is free after `reserve`, the memory that the model will need; without one at most
    40 % of what is free. Peers must all ask the same. In RAM they share one store. A device keeps all images, since every epoch
    deals them anew, or its part of them where only that fits. The scarcest memory counts, so that all decide alike. Where ranks
    cannot share RAM, or are no peers, it is reckoned for all of them on one machine.
    """
    if config.resident == "off":
        return Residence(None, "streaming")
    device, reserve, peers, forced = torch.device(config.device), config.reserve, config.peers, config.resident == "on"
    only = Sizes(beton, config.resolution).only
    if only is None:
        if forced:
            raise LoaderError(f"{beton.path}: resident mode needs images of one size; pack them with fastretina pack --size")
        return Residence(None, "streaming (images of several sizes)")
    in_ram = device.type == "cpu"
    where = "RAM" if in_ram else "device memory"
    needed = Store.nbytes(len(beton), *only)
    free = available_bytes() if in_ram else device_available_bytes(device)
    memory = None
    if peers is not None:
        free = min(peers.gather(free))
        reserve = None if reserve is None else max(peers.gather(reserve))
        memory = shared_memory(needed, peers) if in_ram and _STORES_IN_ORDER else None
    if in_ram and memory is None:
        needed *= peers.size if peers is not None else config.world_size
    allowed = free * _AUTO_SHARE if reserve is None else (free - reserve) * _RESERVED_SHARE
    limit = free if forced else allowed
    if needed <= limit:
        shared = f", shared by {peers.size} ranks" if peers is not None and memory is not None else ""
        return Residence(only, f"resident in {where} ({needed / 1e6:,.0f} MB{shared})", memory)
    if peers is not None and not in_ram and needed / peers.size <= limit:
        return Residence(only, f"resident in {where} ({needed / 1e6:,.0f} MB, split among {peers.size} ranks)", split=True)
    if forced:
        raise LoaderError(
            f"{beton.path}: resident mode needs {needed / 1e9:.2f} GB of {where} and {free / 1e9:.2f} GB are free; "
            "use resident='auto'"
        )
    kept = f", {reserve / 1e9:.1f} GB of it for the model" if reserve is not None else ""
    return Residence(None, f"streaming (resident would take {needed / 1e9:.1f} of {free / 1e9:.1f} GB of {where} free{kept})")


def make_store(samples: int, residence: Residence, config: LoaderConfig) -> tuple[DeviceStore | None, str]:
    """The device store of a plan, and the decision in words.

    Memory that was free in one piece less than in all makes "auto" stream after all; "on" is then a LoaderError.
    """
    if residence.size is None:
        return None, residence.note
    try:
        peers = config.peers if residence.split else None
        return DeviceStore(samples, *residence.size, torch.device(config.device), peers), residence.note
    except torch.OutOfMemoryError as error:
        needed = f"{Store.nbytes(samples, *residence.size) / 1e9:.1f} GB of device memory in one piece"
        if residence.split:
            needed += " for each rank that all others can read"
        if config.resident == "on":
            raise LoaderError(f"resident mode needs {needed}, which cannot be had; use resident='auto'") from error
        return None, f"streaming (resident would take {needed}, which cannot be had)"
