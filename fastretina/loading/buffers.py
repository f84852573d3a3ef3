"""Batch memory that is used again once nobody can see it any more."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray


class BufferPool:
    """Hands out arrays over recycled memory.

    An array's memory comes back when the array object dies. torch.from_numpy keeps the array alive for as long as any tensor
    shares its memory, so a batch lives for as long as its user holds on to any part of it, and only then is overwritten.
    """

    def __init__(self, nbytes: int, keep: int, pinned: bool = False) -> None:
        """nbytes: size of one buffer. keep: how many idle ones are kept. pinned: page-locked, for asynchronous copies."""
        self._nbytes, self._pinned = nbytes, pinned
        self._idle: deque[NDArray[np.uint8]] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A C-contiguous array of undefined content, at most `nbytes` large."""
        try:
            memory = self._idle.pop()
        except IndexError:
            # A page more than asked for: the warp may write, and read, a few bytes past the last pixel.
            memory = torch.empty(self._nbytes + 64, dtype=torch.uint8, pin_memory=self._pinned).numpy()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = memory[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._idle.append, memory).atexit = False
        return array
