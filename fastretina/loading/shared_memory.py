"""Memory that the ranks of one machine share: what is in it is there once, and not once for each of them."""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
_TOKEN = 16  # bytes behind the memory, by which the others know it


class Peers(Protocol):
    """The ranks on this machine, seen from one of them; `group`: their torch.distributed.ProcessGroup."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def group(self) -> Any: ...

    def gather(self, part: T) -> list[T]:
        """All of their parts, in their order, on each of them. Must be called by all alike."""


def shared_memory(nbytes: int, peers: Peers) -> NDArray[np.uint8] | None:
    """(nbytes,) uint8, zeros at first, the same memory for all peers; None for all of them where not each one can have it.

    RAM is taken page by page as it is written to. The kernel frees it when the last of them is done with it, however they end: it
    has no name, and is handed over through /proc (where ranks in containers of their own do not see each other).
    """
    descriptor, token = -1, secrets.token_bytes(_TOKEN)
    try:
        if peers.rank == 0:
            with suppress(OSError):  # where the system has none to give, nobody finds what is expected
                descriptor = os.memfd_create("fastretina", os.MFD_CLOEXEC)
                os.truncate(descriptor, nbytes + _TOKEN)
                os.pwrite(descriptor, token, nbytes)
        owner, number, expected = peers.gather((os.getpid(), descriptor, token))[0]
        memory = _map(f"/proc/{owner}/fd/{number}", nbytes, expected)
        return memory if all(peers.gather(memory is not None)) else None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _map(path: str, nbytes: int, token: bytes) -> NDArray[np.uint8] | None:
    """None where the path cannot be opened, or is not of the process that was meant: another container counts from 1, too."""
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC), "r+b", buffering=0) as file:
            descriptor = file.fileno()
            if os.fstat(descriptor).st_size != nbytes + _TOKEN or os.pread(descriptor, _TOKEN, nbytes) != token:
                return None
            return np.frombuffer(mmap.mmap(descriptor, nbytes + _TOKEN), np.uint8)[:nbytes]
    except OSError:
        return None


def peer_memory(nbytes: int, device: torch.device, peers: Peers) -> tuple[Tensor, list[int]] | None:
    """(nbytes,) uint8 of this rank's device, and for each peer the address at which this rank's device reads theirs; None for all
    of them where not each one can have it.

    On CUDA by torch's symmetric memory, which needs peer access between all devices (NVLink, or PCIe where it allows that).
    """
    if device.type == "cpu":  # the tests' device
        shared = shared_memory(nbytes * peers.size, peers)
        if shared is None:
            return None
        parts = torch.from_numpy(shared).view(peers.size, nbytes)
        return parts[peers.rank], [part.data_ptr() for part in parts]
    devices = peers.gather(device.index)
    reachable = all(other == device.index or torch.cuda.can_device_access_peer(device, other) for other in devices)
    if not all(peers.gather(reachable and len(set(devices)) == len(devices))):
        return None
    import torch.distributed._symmetric_memory as symmetric

    try:
        own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError:  # out of memory, or a driver that cannot
        own = None
    if not all(peers.gather(own is not None)):
        return None
    assert own is not None
    return own, list(symmetric.rendezvous(own, peers.group).buffer_ptrs)
