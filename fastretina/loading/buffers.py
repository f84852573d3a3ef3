"""Batch memory that is used again once nobody can see it any more."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

_HELD = 8  # arrays that a user may hold on to at a time, and all memory is still used again; more, and the oldest is only freed


class _Lease(weakref.ref[NDArray[Any]]):
    """Sees the array die that was handed out over `memory`."""

    memory: NDArray[np.uint8]


class BufferPool:
    """Hands out arrays over recycled memory.

    An array's memory comes back when the array object dies. torch.from_numpy keeps the array alive for as long as any tensor
    shares its memory, so a batch lives for as long as its user holds on to any part of it, and only then is overwritten. Whoever is
    interrupted in here may lose memory; none is ever handed out twice.
    """

    def __init__(self, nbytes: int, keep: int, pinned: bool = False) -> None:
        """nbytes: size of one buffer. keep: how many idle ones are kept. pinned: page-locked, for asynchronous copies."""
        self._nbytes, self._keep, self._pinned = nbytes, keep, pinned
        self._leases: OrderedDict[int, _Lease] = OrderedDict()  # by id: one that nobody refers to sees nothing
        self._idle: deque[_Lease] = deque()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A C-contiguous array of undefined content, at most `nbytes` large."""
        memory = self._returned()
        while len(self._idle) > self._keep:
            self._returned()
        if memory is None:
            # A little more than asked for: the warps may read a few bytes past the last pixel.
            memory = torch.empty(self._nbytes + 64, dtype=torch.uint8, pin_memory=self._pinned).numpy()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = memory[:size].view(dtype).reshape(shape)
        # Called as the array dies, on any thread, by a function in C: one in Python, as weakref.finalize is, would swallow the
        # KeyboardInterrupt that comes in its midst.
        lease = _Lease(array, self._idle.append)
        lease.memory = memory
        self._leases[id(lease)] = lease
        if len(self._leases) > self._keep + _HELD:
            self._leases.popitem(last=False)
        return array

    def _returned(self) -> NDArray[np.uint8] | None:
        try:
            lease = self._idle.pop()
        except IndexError:
            return None
        self._leases.pop(id(lease), None)
        return lease.memory
